"""Tasks: data, a loss and metrics that measure one capability of a model."""
