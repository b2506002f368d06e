"""segment: cut the architecture into blocks by one inference on fake tensors; no weights are read."""

import logging
from pathlib import Path

import torch

from automerge.errors import ModelError
from automerge.models.architecture import Architecture
from automerge.segmenting.segment import segment as segment_module
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import Spec
from automerge.stages.inputs import Inputs
from automerge.stages.documents import SEGMENTATION
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
        opened = Inputs.open(spec, inputs)
        reference = spec.sources[0].name
        with torch.device("meta"):
            module = opened.architecture.build(reference, opened.arguments(reference))
        args, kwargs = _example(opened, opened.architecture, module)
        segmentation = segment_module(module, args, kwargs, granularity=spec.segmentation.granularity)
        segmentation.write(folder / SEGMENTATION)
        metrics.set("automerge_segment_blocks", len(segmentation.blocks))
        metrics.set("automerge_segment_parameters", sum(block.parameter_count for block in segmentation.blocks))
    return segmentation
