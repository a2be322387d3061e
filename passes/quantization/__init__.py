"""Fake quantisation of a value: schemes, ranges, rounding, the functions that compute them, and their controls.

`schemes` and `ranges` are what a user chooses, `choice` for which layers; `custom` is a quantiser of their own.
Providers say in `points` which values are quantised, and `insertion` turns these into edits: `quantizers` and `batched`
make functions, `grouping` says which values share one call, `emission` writes the calls, and `controls` the variables
that switch them.
Nodes are marked by `quantizer_marks` (a quantiser) and `node_marks` (parts of its arithmetic).
"""
