"""The component ``segment``."""

from automerge_components.segment.component import segment

__all__ = ["segment"]
