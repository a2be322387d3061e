"""The Python interface and the command line."""
