"""Digests of checkpoints: what a recipe or a registry names its inputs by."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from automerge.errors import CheckpointError


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, streamed.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})", "check the path") from None


def checkpoint_digest(digests: Mapping[str, str]) -> str:
    """Digest (hex) of a checkpoint from the sha256 of each of its weight files by relative name.

    One file: its own sha256, under whatever name. Several: the sha256 of the lines ``<sha256>  <name>``, sorted by
    name, as ``sha256sum`` would print them.
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
