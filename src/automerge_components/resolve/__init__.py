"""The component ``resolve``."""

from automerge_components.resolve.component import resolve

__all__ = ["resolve"]
