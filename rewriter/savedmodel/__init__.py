"""SavedModels on disk: the one place that knows the format."""
