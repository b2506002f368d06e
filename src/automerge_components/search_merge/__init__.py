"""The component ``search_merge``."""

from automerge_components.search_merge.component import search_merge

__all__ = ["search_merge"]
