"""The engine against mergekit 0.1.5, alternately: wall, processor time and peak memory of whole processes, and ratios.

Run by ``make benchmark-merge``, or ``python -m benchmarks.merge --help``. The page cache is warm for both. Ours is
``automerge apply --no-verify``: mergekit checks no digests either; the row "verified" is what checking them costs more.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from automerge.stages.apply import recipe_of_technique
from benchmarks.merge import checkpoints
from benchmarks.merge.measure import Cost, median, run

TECHNIQUES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
WEIGHTS = {"a": 0.3, "b": 0.7}
DENSITY = 0.5

_FLOOR = Path(__file__).with_name("io_floor.py")


@dataclass(frozen=True)
class Bench:
    """Where everything lies."""

    place: Path
    work: Path
    automerge: Path
    mergekit: Path

    def ours(self, technique: str, *options: str) -> Cost:
        """One merge by `automerge apply`."""
        command: list[str | Path] = [
            self.automerge,
            "apply",
            "--recipe",
            self.recipe(technique),
            "--base",
            self.place / "base",
        ]
        sources = [part for name in WEIGHTS for part in ("--source", f"{name}={self.place / name}")]
        output = self.fresh("ours")
        return run([*command, *sources, "--output", output, *options], self.work / f"ours-{technique}.log")

    def theirs(self, technique: str) -> Cost:
        """One merge by `mergekit-yaml`."""
        models = [
            {"model": str(self.place / name), "parameters": self._parameters(technique, name)} for name in WEIGHTS
        ]
        config: dict[str, object] = {"merge_method": technique, "models": models, "dtype": self.dtype}
        if technique != "linear":
            config["base_model"] = str(self.place / "base")
        path = self.work / f"{technique}.mergekit.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        output = self.fresh("theirs")
        return run([self.mergekit, path, output, *MERGEKIT_OPTIONS], self.work / f"theirs-{technique}.log")

    def startup(self) -> Cost:
        """Merging next to nothing."""
        tiny = self.work / "tiny.safetensors"
        save_file({"w": torch.ones(8)}, tiny)
        inputs: list[str | Path] = ["--base", tiny, "--source", f"a={tiny}"]
        command: list[str | Path] = [self.automerge, "apply", "--technique", "ties", *inputs]
        return run([*command, "--output", self.fresh("tiny"), "--no-verify"], self.work / "tiny.log")

    def floor(self, technique: str) -> Cost:
        """Reading what the technique reads, and writing the result."""
        names = [*WEIGHTS, *([] if technique == "linear" else ["base"])]
        files = [self.place / name / "model.safetensors" for name in names]
        output = self.fresh("floor") / "model.safetensors"
        return run([sys.executable, _FLOOR, output, str(files[0].stat().st_size), *files], self.work / "floor.log")

    def recipe(self, technique: str) -> Path:
        """The recipe of one technique for the whole model; with the inputs' digests."""
        path = self.work / f"{self.place.name}-{technique}.recipe.json"
        if not path.exists():
            values = {"density": DENSITY} if technique not in ("linear", "task_arithmetic") else {}
            sources = {name: self.place / name for name in WEIGHTS}
            recipe_of_technique(technique, self.place / "base", sources, WEIGHTS, hyperparameters=values).write(path)
        return path

    def fresh(self, name: str) -> Path:
        """An empty folder for an output."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    @property
    def dtype(self) -> str:
        return self.place.name.partition("-")[0]

    def _parameters(self, technique: str, name: str) -> dict[str, float]:
        density = {"density": DENSITY} if technique not in ("linear", "task_arithmetic") else {}
        return {"weight": WEIGHTS[name], **density}


MERGEKIT_OPTIONS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=9, help="9 are 537 M parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--technique", choices=TECHNIQUES, nargs="+", default=list(TECHNIQUES))
    parser.add_argument("--work", type=Path, default=Path(".benchmark"), help="some GB are written here")
    parser.add_argument("--mergekit", type=Path, default=Path(".venv-mergekit/bin/mergekit-yaml"))
    parser.add_argument(
        "--larger", type=int, default=4, help="also measure ours on a model so many times as deep; 0: no"
    )
    arguments = parser.parse_args()
    if not arguments.mergekit.exists():
        sys.exit(f"error: {arguments.mergekit} is not there; `make benchmark-merge` installs it")
    automerge = Path(sys.executable).with_name("automerge")
    console = Console()
    for dtype in arguments.dtype:
        work = arguments.work / dtype
        work.mkdir(parents=True, exist_ok=True)
        for stale in work.glob("*.recipe.json"):
            stale.unlink()  # of other checkpoints
        place = checkpoints.make(arguments.work / "checkpoints", dtype, arguments.layers)
        bench = Bench(place.resolve(), work.resolve(), automerge.absolute(), arguments.mergekit.absolute())
        compare(bench, arguments.technique, arguments.rounds, console)
        if arguments.larger:
            deep = checkpoints.make(arguments.work / "checkpoints", dtype, arguments.layers * arguments.larger)
            memory(
                arguments.technique,
                bench,
                Bench(deep.resolve(), (work / "larger").resolve(), bench.automerge, bench.mergekit),
                console,
            )


def compare(bench: Bench, techniques: list[str], rounds: int, console: Console) -> None:
    """Alternate, technique by technique, and print the medians."""
    startup = median([bench.startup() for _ in range(rounds)])
    table = Table(title=f"{bench.dtype}, medians of {rounds} rounds", title_justify="left")
    for column in ("technique", "", "CPU s", "wall s", "peak MB"):
        table.add_column(column, justify="left" if column in ("technique", "") else "right")
    for technique in techniques:
        bench.recipe(technique)
        ours, theirs, floors, verified = [], [], [], []
        for _ in range(rounds):
            ours.append(bench.ours(technique, "--no-verify"))
            theirs.append(bench.theirs(technique))
            floors.append(bench.floor(technique))
            verified.append(bench.ours(technique))
        mine, other, floor, checked = median(ours), median(theirs), median(floors), median(verified)
        for label, cost in (("AutoMerge", mine), ("  verified", checked), ("mergekit", other), ("I/O floor", floor)):
            name = technique if label == "AutoMerge" else ""
            table.add_row(name, label, f"{cost.cpu:.2f}", f"{cost.wall:.2f}", f"{cost.peak / 1e6:.0f}")
        phase = (mine.cpu - startup.cpu) / floor.cpu
        table.add_row(
            "",
            "[bold]mergekit / AutoMerge[/bold]",
            f"[bold]{other.cpu / mine.cpu:.1f}x[/bold]",
            f"[bold]{other.wall / mine.wall:.1f}x[/bold]",
            f"[bold]{other.peak / mine.peak:.1f}x[/bold]",
        )
        table.add_row("", f"merge phase {phase:.2f}x of the floor", "", "", "", end_section=True)
    console.print(table)
    console.print(f"start-up: {startup.cpu:.2f} s CPU")


def memory(techniques: list[str], small: Bench, large: Bench, console: Console) -> None:
    """Ours on a deeper model: the peak must not grow."""
    large.work.mkdir(parents=True, exist_ok=True)
    for technique in techniques:
        peaks = [bench.ours(technique, "--no-verify").peak / 1e6 for bench in (small, large)]
        console.print(
            f"{small.dtype} {technique}: peak {peaks[0]:.0f} MB, on {large.place.name} {peaks[1]:.0f} MB "
            f"({peaks[1] / peaks[0]:.2f}x)"
        )
    shutil.rmtree(large.work)


if __name__ == "__main__":
    main()
