"""The component ``segment``."""

from components.segment.component import segment

__all__ = ["segment"]
