"""The roles of a batch norm's variables. Importing this module does not import TensorFlow."""

from __future__ import annotations

from passes.quantization.roles import Role

GAMMA, BETA, MEAN, VARIANCE = ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
"""Names of the roles. Role i enters the fused kernel at input i + 1."""

_SIGNED = "the scheme log is for moving_variance, as {} may have values below zero"
_NOT_TRAINED = "no gradient reaches moving statistics, so a learned range would stay; choose ema or fixed"

QUANTIZED: tuple[Role, ...] = (
    Role(GAMMA, always=True, unsuited={"log": _SIGNED.format(GAMMA)}),
    Role(BETA, always=True, unsuited={"log": _SIGNED.format(BETA)}),
    Role(MEAN, always=True, unsuited={"log": _SIGNED.format(MEAN), "learned": _NOT_TRAINED}),
    Role(VARIANCE, "log", always=True, unsuited={"learned": _NOT_TRAINED}),
)
"""The roles as `quantize` knows them."""
