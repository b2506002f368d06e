"""Do the checkpoints of a merge fit together? Answered from dtype and shape alone, so before any large download."""

import fnmatch
from collections.abc import Mapping, Sequence

from automerge.checkpoint.info import TensorInfo
from automerge.errors import CheckpointError

# Enough to see a pattern (a whole layer, a head) and short enough for a terminal.
_SHOWN = 10


def check_compatibility(
    reference: Mapping[str, TensorInfo],
    others: Mapping[str, Mapping[str, TensorInfo]],
    reference_label: str,
    private: Sequence[str] = (),
    *,
    allow_mixed_floats: bool = False,
) -> None:
    """Check that every checkpoint has the same tensors as the reference, private parameters aside.

    Args:
        reference: the tensors that the others must have.
        others: the tensors of each other checkpoint, by its label in the spec.
        reference_label: the label of the reference.
        private: glob patterns (``*``, ``?``, ``[...]``; case-sensitive) of the names of private parameters.
        allow_mixed_floats: accept two floating-point dtypes for one tensor.

    Raises:
        CheckpointError: a tensor is missing, extra, or has another shape or dtype; names the first ten of each kind
            per checkpoint and says how many there are.
    """
    expected = _shared(reference, private)
    problems = []
    for label, tensors in others.items():
        found = _shared(tensors, private)
        missing = [f"{name} is missing" for name in sorted(expected) if name not in found]
        extra = [f"{name} is not in {reference_label!r}" for name in sorted(found) if name not in expected]
        shapes, dtypes = [], []
        for name in sorted(expected):
            if name not in found:
                continue
            want, have = expected[name], found[name]
            if have.shape != want.shape:
                shapes.append(f"{name} has shape {list(have.shape)}, expected {list(want.shape)}")
            elif have.dtype != want.dtype and not (
                allow_mixed_floats and have.is_floating_point and want.is_floating_point
            ):
                dtypes.append(f"{name} has dtype {have.dtype}, expected {want.dtype}")
        count = len(missing) + len(extra) + len(shapes) + len(dtypes)
        if count:
            parts = [
                *_first(missing, "missing"),
                *_first(extra, "extra"),
                *_first(shapes, "of another shape"),
                *_first(dtypes, "of another dtype"),
            ]
            problems.append(
                f"checkpoint {label!r} does not fit {reference_label!r}: {count} tensor{'s' if count > 1 else ''}: "
                + "; ".join(parts)
            )
    if problems:
        raise CheckpointError(
            ". ".join(problems),
            "merge checkpoints of one architecture, and declare what only one of them has in this form as private "
            "parameters",
        )


def _shared(tensors: Mapping[str, TensorInfo], private: Sequence[str]) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in tensors.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in private)
    }


def _first(problems: list[str], kind: str) -> list[str]:
    rest = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"and {rest} more {kind}"] if rest > 0 else problems
