"""AutoMerge: N fine-tuned models of one architecture become one multi-task model, without training.

The public functions are the stages, each a plain function of the spec and the folders that the earlier ones wrote::

    import automerge
    spec = automerge.load_spec(Path("spec.yaml"))
    automerge.run(spec, Path("runs/mine"))          # or fetch, segment, search, merge, evaluate, register one by one

They are imported when first used, so that `import automerge` loads neither torch nor anything else that is heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from automerge.errors import AutoMergeError

if TYPE_CHECKING:
    from automerge.spec import Spec, load_spec, parse_spec
    from automerge.stages.evaluate import evaluate
    from automerge.stages.fetch import fetch
    from automerge.stages.merge import merge
    from automerge.stages.register import register
    from automerge.stages.run import run
    from automerge.stages.search import search
    from automerge.stages.segment import segment

__all__ = [
    "AutoMergeError",
    "Spec",
    "evaluate",
    "fetch",
    "load_spec",
    "merge",
    "parse_spec",
    "register",
    "run",
    "search",
    "segment",
]

_SPEC = ("Spec", "load_spec", "parse_spec")
_STAGES = ("evaluate", "fetch", "merge", "register", "run", "search", "segment")


def __getattr__(name: str) -> Any:
    if name in _SPEC:
        return getattr(import_module("automerge.spec"), name)
    if name in _STAGES:
        return getattr(import_module(f"automerge.stages.{name}"), name)
    raise AttributeError(f"module 'automerge' has no attribute {name!r}")
