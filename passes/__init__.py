"""The passes of bnqat: one pass, one file, one class."""
