"""Weights are pruned to a pattern, block by block."""
