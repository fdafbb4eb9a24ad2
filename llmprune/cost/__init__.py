"""What a model costs: parameters, multiplications, bytes, an estimate of energy, and milliseconds that were measured."""
