"""Plug-ins by entry point: techniques, tasks, models and registries, ours and third parties' alike."""

import difflib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from automerge.errors import PluginError

Group = Literal["techniques", "tasks", "models", "registries"]


def plugin_names(group: Group) -> list[str]:
    """The sorted names registered in one group."""
    return sorted(_entries(group, tuple(sys.path)))


def load_plugin(group: Group, name: str, where: str = "") -> Any:
    """Import and return the object behind one name.

    Args:
        group: the extension point.
        name: the plug-in's name.
        where: path in the spec, for the error.

    Raises:
        PluginError: the name is unknown (the nearest valid name is given), or its module cannot be imported.
    """
    found = _entries(group, tuple(sys.path))
    prefix = f"{where}: " if where else ""
    if name not in found:
        raise PluginError(f"{prefix}unknown {_SINGULAR[group]} {name!r}", nearest(name, sorted(found)))
    try:
        return found[name].load()
    except ImportError as error:
        raise PluginError(
            f"{prefix}{_SINGULAR[group]} {name!r} cannot be imported: {error}", "install what it needs"
        ) from error


@cache
def _entries(group: Group, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """By name. They are read out of every distribution that is installed, so once for a search path."""
    return {entry.name: entry for entry in entry_points(group=f"automerge.{group}")}


def nearest(name: str, valid: list[str]) -> str:
    """A remedy: the nearest valid name, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(valid) or 'none installed'}"


_SINGULAR = {"techniques": "technique", "tasks": "task kind", "models": "model kind", "registries": "registry kind"}
