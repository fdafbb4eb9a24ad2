"""Runs: steps in order, over a model in memory or from folder to folder; and comparisons, which are many runs."""
