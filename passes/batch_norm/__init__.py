"""Batch norms: the places that compute them, their variables, and the updates of their averages.

`sites` finds them, fused (`kernel`) or in single ops (`decomposed`, `moments`); `batch_norms` and `layers` group what
belongs together; `updates` follows a statistic into an average. A new producer's form of batch norm goes into
`decomposed` or `moments`. `points` says which of these values `passes.quantize` is to quantise.
"""
