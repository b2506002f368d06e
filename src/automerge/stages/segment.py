"""segment: cut the architecture into blocks by one inference on fake tensors; no weights are read."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from automerge.errors import ModelError
from automerge.segmenting.segment import segment as segment_module
from automerge.segmenting.segmentation import Granularity, Segmentation
from automerge.spec import Spec
from automerge.stages.documents import SEGMENTATION
from automerge.stages.inputs import Inputs
from automerge.telemetry.metrics import observe_stage

log = logging.getLogger(__name__)


def segment(spec: Spec, inputs: Path, folder: Path) -> Segmentation:
    """Segment the model and write ``segmentation.json``.

    Args:
        spec: the spec.
        inputs: folder that `fetch` wrote.
        folder: where the segmentation is written.

    Raises:
        ModelError: the model cannot be built or traced.
        TaskError: the model has no example input and the first task's data cannot be read.
    """
    with observe_stage("segment", pipeline=spec.name, family=spec.model.target, folder=folder) as metrics:
        segmentation = segmentation_of(Inputs.open(spec, inputs), spec.segmentation.granularity)
        segmentation.write(folder / SEGMENTATION)
        metrics.set("automerge_segment_blocks", len(segmentation.blocks))
        metrics.set("automerge_segment_parameters", sum(block.parameter_count for block in segmentation.blocks))
    return segmentation


def segmentation_of(opened: Inputs, granularity: Granularity) -> Segmentation:
    """The blocks of the spec's model at any granularity.

    Raises:
        ModelError: the model cannot be built or traced.
        TaskError: the model has no example input and the first task's data cannot be read.
    """
    spec = opened.spec
    reference = spec.sources[0].name
    with torch.device("meta"):
        module = opened.architecture.build(reference, opened.arguments(reference))
    declared = opened.architecture.example(module)
    inputs_of_one = declared or _one_sample(opened)
    # A lone input called `inputs` is positional, as in Architecture.call.
    args, kwargs = ((inputs_of_one["inputs"],), {}) if list(inputs_of_one) == ["inputs"] else ((), inputs_of_one)
    try:
        return segment_module(module, args, kwargs, granularity=granularity)
    except ModelError as error:
        origin = "model.example" if declared else f"the first sample of tasks.{spec.tasks[0].name}.validation"
        raise ModelError(f"{error.problem} (example inputs: {origin})", error.remedy) from error


def _one_sample(opened: Inputs) -> dict[str, Tensor]:
    """The first task's first validation sample, as shapes alone."""
    data = opened.data(opened.spec.tasks[0], "validation")
    return {name: tensor[:1].to("meta") for name, tensor in data.inputs.items()}
