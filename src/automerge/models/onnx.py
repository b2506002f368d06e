"""ONNX: export a module with a dynamic batch, and check the file against torch."""

import contextlib
import importlib.util
import io
import itertools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from automerge.errors import AutoMergeError, MissingExtraError, ModelError
from automerge.models.architecture import Architecture, short_reason

MAX_INLINE_BYTES = 1_900_000_000
"""Weights above this go to a file of their own: a protobuf message holds at most 2 GiB, with the graph."""

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted difference to torch, in units of max(1, largest absolute logit), by the module's dtype.

Sums are taken in another order by another library: a float32 network of some tens of layers differs by about 1e-6, a
wrong graph by 1e-1 and more. For half precision the unit of rounding is 1e-3 (float16) and 8e-3 (bfloat16).
"""


def export_onnx(
    architecture: Architecture,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: Path,
    *,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> list[Path]:
    """Write a module as ONNX: its inputs by name to one output ``logits``, all with a dynamic first dimension
    ``batch``.

    The second dimension of integer inputs (a sequence of tokens) is dynamic too where the model allows it. The file is
    self-contained up to ``max_inline_bytes`` of weights; above that the weights lie beside it in ``<name>.data``.
    Initializers keep the names of the module's state where the exporter does not transform them. Nothing of this
    machine (paths, stack traces) is in the file, and equal weights give equal bytes.

    Args:
        architecture: knows how the module is called.
        module: in evaluation mode, with its weights.
        inputs: one batch [n, ...] by name, n >= 1, on the module's device.
        path: the file to write; replaced if it exists.
        max_inline_bytes: see above.

    Returns:
        The files written: ``path``, then that of the weights if they lie beside it. They only work together, under
        these names.

    Raises:
        ModelError: the model cannot be exported.
        MissingExtraError: the exporter is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise MissingExtraError("ONNX export", "onnx")
    import onnx_ir

    # The tracer would take a batch of 1 for a constant.
    example = {name: tensor if len(tensor) > 1 else torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    batch = torch.export.Dim("batch")
    shapes: dict[str, dict[int, Any]] = {
        name: {0: batch, 1: torch.export.Dim.AUTO}
        if not tensor.is_floating_point() and tensor.ndim == 2
        else {0: batch}
        for name, tensor in example.items()
    }
    try:
        with _quiet(), torch.no_grad(), architecture.exporting(module):
            program = torch.onnx.export(
                _Logits(architecture, module).eval(),
                (),
                kwargs={"inputs": example},
                input_names=list(example),
                output_names=["logits"],
                dynamic_shapes={"inputs": shapes},
                dynamo=True,
                verbose=False,
            )
        if program is None:
            raise ModelError("the exporter returned nothing")
    except Exception as error:
        reason = error.problem if isinstance(error, AutoMergeError) else short_reason(_innermost(error))
        raise ModelError(
            f"the model cannot be exported to ONNX: {reason}", "use the checkpoint, or set onnx: false"
        ) from error
    graph = program.model
    _canonicalise(graph, list(module.state_dict()))

    size = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    data = path.with_name(path.name + ".data")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _quiet():
            onnx_ir.save(graph, folder / path.name, external_data=data.name if size > max_inline_bytes else None)
        # Gone first: an older graph must never be found with these weights, nor this graph with older ones.
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        written = [path]
        if (folder / data.name).exists():
            (folder / data.name).replace(data)
            written.append(data)
        (folder / path.name).replace(path)
    except Exception as error:
        if not path.exists():
            data.unlink(missing_ok=True)
        raise ModelError(
            f"{path}: the ONNX file cannot be written: {short_reason(error)}", "make room, and try again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return written


def check_onnx(
    path: Path, architecture: Architecture, module: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> float:
    """Check a file with onnx.checker, run it with onnxruntime on the CPU, and compare its logits with torch's.

    Args:
        path: the ONNX file.
        architecture: knows how the module is called.
        module: what was exported, in evaluation mode.
        batches: inputs [n, ...] by name, on the module's device; n may differ from the export's.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        ModelError: the file is not valid, does not run, or differs by more than ``TOLERANCES``.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise MissingExtraError("the check of an ONNX file", "onnx") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    largest, scale = 0.0, 1.0
    try:
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = {item.name for item in session.get_inputs()}
        for inputs in batches:
            feed = {name: tensor.cpu().numpy() for name, tensor in inputs.items() if name in names}
            found = torch.from_numpy(session.run(["logits"], feed)[0]).double()
            with torch.inference_mode():
                expected = architecture.call(module, inputs).cpu().double()
            if found.shape != expected.shape:
                raise ModelError(f"it returns {list(found.shape)} where torch returns {list(expected.shape)}")
            if not bool(torch.isfinite(found).all()):
                raise ModelError("it returns values that are not finite")
            largest = max(largest, float((found - expected).abs().max()))
            scale = max(scale, float(expected.abs().max()))
    except Exception as error:
        reason = error.problem if isinstance(error, AutoMergeError) else short_reason(error)
        raise ModelError(
            f"{path.name}: the ONNX file does not do what the model does: {reason}", "use the checkpoint"
        ) from error
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), torch.float32)
    limit = TOLERANCES.get(dtype, 1e-4) * scale
    if not largest <= limit:
        raise ModelError(
            f"{path.name}: the ONNX file's logits differ from torch's by up to {largest:.3g}, more than {limit:.3g}",
            "use the checkpoint",
        )
    return largest


class _Logits(nn.Module):
    """The architecture's way of calling its module, as a module with one output."""

    def __init__(self, architecture: Architecture, module: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.module = module

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.architecture.call(self.module, inputs)


def _canonicalise(model: Any, state: Sequence[str]) -> None:
    """Remove what only describes this machine and this run, and number what the exporter names by its own count.

    The weights get the names of the module's state, without the wrapper's prefix.
    """
    scopes = [model.graph, *model.functions.values()]
    taken = {*state, *(value.name for scope in scopes for value in (*scope.inputs, *scope.outputs))}
    values = (name for index in itertools.count() if (name := f"value_{index}") not in taken)
    constants = (name for index in itertools.count() if (name := f"constant_{index}") not in taken)
    named = {id(value) for scope in scopes for value in (*scope.inputs, *scope.outputs)}

    initializers = model.graph.initializers
    weights = {f"module.{name}": name for name in state}
    held = list(initializers.values())
    initializers.clear()
    used: dict[int, Any] = {}
    model.doc_string = None
    model.metadata_props.clear()
    for scope in scopes:
        scope.doc_string = None
        scope.metadata_props.clear()
        for value in scope.inputs:
            value.metadata_props.clear()
        for index, node in enumerate(scope.all_nodes()):
            node.name = f"{node.op_type}_{index}"
            node.doc_string = None
            node.metadata_props.clear()
            used |= {id(value): value for value in node.inputs if value is not None and id(value) not in used}
            for value in node.outputs:
                value.metadata_props.clear()
                if id(value) not in named and value.name:
                    value.name = next(values)
    order = {key: index for index, key in enumerate(used)}
    for value in sorted(
        held, key=lambda value: (value.name not in weights, order.get(id(value), len(order)), value.name)
    ):
        value.metadata_props.clear()
        if id(value) not in named:
            value.name = weights[value.name] if value.name in weights else next(constants)
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
            value.const_value.name = value.name
        initializers.add(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, warnings and log lines.

    Logging is off as a whole: the exporter makes its loggers while it is imported, too late to be silenced by name.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _innermost(error: BaseException) -> BaseException:
    """The exception that began the chain: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
