"""Do rows of the same number mean the same token? Embeddings are merged by number, and tokenizers give the numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from automerge.errors import CheckpointError


def check_added_tokens(folders: Mapping[str, Path], first: int, rows: int) -> None:
    """Refuse two checkpoints that give one number to different tokens, among those that not every checkpoint has.

    Checkpoints without a ``tokenizer.json`` are taken at their word.

    Args:
        folders: where each checkpoint's tokenizer is, by name.
        first: the smallest number of rows of any checkpoint.
        rows: that of the merged one.

    Raises:
        CheckpointError: two differ; or a tokenizer cannot be read.
    """
    seen: dict[int, tuple[str, str]] = {}
    for owner, folder in folders.items():
        path = folder / "tokenizer.json"
        for number, token in sorted(_tokens(path).items()) if path.is_file() else []:
            if not first <= number < rows:
                continue
            other, meaning = seen.setdefault(number, (owner, token))
            if meaning != token:
                raise CheckpointError(
                    f"token {number} is {meaning!r} in {other!r} and {token!r} in {owner!r}, so their embeddings "
                    "would be averaged",
                    "number the added tokens alike, or keep the base's by merge.vocabulary: base",
                )


def _tokens(path: Path) -> dict[int, str]:
    """Token by number, of a file of the tokenizers library."""
    try:
        content: Any = json.loads(path.read_bytes())
        model = content.get("model") or {}
        vocabulary = model.get("vocab") or {}
        # A list of tokens with their scores, or a map from token to number.
        pairs = enumerate(entry[0] for entry in vocabulary) if isinstance(vocabulary, list) else None
        tokens = dict(pairs) if pairs is not None else {number: token for token, number in vocabulary.items()}
        return tokens | {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: not a readable tokenizer file", "get it again from where it came") from None
