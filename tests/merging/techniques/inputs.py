"""Random inputs of one tensor: a base, and sources near it."""

import torch

from automerge.merging.technique import TensorInputs


def make_inputs(count, shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    sources = [base + 0.1 * torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    return TensorInputs("w", [f"s{i}" for i in range(count)], base, sources)
