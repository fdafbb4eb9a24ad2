"""The engine: calibration activations and one decoder block at a time flow through; it names no method and no family."""
