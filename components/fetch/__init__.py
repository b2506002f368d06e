"""The component ``fetch``."""

from components.fetch.component import fetch

__all__ = ["fetch"]
