"""Formats of pruned weights: packed 2:4 folders, the layer that computes with them, kernels, and loading."""
