"""Digests agree with the tools that a user has at hand."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from automerge.checkpoint import checkpoint_digest, sha256_file
from automerge.errors import CheckpointError


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_digest_of_several_files_is_what_sha256sum_says(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    digests = {name: sha256_file(tmp_path / name) for name in ("b.safetensors", "a.safetensors")}
    listing = subprocess.run(["sha256sum", *sorted(digests)], cwd=tmp_path, check=True, capture_output=True).stdout
    assert checkpoint_digest(digests) == hashlib.sha256(listing).hexdigest()
    assert checkpoint_digest({"x": "1234"}) == "1234"


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        sha256_file(tmp_path / "absent")
