"""Packed 2:4 models: the layer, the files, the road between dense and packed folders, and loading."""
