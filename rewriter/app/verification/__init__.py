"""Checks of the claims of a rewrite, by running the source and the result."""
