"""What is known of a tensor without reading it: dtype and shape; and the dtype names of safetensors and torch."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors tag -> (torch name, bytes per element). Tags with less than a byte per element (F4, F6_*) have no torch
# tensor that one could do arithmetic on, and are refused.
_TAGS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}

#: safetensors tag -> torch dtype name.
DTYPE_OF_TAG = {tag: name for tag, (name, _) in _TAGS.items()}
#: torch dtype name -> safetensors tag.
TAG_OF_DTYPE = {name: tag for tag, (name, _) in _TAGS.items()}
#: torch dtype name -> bytes per element.
ITEM_BYTES = dict(_TAGS.values())


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (torch's name, such as ``"float32"``) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes when contiguous."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def is_floating_point(self) -> bool:
        """Whether the dtype is a real floating-point type."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The dtype as torch's object."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def info_of(tensor: "torch.Tensor") -> TensorInfo:
    """The info of a tensor in memory; its dtype need not be one that safetensors can hold."""
    return TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
