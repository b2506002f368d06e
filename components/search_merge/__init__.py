"""The component ``search_merge``."""

from components.search_merge.component import search_merge

__all__ = ["search_merge"]
