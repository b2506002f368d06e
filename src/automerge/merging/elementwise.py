"""One tensor merged by the compiled kernels, tile by tile on all cores: how both engines do elementwise techniques.

An engine says where the elements are (in memory, or in files) by an `Operand` each, and takes the merged elements of
each tile. The bytes are those of `automerge.merging.apply.merge_tensor`, whatever the tiles and threads.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from automerge.checkpoint.info import TensorInfo
from automerge.merging.buffers import average_weights
from automerge.merging.cut import Cut, Sample, find_cuts
from automerge.merging.fused import Fused, KeepLargest, KeepRandom
from automerge.merging.kernels import ALL_TIES, DTYPES, MAX_SOURCES, NO_OUTLIERS, Delta, Kernels, Program, Source
from automerge.merging.random import keep_threshold, mask_key
from automerge.merging.recipe import RecipeBlock
from automerge.merging.technique import Settings, load_technique
from automerge.merging.workers import Operand, Scratch, Workers, tiles_of

_COMBINE = {"sum": 0, "agreeing": 1, "agreeing_normalised": 2}
_KEEP_LARGEST, _KEEP_RANDOM = 1, 2


def fused_of(
    name: str, block: RecipeBlock, base: TensorInfo | None, sources: Mapping[str, TensorInfo], output: TensorInfo
) -> tuple[Settings, Fused] | None:
    """How the kernels merge a tensor of a canonical block; None where they cannot.

    Args:
        name: the tensor's name.
        block: its block, in canonical form.
        base, sources: dtypes (and shapes) of the inputs.
        output: of the result.

    Returns:
        the settings with the weights that apply to this tensor, and the description.
    """
    settings = block.settings
    if name in block.buffers:
        weights = average_weights([settings.weights[source] for source in sources])
        settings = Settings("linear", dict(zip(sources, weights, strict=True)))
    fused = load_technique(settings.technique).declaration.fused(settings)
    if fused is None or len(sources) > MAX_SOURCES or (fused.task_vectors and base is None):
        return None
    used = [*sources.values(), output, *([base] if base is not None and fused.task_vectors else [])]
    return (settings, fused) if all(info.dtype in DTYPES for info in used) else None


class ElementwiseMerge:
    """The merge of one tensor by the kernels.

    Args:
        kernels: the compiled kernels.
        tensor: the tensor's name, on which random masks depend.
        settings, fused: from `fused_of`.
        seed: the recipe's seed.
        base: the base's elements; not read where the merge is none of task vectors.
        sources: the sources' elements by name, in the recipe's order.
        output_dtype: of the merged elements.
        count: how many elements the tensor has.
        samples: kept by the caller from one merge of these inputs to the next, so that thresholds are found faster.
    """

    def __init__(
        self,
        kernels: Kernels,
        tensor: str,
        settings: Settings,
        fused: Fused,
        *,
        seed: int,
        base: Operand | None,
        sources: Mapping[str, Operand],
        output_dtype: str,
        count: int,
        samples: list[Sample] | None = None,
    ) -> None:
        self._kernels = kernels
        self._fused = fused
        self._base = base if fused.task_vectors else None
        self._operands = list(sources.values())
        self._count = count
        self._samples = samples
        random = isinstance(fused.keep, KeepRandom)
        largest = isinstance(fused.keep, KeepLargest)
        self._program = Program(
            sources=len(sources),
            base_dtype=-1 if self._base is None else DTYPES[self._base.dtype],
            output_dtype=DTYPES[output_dtype],
            keep=_KEEP_RANDOM if random else _KEEP_LARGEST if largest else 0,
            combine=_COMBINE[fused.combine],
            threshold=keep_threshold(fused.keep.density) if isinstance(fused.keep, KeepRandom) else 0,
            rescale=fused.keep.density if isinstance(fused.keep, KeepRandom) else 1.0,
            divisor=fused.divisor,
            scale=fused.scale,
        )
        self._sources = [
            Source(
                dtype=DTYPES[operand.dtype],
                weight=settings.weights[name],
                key=mask_key(seed, name, tensor) if random else 0,
                outlier_cut=NO_OUTLIERS,
                ties=ALL_TIES,
            )
            for name, operand in sources.items()
        ]

    def run(
        self,
        workers: Workers,
        output: Callable[[int, int, Scratch], int],
        done: Callable[[int, int, Scratch], None] | None = None,
    ) -> bool:
        """Merge every tile.

        Args:
            workers: the threads.
            output: (first element, count, scratch) -> the address where the merged elements of the tile go.
            done: called with the same when they are there.

        Returns:
            whether all inputs were finite and all merged elements fit the output dtype; if not, what was written is
            of no use.
        """
        tiles = tiles_of(self._count)
        cuts = self._cuts(workers, tiles)

        def merge(index: int) -> bool:
            first, count = tiles[index]
            scratch = workers.scratch()
            base, *data = self._addresses(first, count, scratch)
            sources = (Source * len(data))(*self._sources)
            for source, (cut, outliers) in zip(sources, cuts, strict=False):
                source.cut, source.ties = cut.value, cut.ties[index]
                if outliers is not None:
                    source.outlier_cut, source.outlier_ties = outliers.value, outliers.ties[index]
            not_finite, overflow = self._kernels.merge(
                self._program, sources, base, data, first, count, output(first, count, scratch)
            )
            if not_finite or overflow:
                return False
            if done is not None:
                done(first, count, scratch)
            return True

        return all(workers.map(merge, range(len(tiles))))

    def _addresses(self, first: int, count: int, scratch: Scratch) -> list[int]:
        operands = [self._base, *self._operands]
        return [
            0 if operand is None else operand.address(first, count, scratch.input(index))
            for index, operand in enumerate(operands)
        ]

    def _cuts(self, workers: Workers, tiles: Sequence[tuple[int, int]]) -> list[tuple[Cut, Cut | None]]:
        """Per source the cut of what is kept, and that of the outliers; nothing where all elements are kept."""
        keep = self._fused.keep
        if not isinstance(keep, KeepLargest):
            return []
        ranks = keep.ranks(self._count)
        if ranks is None:
            return []

        def deltas(first: int, count: int) -> Iterable[Delta]:
            base, *data = self._addresses(first, count, workers.scratch())
            for address, source in zip(data, self._sources, strict=True):
                yield Delta(base, self._program.base_dtype, address, source.dtype, count)

        def found(count: int) -> list[Cut]:
            return find_cuts(self._kernels, workers, deltas, tiles, len(self._sources), count, self._samples)

        lower = found(ranks[0])
        upper: Sequence[Cut | None] = found(ranks[1]) if ranks[1] else [None] * len(lower)
        return list(zip(lower, upper, strict=True))
