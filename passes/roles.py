"""Names and limits that all passes share. Importing this module does not import TensorFlow."""

GAMMA, BETA, MEAN, VARIANCE = ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
"""The roles of a batch norm's variables. Role i enters the fused kernel at input i + 1."""

MIN_BITS, MAX_BITS = 2, 16
"""The least and the greatest width of a code."""
