"""Opening a checkpoint of any format, lazily."""

from pathlib import Path

from automerge.checkpoint.adapter import Adapter
from automerge.checkpoint.checkpoint import Checkpoint
from automerge.checkpoint.files import open_files
from automerge.checkpoint.layout import Layout, find_layout, kind_of
from automerge.errors import CheckpointError


def open_checkpoint(path: Path, base: Checkpoint | None = None) -> Checkpoint:
    """Open a weight file or a folder of weights; see :func:`~automerge.checkpoint.layout.find_layout` for folders.

    PyTorch files hold a state dict, bare or under ``state_dict`` or ``model``, and are only ever read with
    ``weights_only=True``: code in a pickle is refused, never run.

    Args:
        path: the file or folder.
        base: what a LoRA adapter was trained on; not used for the weights of a model.

    Raises:
        CheckpointError: there are no weights, it is not clear which files they are, or a file is damaged, unsafe or
            of an unknown format; an adapter without a base.
    """
    if path.is_dir():
        folder = path
        names = {entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()}
        layout = find_layout(names, lambda name: (path / name).read_bytes(), str(path))
    elif path.is_file():
        folder = path.parent
        layout = Layout(kind_of(path.name, str(path)), (path.name,))
    else:
        raise CheckpointError(f"{path}: no such file or folder", "check the path")
    if not layout.is_adapter:
        return open_files(path, folder, layout)
    if base is None:
        raise CheckpointError(f"{path}: a LoRA adapter, which means nothing without its base", "name the base")
    return Adapter(path, folder, layout, base)
