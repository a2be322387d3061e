"""The engine: graphs and SavedModels, and nothing about batch normalisation."""
