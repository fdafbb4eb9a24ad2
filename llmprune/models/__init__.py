"""Models: where a checkpoint is, what tensors it holds, and which of its matrices can be pruned."""
