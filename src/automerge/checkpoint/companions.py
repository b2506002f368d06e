"""The files beside the weights that make a folder loadable by the transformers library."""

import fnmatch
from pathlib import Path

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
)
"""Files that ``from_pretrained`` of a model, tokenizer or processor reads beside the weights."""


def companion_files(path: Path, *, code: bool = False) -> list[Path]:
    """Configuration, tokenizer and processor files of a checkpoint, sorted.

    Args:
        path: its folder, or a weight file in it.
        code: also its Python files.
    """
    folder = path if path.is_dir() else path.parent
    patterns = (*COMPANIONS, "*.py") if code else COMPANIONS
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
    )
