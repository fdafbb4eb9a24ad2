"""Patterns, linear algebra and running statistics. Knows no model."""
