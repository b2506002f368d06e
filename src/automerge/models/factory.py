"""Model kind ``factory``: a Python callable ``module:callable`` that returns a ``torch.nn.Module``."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from automerge.errors import ModelError
from automerge.models.architecture import Architecture, short_reason
from automerge.plugins import nearest


class FactoryArchitecture(Architecture):
    """Builds the module by calling ``model.target`` with ``model.arguments``."""

    def check(self) -> None:
        """Import the factory, without calling it; see ``Architecture.check``."""
        self._factory()

    def build(self, reference: str, arguments: Mapping[str, Any]) -> nn.Module:
        """Call the factory; see ``Architecture.build``. The module keeps the weights that the factory gave it."""
        factory = self._factory()
        merged = {**self.spec.arguments, **arguments}
        try:
            module = factory(**merged)
        except Exception as error:
            raise ModelError(
                f"model.target: {self.spec.target} called for {reference!r} with the arguments {merged} raised "
                f"{short_reason(error)}",
                "mend model.arguments, the source's arguments, or the factory",
            ) from error
        if not isinstance(module, nn.Module):
            raise ModelError(
                f"model.target: {self.spec.target} returned {type(module).__name__}, not a torch.nn.Module",
                "return the module",
            )
        return module.eval()

    def _factory(self) -> Callable[..., Any]:
        target = self.spec.target
        name, colon, attribute = target.partition(":")
        if not (name and colon and attribute):
            raise ModelError(f"model.target: {target!r} is not of the form 'module:callable'", "write e.g. 'cct:build'")
        module = _import(name, self.spec.python_path)
        value: Any = module
        for part in attribute.split("."):
            if not hasattr(value, part):
                public = [
                    item for item in sorted(vars(value)) if not item.startswith("_") and callable(vars(value)[item])
                ]
                raise ModelError(f"model.target: the module {name!r} has no {attribute!r}", nearest(part, public))
            value = getattr(value, part)
        if not callable(value):
            raise ModelError(
                f"model.target: {target} is no callable but of type {type(value).__name__}", "name a function or class"
            )
        return value  # type: ignore[no-any-return]


_imported: dict[str, Path] = {}
"""Top-level modules that came from a spec's python_path, and the folder: a later spec may have another of that name."""


def _comes_from(module: ModuleType, folder: Path) -> bool:
    """Whether a loaded module is the one that an import from ``folder`` would find."""
    places = [module.__file__] if module.__file__ else list(getattr(module, "__path__", []))
    return any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places)


def _import(name: str, python_path: list[str]) -> ModuleType:
    """Import a module with ``python_path`` ahead of ``sys.path``; the path stays, for imports at run time."""
    top = name.partition(".")[0]
    folders = [Path(folder) for folder in python_path]
    for folder in folders:
        if not folder.is_dir():
            raise ModelError(
                f"model.python_path: {folder} is not a folder", "name the folder that holds the factory's module"
            )
    home = next((folder for folder in folders if (folder / top).is_dir() or (folder / f"{top}.py").is_file()), None)
    if home is not None and top in sys.modules and not _comes_from(sys.modules[top], home):
        if top not in _imported:
            raise ModelError(
                f"model.target: the module {top!r} in {home} is hidden by an installed module of the same name",
                "rename the file",
            )
        for loaded in [item for item in sys.modules if item == top or item.startswith(f"{top}.")]:
            del sys.modules[loaded]
    for folder in reversed(folders):
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            looked = f" in {', '.join(python_path)} or" if python_path else ""
            raise ModelError(
                f"model.target: there is no module {name!r}{looked} among the installed packages",
                "name its folder in model.python_path, or install it",
            ) from None
        raise ModelError(
            f"model.target: {name} imports {error.name!r}, which is not installed", "install it"
        ) from error
    except Exception as error:
        raise ModelError(f"model.target: importing {name!r} raised {short_reason(error)}", "mend the module") from error
    if home is not None:
        _imported[top] = home
    return module
