"""What a model costs, by arithmetic: parameters, multiplications, bytes."""
