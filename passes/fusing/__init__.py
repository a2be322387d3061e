"""Passes that let one fused kernel compute a batch norm, and only in the mode that is used.

`fuse_batch_norm` is the pass itself; `fusable` says which single ops it may replace. `select_to_branch` and
`merge_choices` prepare for it, `choose_branch` lets kernels run only where their output is used.
"""
