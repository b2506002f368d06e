"""Weights on disk: open, validate, compare, digest, write."""

from automerge.checkpoint.checkpoint import Checkpoint, Extent
from automerge.checkpoint.compatibility import check_compatibility
from automerge.checkpoint.digest import checkpoint_digest, sha256_file
from automerge.checkpoint.header import Header, parse_header, read_header
from automerge.checkpoint.info import TensorInfo, info_of
from automerge.checkpoint.open import open_checkpoint
from automerge.checkpoint.peek import peek_tensors
from automerge.checkpoint.write import MAX_SHARD_BYTES, CheckpointWriter

__all__ = [
    "MAX_SHARD_BYTES",
    "Checkpoint",
    "CheckpointWriter",
    "Extent",
    "Header",
    "TensorInfo",
    "check_compatibility",
    "checkpoint_digest",
    "info_of",
    "open_checkpoint",
    "parse_header",
    "peek_tensors",
    "read_header",
    "sha256_file",
]
