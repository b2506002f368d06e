"""Segmentation: where to cut a model into blocks."""
