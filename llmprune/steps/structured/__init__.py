"""Structured pruning: attention heads, neurons and layers are removed, and what read them is fitted again."""
