"""The component ``evaluate``."""

from automerge_components.evaluate.component import evaluate

__all__ = ["evaluate"]
