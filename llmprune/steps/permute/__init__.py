"""The step that puts channels in an order in which an N:M mask costs less; the model computes the same."""
