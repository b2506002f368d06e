"""The segmentation document: the partition of all parameters and persistent buffers of a model into blocks."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from automerge.documents import Document, Model

Kind = Literal["convolutional", "sequence", "vector", "recurrent", "remainder"]
Granularity = Literal["transition", "layer", "tensor", "whole"]


class Block(Model):
    """A named set of parameters that is merged with one technique and one set of hyperparameters.

    Attributes:
        name: unique; the position and the kind (``1-sequence``), with the module or parameter behind a slash at the
            finer granularities (``1-sequence/encoder.layers.0``).
        kind: the layout of the data in this block; of most of its parameters at granularity ``whole``.
        transition: what began the block, such as ``4-D convolutional -> 3-D sequence at encoder.0``, or ``input``.
        shape_in: shape of the data at the block's first operation in the trace; none where nothing was traced.
        shape_out: shape of what the block's last operation gave.
        parameters: names in state-dict order.
        buffers: names in state-dict order.
        parameter_count: elements of the parameters.
        share: of the elements of all parameters, 0 to 1.
    """

    name: str
    kind: Kind
    transition: str
    shape_in: list[int] | None
    shape_out: list[int] | None
    parameters: list[str]
    buffers: list[str]
    parameter_count: int = Field(ge=0)
    share: float = Field(ge=0.0, le=1.0)

    def tensors(self) -> Iterator[str]:
        """The names of the parameters, then of the buffers."""
        yield from self.parameters
        yield from self.buffers


class Segmentation(Document):
    """Every parameter and persistent buffer in exactly one block; a tied tensor once, under its canonical name.

    Attributes:
        granularity: how finely the blocks were cut.
        blocks: in the order in which the data reach them; the remainder last.
        tied: alias -> canonical name (the first in state-dict order) of tensors that share their memory.
    """

    FORMAT: ClassVar[str] = "automerge/segmentation"

    granularity: Granularity
    blocks: list[Block]
    tied: dict[str, str]

    @model_validator(mode="after")
    def _partition(self) -> Self:
        names: set[str] = set()
        held: set[str] = set()
        for block in self.blocks:
            if block.name in names:
                raise ValueError(f"two blocks are named {block.name!r}")
            names.add(block.name)
            for tensor in block.tensors():
                if tensor in held:
                    raise ValueError(f"tensor {tensor!r} is in two blocks or twice in {block.name!r}")
                held.add(tensor)
        for alias, canonical in self.tied.items():
            if alias in held:
                raise ValueError(f"tied tensor {alias!r} is in a block; only {canonical!r}, which it repeats, may be")
            if canonical not in held:
                raise ValueError(f"tied tensor {alias!r} repeats {canonical!r}, which is in no block")
        return self
