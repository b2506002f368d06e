"""The component ``report_status``."""

from automerge_components.report_status.component import report_status

__all__ = ["report_status"]
