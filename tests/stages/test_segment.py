"""segment: the blocks of the architecture, without a weight being read."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from automerge.errors import ModelError, SpecError
from automerge.segmenting.segmentation import Segmentation
from automerge.spec import Spec
from automerge.stages.fetch import fetch
from automerge.stages.segment import segment

NAMES = {"conv.weight", "conv.bias", "head.weight", "head.bias"}


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


@pytest.mark.parametrize(
    ("granularity", "blocks"),
    [
        ("transition", [["conv.weight", "conv.bias"], ["head.weight", "head.bias"]]),
        ("layer", [["conv.weight", "conv.bias"], ["head.weight", "head.bias"]]),
        ("tensor", [["conv.weight"], ["conv.bias"], ["head.weight"], ["head.bias"]]),
        ("whole", [["conv.weight", "conv.bias", "head.weight", "head.bias"]]),
    ],
)
def test_every_parameter_is_in_one_block(
    spec: Spec, finished: Path, tmp_path: Path, granularity: str, blocks: list[list[str]]
) -> None:
    cut = changed(spec, segmentation={"granularity": granularity})
    segmentation = segment(cut, finished / "fetch", tmp_path / "segment")
    assert [sorted(block.parameters) for block in segmentation.blocks] == [sorted(block) for block in blocks]
    assert Segmentation.read(tmp_path / "segment" / "segmentation.json") == segmentation


def test_no_weights_are_read(spec: Spec, finished: Path, tmp_path: Path) -> None:
    for path in (finished / "fetch" / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"")
    segmentation = segment(spec, finished / "fetch", tmp_path / "segment")
    assert {name for block in segmentation.blocks for name in block.parameters} == NAMES


def test_declared_example_inputs_need_no_data(spec: Spec, finished: Path, tmp_path: Path) -> None:
    shutil.rmtree(finished / "fetch" / "data")
    model = {**spec.model.model_dump(), "example": {"images": {"shape": [1, 1, 6, 6]}}}
    segmentation = segment(changed(spec, model=model), finished / "fetch", tmp_path / "segment")
    assert {name for block in segmentation.blocks for name in block.parameters} == NAMES


def test_inputs_that_the_model_does_not_take_are_named_by_their_origin(spec: Spec, tmp_path: Path) -> None:
    data = load_file(spec.tasks[0].validation)
    save_file({**data, "inputs": data["inputs"][:, :, :4].contiguous()}, tmp_path / "flat.safetensors")
    tasks = [task.model_dump() for task in spec.tasks]
    tasks[0]["validation"] = str(tmp_path / "flat.safetensors")
    flat = changed(spec, tasks=tasks)
    fetch(flat, tmp_path / "fetch")
    with pytest.raises(ModelError, match=r"in module 'head'.* the first sample of tasks\.left\.validation"):
        segment(flat, tmp_path / "fetch", tmp_path / "segment")

    model = {**spec.model.model_dump(), "example": {"images": {"shape": [1, 3, 6, 6]}}}
    with pytest.raises(ModelError, match=r"\(example inputs: model\.example\)"):
        segment(changed(flat, model=model), tmp_path / "fetch", tmp_path / "segment")
    assert not (tmp_path / "segment" / "segmentation.json").exists()


def test_it_starts_from_what_was_fetched_for_this_spec(spec: Spec, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"manifest\.json: no such file; `automerge fetch` writes it"):
        segment(spec, tmp_path / "nothing", tmp_path / "segment")
    with pytest.raises(SpecError, match="was fetched for a spec with another 'base'; run `automerge fetch` again"):
        segment(changed(spec, base=None), finished / "fetch", tmp_path / "segment")
