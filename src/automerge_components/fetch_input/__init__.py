"""The component ``fetch_input``."""

from automerge_components.fetch_input.component import fetch_input

__all__ = ["fetch_input"]
