"""Training functions: derived where the source has none, checked where it has one, and their second phase.

`derive_training` is the pass; `functions` and `main_graph` write training for the two formats of SavedModels.
Further passes: `aggregate_statistics`, `cut_gradients`, `freeze_statistics`, and `check_averages`, which refuses a
result that does not train what it should.
"""
