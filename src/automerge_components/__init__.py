"""Kubeflow Pipelines components: each stage of the flow as a thin shim around a function of ``automerge.stages``.

``from automerge_components import fetch`` gives the component for a pipeline of your own; each folder has the same as
``component.yaml``, for ``kfp.components.load_component_from_file``.
"""

from automerge_components.evaluate import evaluate
from automerge_components.fetch import fetch
from automerge_components.fetch_input import fetch_input
from automerge_components.register import register
from automerge_components.report_status import report_status
from automerge_components.resolve import resolve
from automerge_components.search_merge import search_merge
from automerge_components.segment import segment

__all__ = ["evaluate", "fetch", "fetch_input", "register", "report_status", "resolve", "search_merge", "segment"]
