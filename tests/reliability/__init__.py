"""Tests of faults while writing, and of damaged and hostile input."""
