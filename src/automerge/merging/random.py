"""Counter-based random bits: a keep mask is a function of (seed, source, tensor name, element index) and nothing else.

No generator carries a state, so neither the order of the tensors, nor shards, threads, chunks or devices change a mask.

The bits: the key is the first 8 bytes, little-endian, of sha256("{seed}\\0{source}\\0{tensor}"). Four neighbouring
elements form a group g = index // 4, which gets one 64-bit word: the finaliser of splitmix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) of key + (g + 1) * 0x9E3779B97F4A7C15 modulo 2^64. The
element takes the 16 bits at lane index % 4, lowest first. 16 bits resolve a density to 1.5e-5 and quarter the work.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18
"""Elements per step: the int64 temporaries of a step (a few MB) stay in the processor's cache."""

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def mask_key(seed: int, source: str, tensor: str) -> int:
    """The 64-bit key (0 <= key < 2^64) of one source's tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{source}\0{tensor}".encode()).digest()[:8], "little")


def keep_threshold(density: float) -> int:
    """How many of the 65536 values of an element's 16 bits mean keep: floor(density * 65536 + 0.5)."""
    return int(density * 65536 + 0.5)


def keep_mask(key: int, numel: int, density: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """A Bernoulli mask.

    Args:
        key: from `mask_key`.
        numel: number of elements.
        density: probability that an element is kept, 0 to 1, rounded to a multiple of 1/65536; 1 keeps all.
        device: where the mask is made; the bits are the same everywhere.

    Returns:
        bool tensor of shape ``(numel,)``; True is kept.
    """
    import torch

    threshold = keep_threshold(density)
    mask = torch.empty(numel, dtype=torch.bool, device=device)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        torch.lt(lanes(key, start, stop, device), threshold, out=mask[start:stop])
    return mask


def lanes(key: int, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 random bits of the elements ``start`` to ``stop`` (exclusive), as int64 of shape ``(stop - start,)``."""
    import torch

    first, last = start // 4, (stop + 3) // 4
    # int64 arithmetic wraps around, which is arithmetic modulo 2^64.
    word = torch.arange(first + 1, last + 1, dtype=torch.int64, device=device)
    word.mul_(_signed(_GAMMA)).add_(_signed(key))
    word.bitwise_xor_(_shift_right(word, 30)).mul_(_signed(_MULTIPLIER_1))
    word.bitwise_xor_(_shift_right(word, 27)).mul_(_signed(_MULTIPLIER_2))
    word.bitwise_xor_(_shift_right(word, 31))
    bits = torch.stack([(word >> (16 * lane)).bitwise_and_(0xFFFF) for lane in range(4)], dim=1).reshape(-1)
    return bits[start - 4 * first : stop - 4 * first]


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(word: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift: torch's is arithmetic, so the copies of the sign bit are masked away."""
    return (word >> by).bitwise_and_((1 << (64 - by)) - 1)
