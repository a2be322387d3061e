"""Helpers for training a rewritten model with Keras 3."""
