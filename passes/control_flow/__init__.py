"""Choices that a graph makes while it runs: the booleans they depend on, the branches, and what each of them needs.

``If``, Switch and Merge are read alike here. The other folders ask which nodes run under which condition.
Passes: `inline_branches`, `settle_choices`.
"""
