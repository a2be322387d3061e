"""Passes that bring a model into the form that the others expect, before anything else.

Reference variables become resources, constants become variables again, and a function that takes its mode as an
argument becomes one function for each mode.
"""
