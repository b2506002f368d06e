"""A convolutional network with BatchNorm, and two specialists of it whose data lie apart: one's are darker.

Each of four classes is a pattern of 6x6 pixels under noise. ``dark`` goes on from the base with the classes 0 and 1,
``bright`` with 2 and 3.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from automerge.spec import Spec

SIDE = 6
TASKS = {"dark": (0, 1), "bright": (2, 3)}
OFFSETS = {"dark": -3.0, "bright": 3.0}


class NormNet(nn.Module):
    """Images [n, 1, 6, 6] in, logits [n, 4] out; BatchNorm of maps, then of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.hidden = nn.Linear(8 * (SIDE - 4) ** 2, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 4]."""
        logits: Tensor = self.head(torch.relu(self.norm(self.hidden(self.features(images).flatten(1)))))
        return logits


def build() -> NormNet:
    """The spec's factory."""
    return NormNet()


def write(folder: Path) -> None:
    """Train base and specialists, and write checkpoints and data into ``folder``."""
    tensors: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patterns = torch.randn(4, 1, SIDE, SIDE)

        def samples(task: str, count: int) -> dict[str, Tensor]:
            labels = torch.tensor(TASKS[task]).repeat(count // 2)
            noise = torch.randn(count, 1, SIDE, SIDE)
            return {"inputs": patterns[labels] + noise + OFFSETS[task], "labels": labels}

        both = [samples(task, 200) for task in TASKS]
        base = trained(build(), {name: torch.cat([each[name] for each in both]) for name in both[0]}, 40)
        tensors["base"] = dict(base.state_dict())
        for task in TASKS:
            specialist = build()
            specialist.load_state_dict(base.state_dict())
            tensors[task] = dict(trained(specialist, samples(task, 200), 80).state_dict())
            for split in ("validation", "test"):
                tensors[f"{task}-{split}"] = samples(task, 120)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")


def spec_of(folder: Path, **changes: Any) -> Spec:
    """The spec of what `write` wrote."""
    return Spec.model_validate(
        {
            "name": "norms",
            "model": {"kind": "factory", "target": "batchnorm:build", "python_path": [str(Path(__file__).parent)]},
            "base": {"uri": str(folder / "base.safetensors")},
            "sources": [{"name": name, "uri": str(folder / f"{name}.safetensors")} for name in TASKS],
            "tasks": [
                {
                    "name": name,
                    "kind": "classification",
                    "specialist": name,
                    "validation": str(folder / f"{name}-validation.safetensors"),
                    "test": str(folder / f"{name}-test.safetensors"),
                }
                for name in TASKS
            ],
            "search": {"trials": 8, "initial": 3, "split": None, "refine": None},
            "evaluation": {"resamples": 100, "onnx": False},
            "registry": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
            "compute": {"device": "cpu", "threads": 1},
            **changes,
        }
    )


def trained(model: NormNet, data: dict[str, Tensor], steps: int) -> NormNet:
    """The model after some steps on all data at once, its running statistics with it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data["inputs"]), data["labels"]).backward()
        optimizer.step()
    return model.eval()
