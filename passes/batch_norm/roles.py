"""The roles of a batch norm's variables. Importing this module does not import TensorFlow."""

from __future__ import annotations

from passes.quantization.roles import Role

GAMMA, BETA, MEAN, VARIANCE = ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
"""Names of the roles. Role i enters the fused kernel at input i + 1."""

_SIGNED = "the scheme log is for moving_variance, as {} may have values below zero"
_ONE_VALUE = "a range for each channel changes nothing, as there is one value for each channel; leave it out"
_MSE = "mse is for weights, many of which share a range; choose dynamic or learned"
_NEVER = {"per_channel": _ONE_VALUE, "mse": _MSE}
_NOT_TRAINED = "no gradient reaches moving statistics, so a learned range would stay; choose ema or fixed"

QUANTIZED: tuple[Role, ...] = (
    Role(GAMMA, always=True, unsuited={**_NEVER, "log": _SIGNED.format(GAMMA)}),
    Role(BETA, always=True, unsuited={**_NEVER, "log": _SIGNED.format(BETA)}),
    Role(MEAN, always=True, unsuited={**_NEVER, "log": _SIGNED.format(MEAN), "learned": _NOT_TRAINED}),
    Role(VARIANCE, "log", always=True, unsuited={**_NEVER, "learned": _NOT_TRAINED}),
)
"""The roles as `quantize` knows them."""
