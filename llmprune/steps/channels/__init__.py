"""The steps that put channels in another order, or rotate them, so that a mask costs less: the model computes the same."""
