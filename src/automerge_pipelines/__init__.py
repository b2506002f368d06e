"""Kubeflow Pipelines pipelines that are made of the components."""
