"""SavedModels on disk: the only package that knows the format."""
