"""Do rows of the same number mean the same token? Embeddings are merged by number, and tokenizers give the numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from automerge.errors import CheckpointError


def check_added_tokens(folders: Mapping[str, Path], first: int, rows: int) -> None:
    """Refuse two checkpoints that give one number to different tokens, among those that not every checkpoint has.

    Numbers are compared from the first one on that some checkpoint has no row for, or a row and no token: embeddings
    are often padded. Checkpoints without a ``tokenizer.json`` are taken at their word.

    Args:
        folders: where each checkpoint's tokenizer is, by name.
        first: the smallest number of rows of any checkpoint.
        rows: that of the merged one.

    Raises:
        CheckpointError: two differ; or a tokenizer cannot be read.
    """
    paths = {owner: folder / "tokenizer.json" for owner, folder in folders.items()}
    tokens = {owner: _tokens(path) for owner, path in paths.items() if path.is_file()}
    first = min([first, *(max(own) + 1 for own in tokens.values() if own)])
    seen: dict[int, tuple[str, str]] = {}
    for owner, own in tokens.items():
        for number, token in sorted(own.items()):
            if not first <= number < rows:
                continue
            other, meaning = seen.setdefault(number, (owner, token))
            if meaning != token:
                raise CheckpointError(
                    f"token {number} is {meaning!r} in {other!r} and {token!r} in {owner!r}, so their embeddings "
                    "would be averaged",
                    "number the added tokens alike, or cut them off by merge.vocabulary: base, if the base is smaller",
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
        tokens |= {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
        if not all(type(number) is int and isinstance(token, str) for number, token in tokens.items()):
            raise TypeError
        return tokens
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: not a readable tokenizer file", "get it again from where it came") from None
