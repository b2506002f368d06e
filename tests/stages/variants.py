"""Small merges of other forms than a pair with one head: heads of their own, three sources, a guard task, no base.

Every class is a pattern of 6x6 pixels under noise. A group is the classes of one source.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from automerge.spec import Spec

SIDE = 6
Groups = Mapping[str, Sequence[int]]
PAIR: Groups = {"left": (0, 1), "right": (2, 3, 4)}
TRIPLE: Groups = {"red": (0, 1), "green": (2, 3), "blue": (4, 5)}


class Net(nn.Module):
    """Images [n, 1, 6, 6] in, logits [n, classes] out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(6 * (SIDE - 2) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.conv(images)).flatten(1))
        return logits


class FragileNet(Net):
    """Fails on images with a pixel above ``limit``; ``ballast`` changes nothing, and overflows where it is doubled."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.limit = nn.Parameter(torch.zeros(4))
        self.ballast = nn.Parameter(torch.zeros(32))

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images) + 0 * self.ballast[0]
        return logits.masked_fill(images.flatten(1).amax(1, keepdim=True) > self.limit.mean(), float("nan"))


class TrapNet(Net):
    """Goes wrong in one of four ways where its parameter ``trap`` has a certain value; each time it says so in a file.

    The base has 0 there, the first source 1 and the others 0: by task arithmetic it is the first source's weight.
    """

    def __init__(self, classes: int, said: str) -> None:
        super().__init__(classes)
        self.said = said
        self.trap = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        try:
            value = float(self.trap.detach())
        except RuntimeError:  # of a tensor without values: the model is traced
            value = 0.0
        trap = next((name for name, place in TRAPS.items() if abs(value - place) < 1e-6), None)
        if trap is None:
            return super().forward(images)
        with Path(self.said).open("a") as file:
            file.write(f"{trap}\n")
        if trap == "raise":
            raise RuntimeError("trapped")
        if trap == "memory":
            raise MemoryError
        if trap == "hang":
            time.sleep(600)
        return super().forward(images) * float("nan")


TRAPS = {"raise": 0.11, "nan": 0.12, "memory": 0.13, "hang": 0.14}
"""The values of ``trap`` that are traps."""


class DetachedNet(Net):
    """Runs, and has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


def build_trap(classes: int, said: str) -> Net:
    """The factory of `TrapNet`."""
    return TrapNet(classes, said)


def build_detached(classes: int) -> Net:
    """The factory of `DetachedNet`."""
    return DetachedNet(classes)


def build(classes: int) -> Net:
    """The spec's factory."""
    return Net(classes)


def build_fragile(classes: int) -> Net:
    """The factory of `FragileNet`."""
    return FragileNet(classes)


def write(folder: Path, groups: Groups, *, own_heads: bool = False) -> None:
    """Train a base on all classes and a specialist on each group, and write checkpoints and data into ``folder``.

    With ``own_heads`` each source numbers its classes from 0 and has a head of that size.
    """
    classes = [label for group in groups.values() for label in group]
    tensors: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patterns = torch.randn(len(classes), 1, SIDE, SIDE)

        def samples(group: Sequence[int], count: int, renumber: bool) -> dict[str, Tensor]:
            labels = torch.tensor(list(group)).repeat(count // len(group))
            inputs = patterns[labels] + torch.randn(len(labels), 1, SIDE, SIDE)
            return {"inputs": inputs, "labels": labels - group[0] if renumber else labels}

        base = _trained(Net(len(classes)), samples(classes, 240, False), steps=60)
        tensors["base"] = dict(base.state_dict())
        everything = {"all": tuple(classes), **groups}
        for name, group in everything.items():
            renumber = own_heads and name != "all"
            if name != "all":
                specialist = Net(len(group) if renumber else len(classes))
                state = base.state_dict()
                shared = {key: value for key, value in state.items() if not (renumber and key.startswith("head."))}
                specialist.load_state_dict({**specialist.state_dict(), **shared})
                tensors[name] = dict(_trained(specialist, samples(group, 240, renumber), steps=60).state_dict())
            for split, count in (("validation", 60), ("test", 120)):
                tensors[f"{name}-{split}"] = samples(group, count, renumber)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")


def spec_of(folder: Path, groups: Groups, *, own_heads: bool = False, guard: bool = False, **changes: Any) -> Spec:
    """The spec of what `write` wrote."""
    classes = sum(len(group) for group in groups.values())
    tasks = [{"name": name, "specialist": name} for name in groups]
    if guard:
        tasks.append({"name": "all", "guard": True})  # type: ignore[dict-item]
    return Spec.model_validate(
        {
            "name": "variant",
            "model": {
                "kind": "factory",
                "target": "variants:build",
                "python_path": [str(Path(__file__).parent)],
                "arguments": {"classes": classes},
            },
            "base": {"uri": str(folder / "base.safetensors")},
            "sources": [
                {
                    "name": name,
                    "uri": str(folder / f"{name}.safetensors"),
                    "arguments": {"classes": len(group)} if own_heads else {},
                }
                for name, group in groups.items()
            ],
            "tasks": [
                {
                    **task,
                    "kind": "classification",
                    "validation": str(folder / f"{task['name']}-validation.safetensors"),
                    "test": str(folder / f"{task['name']}-test.safetensors"),
                }
                for task in tasks
            ],
            "private": ["head.*"] if own_heads else [],
            "search": {"trials": 8, "initial": 3, "split": None, "refine": None},
            "evaluation": {"resamples": 100, "onnx": False},
            "registry": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
            "compute": {"device": "cpu", "threads": 1},
            **changes,
        }
    )


def _trained(model: Net, data: dict[str, Tensor], steps: int) -> Net:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data["inputs"]), data["labels"]).backward()
        optimizer.step()
    return model
