"""One set of shared weights under several heads.

Private parameters are not merged: each task runs the shared weights under the private parameters of its reference. The
modules of all references hold the *same* shared tensors, so the memory is one model and its heads, and a merge written
into the shared tensors in place is seen under every head.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from automerge.models.state import load_state, state_names

Tensors = Mapping[str, torch.Tensor]


class Heads:
    """Runs shared weights under the head of any reference.

    Args:
        build: makes the module of a reference, with whatever weights, on the CPU.
        private: reference -> its private tensors by name; one reference or more.
        shared: the shared tensors by name; copied.
        device: where the modules run.

    Attributes:
        live: the shared tensors that all modules run on, by name, without the aliases of tied ones. Written in place
            (by a merge, or by `load`) they change the model under every head.

    Raises:
        ModelError: the tensors do not fit the module of a reference.
    """

    def __init__(
        self,
        build: Callable[[str], nn.Module],
        private: Mapping[str, Tensors],
        shared: Tensors,
        device: torch.device,
    ) -> None:
        self._modules: dict[str, nn.Module] = {}
        self.live: dict[str, torch.Tensor] = {}
        headless: nn.Module | None = None
        for reference, own in private.items():
            if not own and headless is not None:
                self._modules[reference] = headless
                continue
            module = build(reference).to(device).eval().requires_grad_(False)
            # Without the copies the live tensors would be the caller's own: load_state takes what it is given.
            load_state(
                module,
                {**{name: tensor.clone() for name, tensor in shared.items()}, **own},
                where=f"the model under the head of {reference!r}",
            )
            if not self.live:
                state = module.state_dict(keep_vars=True)
                names = state_names(module)
                self.live = {name: state[name] for name in [*names.parameters, *names.buffers] if name not in own}
            else:
                _share(module, self.live)
            self._modules[reference] = module
            if not own:
                headless = module

    def module(self, reference: str) -> nn.Module:
        """The module whose head is that of ``reference``."""
        return self._modules[reference]

    @torch.no_grad()
    def load(self, shared: Tensors) -> None:
        """Copy other shared tensors in; of a tied tensor any of its names will do.

        Raises:
            KeyError: a tensor of ``live`` is missing.
        """
        _, _, tied = state_names(next(iter(self._modules.values())))
        spellings: dict[str, list[str]] = {}
        for alias, name in tied.items():
            spellings.setdefault(name, []).append(alias)
        for name, tensor in self.live.items():
            found = next((spelling for spelling in (name, *spellings.get(name, [])) if spelling in shared), name)
            tensor.copy_(shared[found])


def _share(module: nn.Module, live: Tensors) -> None:
    """Make a module run on the memory of the live tensors instead of its own copies."""
    _, _, tied = state_names(module)
    for name, own in module.state_dict(keep_vars=True).items():
        tensor = live.get(tied.get(name, name))
        if tensor is not None:
            # The storage and not the object, so that every reference to it in the module follows.
            own.data = tensor.data
