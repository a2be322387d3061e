"""Passes of `bnqat finalize`, which remove what a device or a converter does not need.

Quantised values are stored in the variables (`bake_quantizers`), batch norms become part of convolutions
(`fold_batch_norm`), and only functions that serve are kept (`keep_serving`).
"""
