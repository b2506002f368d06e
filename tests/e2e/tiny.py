"""The smallest real job: a network of a few hundred parameters, its base and two specialists, trained in a second.

Each of four classes is a pattern of 6x6 pixels under noise. The base learns all four; ``left`` goes on with the classes
0 and 1, ``right`` with 2 and 3.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from automerge.spec import Spec

CLASSES = 4
SIDE = 6
NOISE = 1.5  # the base is right in 95 of 100 cases, a specialist in 99 of its own and in 20 of the other's
TASKS = {"left": (0, 1), "right": (2, 3)}


class TinyNet(nn.Module):
    """A convolution, then a linear head: two blocks. Images [n, 1, 6, 6] in, logits [n, 4] out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.head = nn.Linear(6 * (SIDE - 2) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 4]."""
        logits: Tensor = self.head(torch.relu(self.conv(images)).flatten(1))
        return logits


def build() -> TinyNet:
    """The spec's factory."""
    return TinyNet()


@dataclass(frozen=True)
class TinyPair:
    """Files of ``folder``: checkpoints ``<name>.safetensors`` and data ``<task>-<split>.safetensors``."""

    folder: Path
    keys: list[str]


def prepare(folder: Path, seed: int = 0) -> TinyPair:
    """Train and write everything; the same seed gives the same weights on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patterns = torch.randn(CLASSES, 1, SIDE, SIDE)
        base = _trained(build(), *_samples(patterns, range(CLASSES), 240), steps=60)
        states = {"base": base.state_dict()}
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, classes in TASKS.items():
            specialist = build()
            specialist.load_state_dict(base.state_dict())
            states[name] = _trained(specialist, *_samples(patterns, classes, 400), steps=100).state_dict()
            for split, count in (("validation", 100), ("test", 400)):
                inputs, labels = _samples(patterns, classes, count)
                tensors[f"{name}-{split}.safetensors"] = {"inputs": inputs, "labels": labels}
    tensors |= {f"{name}.safetensors": dict(state) for name, state in states.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in tensors.items():
        save_file(content, folder / key)
    return TinyPair(folder, sorted(tensors))


def tiny_spec(root: str, registry: str, **changes: Any) -> Spec:
    """The spec of the pair below ``root`` (a URI or a folder), to be registered at ``registry``."""
    return Spec.model_validate(
        {
            "name": "tiny",
            "model": {"kind": "factory", "target": "tiny:build", "python_path": [str(Path(__file__).parent)]},
            "base": {"uri": f"{root}/base.safetensors"},
            "sources": [{"name": name, "uri": f"{root}/{name}.safetensors"} for name in TASKS],
            "tasks": [
                {
                    "name": name,
                    "kind": "classification",
                    "specialist": name,
                    "validation": f"{root}/{name}-validation.safetensors",
                    "test": f"{root}/{name}-test.safetensors",
                }
                for name in TASKS
            ],
            "search": {"trials": 8, "initial": 4, "seed": 0},
            "evaluation": {"resamples": 200},
            "registry": {"uri": registry},
            "compute": {"device": "cpu", "threads": 1},
            **changes,
        }
    )


def _samples(patterns: Tensor, classes: range | tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """``count`` images float32 [n, 1, 6, 6] and labels int64 [n], the classes in turn."""
    labels = torch.tensor(classes).repeat(count // len(classes))
    return patterns[labels] + NOISE * torch.randn(len(labels), 1, SIDE, SIDE), labels


def _trained(model: TinyNet, inputs: Tensor, labels: Tensor, steps: int) -> TinyNet:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
    return model
