"""The document: a partition, refused where it is none."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from automerge.errors import SpecError
from automerge.segmenting.segmentation import Block, Segmentation


def block(name: str, *parameters: str, **changes: Any) -> Block:
    content: dict[str, Any] = {
        "name": name,
        "kind": "vector",
        "transition": "input",
        "shape_in": [2, 4],
        "shape_out": [2, 3],
        "parameters": list(parameters),
        "buffers": [],
        "parameter_count": 12,
        "share": 0.5,
    }
    return Block(**(content | changes))


def test_written_and_read_again(tmp_path: Path) -> None:
    made = Segmentation(granularity="whole", blocks=[block("whole", "a", "b", share=1.0)], tied={"c": "a"})
    assert Segmentation.read(made.write(tmp_path / "segmentation.json")) == made


@pytest.mark.parametrize(
    ("blocks", "tied", "message"),
    [
        ([block("0", "a"), block("1", "a")], {}, "'a' is in two blocks"),
        ([block("0", "a", buffers=["a"])], {}, "twice in '0'"),
        ([block("0", "a"), block("0", "b")], {}, "two blocks are named '0'"),
        ([block("0", "a", "b")], {"b": "a"}, "tied tensor 'b' is in a block"),
        ([block("0", "a")], {"b": "x"}, "'x', which is in no block"),
    ],
)
def test_what_is_no_partition_is_refused(blocks: list[Block], tied: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Segmentation(granularity="tensor", blocks=blocks, tied=tied)


def test_an_unknown_kind_is_refused_in_one_sentence() -> None:
    value = Segmentation(granularity="whole", blocks=[block("whole", "a")], tied={}).model_dump(mode="json")
    value["blocks"][0]["kind"] = "spherical"
    with pytest.raises(SpecError, match=r"blocks\.0\.kind"):
        Segmentation.parse(value, where="segmentation.json")
