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
        self._spellings: dict[str, list[str]] | None = None
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

    def fits(self, shared: Tensors) -> bool:
        """Whether `load` can take other shared tensors without changing them: all are there, in the live form."""
        found = ((tensor, self._spelled(name, shared)) for name, tensor in self.live.items())
        return all(
            other is not None and (other.shape, other.dtype) == (tensor.shape, tensor.dtype) for tensor, other in found
        )

    @torch.no_grad()
    def load(self, shared: Tensors) -> None:
        """Copy other shared tensors in; of a tied tensor any of its names will do.

        Raises:
            KeyError: a tensor of ``live`` is missing.
        """
        for name, tensor in self.live.items():
            other = self._spelled(name, shared)
            if other is None:
                raise KeyError(name)
            tensor.copy_(other)

    def _spelled(self, name: str, shared: Tensors) -> torch.Tensor | None:
        """A live tensor's counterpart, under whichever of its names it is there."""
        if name in shared:
            return shared[name]
        if self._spellings is None:
            _, _, tied = state_names(next(iter(self._modules.values())))
            self._spellings = {}
            for alias, of in tied.items():
                self._spellings.setdefault(of, []).append(alias)
        return next((shared[alias] for alias in self._spellings.get(name, []) if alias in shared), None)


def _share(module: nn.Module, live: Tensors) -> None:
    """Make a module run on the memory of the live tensors instead of its own copies."""
    _, _, tied = state_names(module)
    for name, own in module.state_dict(keep_vars=True).items():
        tensor = live.get(tied.get(name, name))
        if tensor is not None:
            # The storage and not the object, so that every reference to it in the module follows.
            own.data = tensor.data
