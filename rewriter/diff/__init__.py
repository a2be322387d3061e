"""Comparison of two models by name."""
