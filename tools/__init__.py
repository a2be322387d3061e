"""Demonstration and benchmarks."""
