"""Names and limits that everything here shares, and that can be had without importing TensorFlow."""

GAMMA, BETA, MEAN, VARIANCE = ROLES = ("gamma", "beta", "moving_mean", "moving_variance")
"""What a batch norm's variables are for; role i enters the fused kernel at input i + 1."""

MIN_BITS, MAX_BITS = 2, 16
"""The widths of codes."""
