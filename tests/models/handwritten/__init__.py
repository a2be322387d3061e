"""Hand-written batch norms: a product of the ways in which people write them."""
