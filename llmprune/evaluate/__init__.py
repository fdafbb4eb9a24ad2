"""Evaluation: what pruning cost."""
