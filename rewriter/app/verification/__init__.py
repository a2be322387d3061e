"""Running two models, and what a rewrite promises of them."""
