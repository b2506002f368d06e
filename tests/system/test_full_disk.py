"""A disk without room (a small file system in memory): one sentence, nothing is left, and no work was wasted."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

AUTOMERGE = Path(sys.executable).with_name("automerge")

pytestmark = pytest.mark.system


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 20])
def test_a_full_disk(small_disk: Path, tmp_path: Path, shard_bytes: int) -> None:
    for name, value in (("a", 1.0), ("b", 3.0)):
        state = {f"layer{index}": torch.full((256, 1024), value) for index in range(4)}
        save_file(state, tmp_path / f"{name}.safetensors")
    inputs = [part for name in "ab" for part in ("--source", f"{name}={tmp_path / name}.safetensors")]
    options = ["--output", small_disk / "out", "--max-shard-bytes", str(shard_bytes)]
    done = subprocess.run(
        [AUTOMERGE, "apply", "--technique", "linear", *inputs, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"error: {small_disk}/out: the checkpoint cannot be written (No space left on device);")
    assert "bytes" in sentence
    assert not list(small_disk.iterdir())
