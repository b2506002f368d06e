"""A spec as a pipeline argument."""

import json
import re

from automerge.errors import SpecError
from automerge.spec import Spec

# Linux limits one argument of a process to 128 KiB. The spec travels in one, as a JSON string inside JSON, together
# with the paths and the metadata of the task's artifacts, for which the rest is kept.
LONGEST_ARGUMENT = 128 * 1024
RESERVED = 16 * 1024


def spec_argument(spec: Spec) -> str:
    """The spec as one line of ASCII JSON that reaches a task unchanged, locally and on a cluster.

    The local runner replaces the text ``python3`` in arguments by the interpreter's path, and both engines take ``{{``
    for the beginning of a placeholder. Both can only stand inside JSON strings, where an escape says the same.

    Raises:
        SpecError: the spec is too large to be an argument.
    """
    text = json.dumps(spec.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=True)
    text = re.sub(r"\{(?=\{)", r"\\u007b", text.replace("python3", r"\u0070ython3"))
    size, limit = len(json.dumps(text)), LONGEST_ARGUMENT - RESERVED
    if size > limit:
        raise SpecError(
            f"spec: it takes {size:,} bytes as a pipeline argument, where {limit:,} fit",
            "shorten the longest part, e.g. write patterns in 'private' instead of every name",
        )
    return text
