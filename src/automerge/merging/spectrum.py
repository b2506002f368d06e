"""Singular vectors and orthogonal factors of a tensor seen as a matrix. Written once, here.

All of it goes through the Gram matrix of the smaller side, summed over the rows and decomposed in float64. Squaring
halves the digits, which float64 can spare: singular values are true to about 1e-8 of the largest, better than an SVD in
float32 has them, for 1 to 1.5 times its processor time. A tall matrix (an embedding) is passed over in chunks of rows:
neither a float64 copy nor singular vectors of its long side are held that nobody asks for. For m x n with m >= n the
time is about 4 m n^2 + 10 n^3 float64 operations, the extra memory about four n x n squares of float64.

A direction whose singular value is below what rounding leaves in a float32 matrix (`_NOISE`) is arbitrary: it would be
another one on another machine. Such directions are left out, everywhere.

Results of these products differ in the last digits between devices and numbers of threads: techniques that use them
agree to 1e-5 of the largest magnitude there, and exactly on one machine with one number of threads.
"""

import math
from collections.abc import Iterator

import torch

from automerge.merging.technique import Hyperparameter

SCALE = Hyperparameter(
    "lambda",
    "float",
    default=1.0,
    low=0.0,
    high=4.0,
    searched=True,
    doc="scale of the merged task vector; only its products with the weights matter",
)

_NOISE = 4 * torch.finfo(torch.float32).eps
"""Times the root of the longer side: the share of the largest singular value below which there is only rounding."""

_CHUNK = 1 << 22


def is_matrix(tensor: torch.Tensor) -> bool:
    """Whether there is a matrix in the tensor: at least two dimensions, and not empty."""
    return tensor.dim() >= 2 and tensor.numel() > 0


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] as [out, in * ...]: a convolution's kernel is a matrix over patches."""
    return tensor.reshape(tensor.shape[0], -1)


def top_components(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and their vectors, fewer than ``count`` where the rank is lower.

    Args:
        matrix: [m, n], floating point, finite.
        count: how many at most.

    Returns:
        left vectors [m, k], values [k] in descending order, right vectors [n, k]; in the dtype of the matrix. Which
        sign a pair of vectors has is arbitrary, and within equal values which basis.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = top_components(matrix.T, count)
        return left, values, right
    values, vectors = _right_vectors(matrix)
    values, vectors = values[:count], vectors[:, :count]
    return _times(matrix, vectors / values), values.to(matrix.dtype), vectors.to(matrix.dtype)


def orthogonal_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U V' of the singular value decomposition U S V': the nearest matrix with orthonormal columns (or rows).

    It is the solution of the orthogonal Procrustes problem, and what is left after whitening, M (M'M)^(-1/2). Of a
    matrix without full rank it is the partial isometry: what the matrix maps to zero, it maps to zero.

    Args:
        matrix: [m, n], floating point, finite.

    Returns:
        the factor, [m, n] in the matrix's dtype, and the matrix's singular values (float64, [rank], descending).
    """
    if matrix.shape[0] < matrix.shape[1]:
        factor, values = orthogonal_factor(matrix.T)
        return factor.T, values
    values, vectors = _right_vectors(matrix)
    return _times(matrix, (vectors / values) @ vectors.T), values


def _right_vectors(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values above the noise [r], descending, and their right vectors [n, r]; float64."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    largest = float(tall.abs().max()) if tall.numel() else 0.0
    if largest == 0:
        return gram.new_zeros(0), gram[:, :0]
    for rows in _row_chunks(tall):
        # Divided by the largest magnitude, so that no square leaves the range of float64.
        part = tall[rows].to(torch.float64) / largest
        gram.addmm_(part.T, part)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp_(min=0).sqrt_().flip(0)
    rank = int((values > values[0] * (_NOISE * math.sqrt(tall.shape[0]))).sum())
    return values[:rank] * largest, vectors.flip(1)[:, :rank]


def _times(tall: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """tall @ factor, computed in float64, in the dtype of ``tall``."""
    product = tall.new_empty(tall.shape[0], factor.shape[1])
    for rows in _row_chunks(tall):
        product[rows] = tall[rows].to(torch.float64) @ factor
    return product


def _row_chunks(tall: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, tall.shape[1]))
    return (slice(start, start + step) for start in range(0, tall.shape[0], step))
