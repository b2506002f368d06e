"""What is known of a checkpoint before it is downloaded: dtypes and shapes, from the index and the headers alone."""

from collections.abc import Callable, Mapping

from automerge.checkpoint.adapter import plan_updates, read_config, updated_infos
from automerge.checkpoint.header import parse_header
from automerge.checkpoint.info import TensorInfo
from automerge.checkpoint.layout import ADAPTER_CONFIG, Layout, check_index, find_layout
from automerge.errors import CheckpointError

_GET = "get the adapter again from where it came"

# A configuration is read whole before anything else is known of it; a real one has a few kilobytes.
_MAX_CONFIG_BYTES = 10_000_000


def peek_tensors(
    sizes: Mapping[str, int],
    read: Callable[[str, int, int], bytes],
    where: str,
    base: Mapping[str, TensorInfo] | None = None,
) -> dict[str, TensorInfo] | None:
    """Read dtypes and shapes of a checkpoint that is not here yet, from the index and the headers alone.

    Args:
        sizes: bytes of every file of the folder by relative name, or of the one file.
        read: reads the bytes ``start`` to ``stop`` of a file: ``read(name, start, stop)``.
        where: names the checkpoint in errors.
        base: the base's tensors, where they are known; an adapter has those and its own.

    Returns:
        Dtype and shape by name, in sorted name order; None for PyTorch files, which have no header, and for an adapter
        whose base is not known.

    Raises:
        CheckpointError: as :func:`find_layout` and :func:`~automerge.checkpoint.header.parse_header`; an adapter that
            is not supported or does not fit the base.
    """
    layout = find_layout(sizes, lambda name: read(name, 0, sizes[name]), where)
    if layout.is_adapter:
        return _peek_adapter(layout, sizes, read, where, base)
    if layout.kind == "torch":
        return None
    headers = {
        file: parse_header(lambda start, stop, file=file: read(file, start, stop), sizes[file], f"{where}/{file}")  # type: ignore[misc]
        for file in layout.files
    }
    check_index(layout, {file: header.tensors for file, header in headers.items()}, where)
    tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
    return {name: tensors[name] for name in sorted(tensors)}


def _peek_adapter(
    layout: Layout,
    sizes: Mapping[str, int],
    read: Callable[[str, int, int], bytes],
    where: str,
    base: Mapping[str, TensorInfo] | None,
) -> dict[str, TensorInfo] | None:
    config_size = sizes[ADAPTER_CONFIG]
    if config_size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{where}/{ADAPTER_CONFIG}: has {config_size} bytes, which no configuration has", _GET)
    config = read_config(read(ADAPTER_CONFIG, 0, config_size), f"{where}/{ADAPTER_CONFIG}")
    if layout.kind == "torch" or base is None:
        return None
    weights = layout.files[1]
    header = parse_header(lambda start, stop: read(weights, start, stop), sizes[weights], f"{where}/{weights}")
    return updated_infos(plan_updates(config, header.tensors, base, where), header.tensors, base)
