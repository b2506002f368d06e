"""The component ``segment``."""

from pathlib import Path
from typing import Any

from automerge.segmenting.segmentation import Segmentation


def test_writes_the_segmentation(segmented: dict[str, Any]) -> None:
    artifact = segmented["segmentation"]
    written = Segmentation.read(Path(artifact.path) / "segmentation.json")
    assert [block.parameters for block in written.blocks] == [
        ["conv.weight", "conv.bias"],
        ["head.weight", "head.bias"],
    ]
    assert artifact.metadata == {"blocks": 2, "granularity": "transition"}
