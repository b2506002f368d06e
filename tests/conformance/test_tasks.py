"""Every built-in task kind keeps the contract, and the suite finds kinds that do not."""

import numpy as np
import pytest
import torch

from automerge.spec import TaskSpec
from automerge.tasks.classification import Classification
from automerge.tasks.language_modelling import LanguageModelling
from automerge.tasks.task import Ratio
from automerge.testing.tasks import check_task


def _spec(kind):
    return TaskSpec(name="t", kind=kind, specialist="a", validation="v", test="t")


def _images(folder):
    generator = np.random.default_rng(0)
    path = folder / "images.npz"
    np.savez(path, inputs=generator.normal(size=(7, 1, 8, 8)), labels=generator.integers(0, 9, 7))
    return path


def _class_logits(data):
    return torch.randn(len(data), 9, generator=torch.Generator().manual_seed(1))


def test_classification_conforms(tmp_path):
    check_task(Classification, _spec("classification"), _images(tmp_path), _class_logits)


def test_language_modelling_conforms(tmp_path):
    generator = np.random.default_rng(0)
    mask = np.ones((5, 6), dtype=np.int64)
    mask[1, 4:] = 0
    path = tmp_path / "tokens.npz"
    np.savez(path, **{"inputs.input_ids": generator.integers(0, 11, (5, 6)), "inputs.attention_mask": mask})

    def logits(data):
        return torch.randn(len(data), 6, 11, generator=torch.Generator().manual_seed(1))

    check_task(LanguageModelling, _spec("language_modelling"), path, logits)


class _MeanOfBatch(Classification):
    def loss(self, logits, targets):
        return super().loss(logits, targets).mean().expand(len(logits))


class _Float32Columns(Classification):
    def metric_ratios(self, logits, targets, losses):
        ratios = super().metric_ratios(logits, targets, losses)
        return {name: Ratio(r.numerator.astype(np.float32), r.denominator) for name, r in ratios.items()}


class _DetachedLoss(Classification):
    def loss(self, logits, targets):
        return super().loss(logits.detach() + 0 * logits.sum(), targets)


class _IgnoresUnknownNames(Classification):
    def __init__(self, spec, tokenizer_folder=None):
        super().__init__(spec.model_copy(update={"arguments": {}}), tokenizer_folder)


@pytest.mark.parametrize("kind", [_MeanOfBatch, _Float32Columns, _DetachedLoss, _IgnoresUnknownNames])
def test_the_suite_finds_a_kind_that_breaks_the_contract(tmp_path, kind):
    with pytest.raises(AssertionError):
        check_task(kind, _spec("classification"), _images(tmp_path), _class_logits)
