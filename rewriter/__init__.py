"""The rewriting engine: graphs, edits and SavedModels. It knows nothing about batch normalisation."""
