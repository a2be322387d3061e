"""Weights: the filters, matrices and tables of convolutions, matrix products and embeddings, as quantisation points.

`kernels` says which input of an op is a weight and which of its axes are channels, `uses` finds the weights of a model,
`layers` tells which uses share an identity, and `points` is the provider.
"""
