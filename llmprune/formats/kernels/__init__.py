"""Products with packed 2:4 matrices: the truth in plain torch, the kernels, and what chooses between them."""
