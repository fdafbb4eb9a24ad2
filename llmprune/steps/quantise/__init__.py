"""The step that rounds the weights that are left to codes of few bits, zeros kept."""
