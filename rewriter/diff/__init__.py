"""Two models compared by name."""
