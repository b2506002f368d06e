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
    tied: Mapping[str, str] | None = {},
    allow_mixed_floats: bool = False,
    vocabulary: Sequence[str] | None = (),
) -> None:
    """Check that every checkpoint has the same tensors as the reference, private parameters aside.

    Args:
        reference: the tensors that the others must have.
        others: the tensors of each other checkpoint, by its label in the spec.
        reference_label: the label of the reference.
        private: glob patterns (``*``, ``?``, ``[...]``; case-sensitive) of the names of private parameters.
        tied: further name of a tied tensor -> the name to know it by; a checkpoint may store any of them. None where
            that is not known yet: a name that one side lacks is then let pass if that side has another tensor of its
            dtype and shape, with which it may be tied.
        allow_mixed_floats: accept two floating-point dtypes for one tensor.
        vocabulary: names of the tensors that may differ in their first dimension; None where they are not known yet:
            then any may.

    Raises:
        CheckpointError: a tensor is missing, extra, or has another shape or dtype; names the first ten of each kind
            per checkpoint and says how many there are.
    """
    expected = _untied(shared_tensors(reference, private), tied)
    problems = []
    rows_differ = False
    for label, tensors in others.items():
        found = _untied(shared_tensors(tensors, private), tied)
        missing = [f"{name} is missing" for name in _lacking(found, expected, tied, vocabulary)]
        extra = [f"{name} is not in {reference_label!r}" for name in _lacking(expected, found, tied, vocabulary)]
        shapes, dtypes = [], []
        for name in sorted(expected):
            if name not in found:
                continue
            want, have = expected[name], found[name]
            same_rows = have.shape[1:] == want.shape[1:] and len(have.shape) == len(want.shape)
            if have.shape != want.shape and not (same_rows and (vocabulary is None or name in vocabulary)):
                rows_differ |= same_rows and len(have.shape) == 2
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
        remedy = (
            "merge checkpoints of one architecture, and declare what only one of them has in this form as private "
            "parameters"
        )
        if rows_differ:
            remedy += "; where tokens were added, say with merge.vocabulary how many rows to keep"
        raise CheckpointError(". ".join(problems), remedy)


def shared_tensors(tensors: Mapping[str, TensorInfo], private: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint that are not private; ``private`` as of :func:`check_compatibility`."""
    return {
        name: info
        for name, info in tensors.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in private)
    }


def _untied(tensors: Mapping[str, TensorInfo], tied: Mapping[str, str] | None) -> dict[str, TensorInfo]:
    """Every tied tensor once, by the name to know it by."""
    if not tied:
        return dict(tensors)
    # Where a checkpoint has that name and a further one, the info is that of the name itself.
    ordered = sorted(tensors, key=lambda name: (name not in tied, name))
    return {tied.get(name, name): tensors[name] for name in ordered}


def _lacking(
    tensors: Mapping[str, TensorInfo],
    wanted: Mapping[str, TensorInfo],
    tied: Mapping[str, str] | None,
    vocabulary: Sequence[str] | None,
) -> list[str]:
    """The wanted names that are not among the tensors, sorted; without those that a tie may explain."""

    def form(info: TensorInfo) -> TensorInfo:
        return TensorInfo(info.dtype, info.shape[1:]) if vocabulary is None and info.shape else info

    forms = {form(info) for info in tensors.values()} if tied is None else set()
    return [name for name in sorted(wanted) if name not in tensors and form(wanted[name]) not in forms]


def _first(problems: list[str], kind: str) -> list[str]:
    rest = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"and {rest} more {kind}"] if rest > 0 else problems
