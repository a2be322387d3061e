"""Concrete functions of a model: those that serve, those that train, and how their inputs and outputs correspond."""
