"""The component ``fetch``."""

from automerge_components.fetch.component import fetch

__all__ = ["fetch"]
