"""The recipe: the complete, replayable description of a merge. Recipe and inputs rebuild the model without any data.

Canonical form. Different settings can mean the same merge; ``canonical`` gives them one form, which is also the form
that both engines execute, so that equal keys mean equal bytes. The identities, and no others:

- linear: the weights are scaled so that the sum of their magnitudes is 1 (a common factor cancels).
- task_arithmetic: lambda > 0 is multiplied into the weights; if they then sum to 1 the base cancels: linear.
- ties with normalize: the weights are scaled as for linear. Without it, lambda > 0 is multiplied into the weights.
- dare_linear: at density 1 it is task_arithmetic (rescale has no effect); else lambda > 0 into the weights.
- dare_ties: at density 1 it is ties with density 1 and without normalize; else lambda > 0 into the weights.
- slerp: the weights are scaled as for linear; with a zero weight it is linear.
- breadcrumbs: at density 1 it is task_arithmetic; else lambda > 0 into the weights.
- breadcrumbs_ties: at density 1 or gamma 0 it is ties without normalize; else lambda > 0 into the weights.
- della: epsilon is cut to min(density, 1 - density); at density 1 it is ties; with normalize the weights are scaled as
  for linear; without it, at epsilon 0 it is dare_ties, else lambda > 0 into the weights.
- della_linear: epsilon is cut likewise; at epsilon 0 it is dare_linear; else lambda > 0 into the weights.
- sce: the weights are scaled as for linear.
- fisher, regmean: the weights are scaled as for linear; with one source of a weight other than 0 it is linear.
- consensus_ta, tsv_merge, iso_c: as their modules say.
- Numbers are rounded to 12 significant digits, and typed as declared (a density 1 is 1.0).

All of them change the weights by a common positive factor at most, which neither the election of signs nor the
averaging of buffers sees.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, SerializerFunctionWrapHandler, StringConstraints, model_serializer

from automerge.documents import Document, Model, digest_of
from automerge.merging.technique import Settings, canonical_settings, load_technique, validate_settings

if TYPE_CHECKING:
    import torch

OutputDtype = Literal["same", "float32", "float16", "bfloat16"]
IntegerBuffers = Literal["error", "base"]
VocabularyRule = Literal["base", "largest"]

BASE = "base"
"""The key of the base in ``Recipe.private``; no source may have this name."""

SOURCE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
SourceName = Annotated[str, StringConstraints(pattern=SOURCE_NAME)]


class InputDigest(Model):
    """One input checkpoint: the name it has in the recipe, and the sha256 digest of its content.

    A recipe written by hand may leave the digest out: then any checkpoint is taken.
    """

    name: SourceName
    digest: str = ""


class RecipeBlock(Model):
    """One block: its tensors, and how they are merged.

    Attributes:
        name: the block's name, for people.
        technique: the technique's name.
        weights: weight per source; every source has one.
        hyperparameters: a value for every hyperparameter that the technique declares.
        parameters: names of the tensors that the technique merges.
        buffers: names of the tensors that the buffer policy merges (`automerge.merging.buffers`).
    """

    name: str
    technique: str
    weights: dict[str, FiniteFloat]
    hyperparameters: dict[str, bool | int | float | str] = Field(default_factory=dict)
    parameters: list[str] = Field(default_factory=list)
    buffers: list[str] = Field(default_factory=list)

    @property
    def settings(self) -> Settings:
        """Technique, weights and hyperparameters, without the tensors."""
        return Settings(self.technique, dict(self.weights), dict(self.hyperparameters))


class Vocabulary(Model):
    """To how many rows tensors with one row per token are brought before they are merged: see `merging.vocabulary`.

    Attributes:
        rule: whose number it is: the base's, or the largest of all inputs.
        rows: the number.
        tensors: names of the tensors, as they are in the blocks.
    """

    rule: VocabularyRule
    rows: int = Field(ge=1)
    tensors: list[str] = Field(min_length=1)


class Recipe(Document):
    """A merge.

    Attributes:
        release: the AutoMerge release that wrote it; not part of the digest.
        base: the common ancestor, or None.
        sources: the sources; sums are taken in this order.
        seed: what the random masks depend on, beside source, tensor and element.
        dtype: dtype of the merged floating-point tensors; ``same``: as the sources.
        integer_buffers: integer or boolean tensors that differ between the sources: refuse, or take the base's.
        blocks: how the merged tensors are merged; every merged tensor is in one block.
        tied: alias -> the tensor that it shares its values with. Merged once; the alias is not written.
        private: source (or ``base``) -> the tensors that it keeps for itself.
        statistics: sha256 of the statistics file (`automerge.merging.statistics`), if the merge needs one.
        recalibrated: the BatchNorm buffers whose values are in that file, in place of the sources' average.
        vocabulary: what is done where the inputs have vocabularies of different size; None where they do not.

    The last three are written only where they say something.
    """

    FORMAT: ClassVar[str] = "automerge/recipe"

    release: str = ""
    base: InputDigest | None = None
    sources: list[InputDigest] = Field(min_length=1)
    seed: int = 0
    dtype: OutputDtype = "same"
    integer_buffers: IntegerBuffers = "error"
    blocks: list[RecipeBlock]
    tied: dict[str, str] = Field(default_factory=dict)
    private: dict[str, list[str]] = Field(default_factory=dict)
    statistics: str | None = None
    recalibrated: list[str] = Field(default_factory=list)
    vocabulary: Vocabulary | None = None

    @model_serializer(mode="wrap")
    def _without_empty_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        value: dict[str, Any] = handler(self)
        for key in ("statistics", "recalibrated", "vocabulary"):
            if not value.get(key):
                value.pop(key, None)
        return value

    @property
    def source_names(self) -> list[str]:
        """The sources' names, in order."""
        return [source.name for source in self.sources]

    @property
    def is_randomised(self) -> bool:
        """Whether the seed has any effect: some block's canonical technique is randomised."""
        return any(load_technique(canonical(block).technique).declaration.randomised for block in self.blocks)

    @property
    def needs_statistics(self) -> bool:
        """Whether there is no merging without the statistics file: for recalibration, or some block's technique."""
        return bool(self.recalibrated) or any(
            load_technique(canonical(block).technique).declaration.statistics
            for block in self.blocks
            if block.parameters
        )

    def digest(self) -> str:
        """sha256 (hex) of what the merge depends on: recipes of the same merge have the same digest.

        Left out: the release, the names of blocks, the base's name, the order of blocks and of the tensors in them,
        the form of the settings (see `canonical`), the seed where nothing is random, and the statistics where none are
        needed.

        Raises:
            PluginError: a technique is not installed.
        """
        statistics = {"statistics": self.statistics, "recalibrated": sorted(self.recalibrated)}
        rows = dict.fromkeys(self.vocabulary.tensors, self.vocabulary.rows) if self.vocabulary else {}
        return digest_of(
            {
                "format": self.format,
                "version": self.version,
                "base": self.base.digest if self.base else None,
                "sources": [[source.name, source.digest] for source in self.sources],
                "seed": self.seed if self.is_randomised else None,
                "dtype": self.dtype,
                "integer_buffers": self.integer_buffers,
                "blocks": sorted(block_key(block) for block in self.blocks),
                "tied": self.tied,
                "private": {name: sorted(tensors) for name, tensors in self.private.items() if tensors},
                **(statistics if self.needs_statistics else {}),
                **({"rows": rows} if rows else {}),
            }
        )


def canonical(block: RecipeBlock) -> RecipeBlock:
    """The block in its unique form: equal merges get equal blocks, up to names. See the module's identities.

    The block must be valid (`automerge.merging.technique.validate_settings`).

    Raises:
        PluginError: the technique is unknown.
    """
    settings = canonical_settings(_typed(block.settings))
    return block.model_copy(
        update={
            "technique": settings.technique,
            "weights": settings.weights,
            "hyperparameters": settings.hyperparameters,
        }
    )


def block_key(block: RecipeBlock) -> str:
    """sha256 (hex) of a block's canonical form without its name: blocks that merge alike have one key.

    The key says nothing of the inputs, the order of the sources, the seed, or the output dtype: those are the recipe's.
    """
    same = canonical(block)
    return digest_of(
        {
            "settings": settings_key(same.settings),
            "parameters": sorted(same.parameters),
            "buffers": sorted(same.buffers),
        }
    )


def settings_key(settings: Settings) -> str:
    """sha256 (hex) of canonical settings."""
    value: dict[str, Any] = {
        "technique": settings.technique,
        "weights": settings.weights,
        "hyperparameters": settings.hyperparameters,
    }
    return digest_of(value)


def effective_weights(block: RecipeBlock) -> dict[str, float]:
    """The factor with which each source enters the merged tensors, for the report.

    linear: w / sum(w), of the source itself. All others, of the task vector: task_arithmetic, dare_linear, dare_ties
    and ties without normalize: lambda * w; ties with normalize: lambda * w / sum(w), where all sources agree. A
    plug-in states its own rule. `effective_note` says what the number leaves out.
    """
    settings = _typed(block.settings)
    return load_technique(block.technique).declaration.effective_weights(settings)


def effective_note(block: RecipeBlock) -> str:
    """What a reader must know about the block's effective weights; empty where they say everything."""
    return load_technique(block.technique).declaration.effective_note


def merged_names(recipe: Recipe) -> list[str]:
    """The names of all tensors that are merged, in the order of the blocks: parameters, then buffers of each."""
    return [name for block in recipe.blocks for name in (*block.parameters, *block.buffers)]


def stored_names(recipe: Recipe, names: Mapping[str, Any]) -> dict[str, str]:
    """Under which name a checkpoint holds each merged tensor: its own, or (a tied one) that of an alias."""
    found = {}
    for name in merged_names(recipe):
        spellings = [name, *sorted(alias for alias, target in recipe.tied.items() if target == name)]
        stored = next((spelling for spelling in spellings if spelling in names), None)
        if stored is not None:
            found[name] = stored
    return found


def torch_dtype(name: str) -> "torch.dtype":
    """torch's dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _typed(settings: Settings) -> Settings:
    return validate_settings(
        settings, sources=list(settings.weights), has_base=True, where=f"technique {settings.technique!r}"
    )
