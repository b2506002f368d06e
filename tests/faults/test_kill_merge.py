"""Merges that are killed while they write: no loader accepts what they leave, and the next merge cleans up."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.errors import CheckpointError

AUTOMERGE = Path(sys.executable).with_name("automerge")
TENSORS = 24
SHARD_BYTES = 5 << 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        state = {f"layer{index:02}": torch.randn(512, 1024, generator=generator) for index in range(TENSORS)}
        save_file(state, folder / f"{name}.safetensors")
    return folder


def command(sources: Path, output: Path) -> list[str]:
    inputs = [part for name in "ab" for part in ("--source", f"{name}={sources / name}.safetensors")]
    sizes = ["--max-shard-bytes", str(SHARD_BYTES)]
    return [str(AUTOMERGE), "apply", "--technique", "linear", "--no-verify", *inputs, *sizes, "--output", str(output)]


def accepted(folder: Path) -> bool:
    """Whether a loader of checkpoints takes the folder for one."""
    try:
        with open_checkpoint(folder):
            return True
    except CheckpointError:
        return False


def killed_when(sources: Path, output: Path, written: int) -> bool:
    """Start a merge, and kill it when so many bytes are there; whether it was still at work."""
    process = subprocess.Popen(command(sources, output), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        sizes = [path.stat().st_blocks * 512 for path in output.glob(".model*")] if output.exists() else []
        if len(sizes) > written:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait(timeout=60)
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("written", [0, 3, 8])
def test_kill_9_while_writing(sources: Path, tmp_path: Path, written: int) -> None:
    output = tmp_path / "out"
    assert killed_when(sources, output, written), "the merge ended before it could be killed"
    leftovers = list(output.iterdir())
    assert leftovers
    assert not accepted(output)
    # Temporary names; or, where the kill met the renaming, shards that no index names.
    assert not (output / "model.safetensors.index.json").exists()
    assert all(re.fullmatch(r"\.model-.*\.tmp|model-\d+-of-\d+\.safetensors", path.name) for path in leftovers)

    done = subprocess.run(command(sources, output), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert accepted(output)
    assert not list(output.glob(".*"))
    with open_checkpoint(output) as merged:
        assert len(merged.tensors) == TENSORS


@pytest.mark.slow
def test_an_earlier_result_stays_whole_when_its_replacement_is_killed(sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    subprocess.run(command(sources, output), check=True, capture_output=True, timeout=120)
    with open_checkpoint(output) as checkpoint:
        before = checkpoint.digest()
    assert killed_when(sources, output, written=2)
    with open_checkpoint(output) as checkpoint:
        assert checkpoint.digest() == before
    for file in output.glob("model-*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                assert list(opened.keys())
        except SafetensorError as error:  # pragma: no cover - what must not happen
            pytest.fail(f"{file.name}: {error}")
