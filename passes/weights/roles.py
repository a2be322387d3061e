"""The role of weights. Importing this module does not import TensorFlow."""

from __future__ import annotations

from passes.quantization.roles import Role

WEIGHT = Role(
    "weight",
    "symmetric",
    unsuited={
        "log": "the scheme log is for values above zero",
        "ema": "a weight is known at every call, so an average of its range has no use; choose dynamic, mse or learned",
    },
    device=True,
)
"""Filters of convolutions, matrices of matrix products, and rows of embeddings."""
