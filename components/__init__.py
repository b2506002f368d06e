"""Kubeflow Pipelines components: each stage of the flow as a thin shim around a function of ``automerge.stages``."""
