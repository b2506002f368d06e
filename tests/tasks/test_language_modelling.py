"""Language modelling against closed forms, from token ids and from text."""

import json
import math

import numpy as np
import pytest
import torch

from automerge.errors import TaskError
from automerge.spec import TaskSpec
from automerge.tasks.language_modelling import IGNORED
from automerge.tasks.task import load_task


def _task(folder=None, **update):
    spec = TaskSpec(name="text", kind="language_modelling", specialist="a", validation="v", test="t", **update)
    return load_task(spec, folder)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A checkpoint folder whose tokenizer has one token a character; its end token is 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, **{chr(97 + index): index + 1 for index in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def _tokens(folder, **arrays):
    path = folder / "d.npz"
    np.savez(path, **{name.replace("inputs_", "inputs."): np.array(array) for name, array in arrays.items()})
    return path


def test_targets_are_the_next_tokens_and_never_padding(tmp_path):
    path = _tokens(
        tmp_path,
        inputs_input_ids=[[5, 6, 7, 8], [5, 6, 0, 0], [0, 5, 6, 7]],
        inputs_attention_mask=[[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]],
    )
    data = _task().load(path)
    assert data.targets["labels"].tolist() == [[6, 7, 8, -100], [6, -100, -100, -100], [-100, 6, 7, -100]]


def test_figures_are_by_token_and_not_by_sample(tmp_path):
    task = _task(metrics=["token_accuracy", "perplexity", "loss"])
    data = task.load(_tokens(tmp_path, inputs=[[0, 1, 2, 3], [3, 3, 0, 0]], labels=[[0, 1, 2, 3], [3, 3, -100, -100]]))
    logits = torch.zeros(2, 4, 4)
    logits[0, 0, 1] = 9.0
    scores = task.score(logits, data.targets)
    uniform, sure = math.log(4), math.log(math.exp(9) + 3) - 9
    assert scores.losses.denominator.tolist() == [3, 1]
    assert scores.mean_loss == pytest.approx((3 * uniform + sure) / 4, rel=1e-5)
    assert scores.metrics["loss"].value == scores.mean_loss
    assert scores.metrics["perplexity"].value == pytest.approx(math.exp(scores.mean_loss))
    assert scores.metrics["token_accuracy"].value == pytest.approx(1 / 4)


def test_chance_is_the_unigram_model(tmp_path):
    task = _task()
    data = task.load(_tokens(tmp_path, inputs=[[9, 1, 1, 1, 2]]))
    assert task.chance("token_accuracy", data) == pytest.approx(3 / 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert task.chance("loss", data) == pytest.approx(entropy)
    assert task.chance("perplexity", data) == pytest.approx(math.exp(entropy))


def test_encoder_decoder_labels_stand_where_the_logits_do(tmp_path):
    arrays = {"inputs_input_ids": [[1, 2, 3]], "inputs_decoder_input_ids": [[0, 4]], "labels": [[4, 5]]}
    path = _tokens(tmp_path, **arrays)
    assert _task().load(path).targets["labels"].tolist() == [[4, 5]]
    assert _task(arguments={"shift": True}).load(path).targets["labels"].tolist() == [[5, IGNORED]]
    del arrays["labels"]
    with pytest.raises(TaskError, match="there are no labels"):
        _task().load(_tokens(tmp_path, **arrays))


def test_packed_text(tmp_path, tokenizer_folder):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "de", "fgh")))
    data = _task(tokenizer_folder, arguments={"sequence_length": 4}).load(path)
    assert data.inputs["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 0, 0]]
    assert data.inputs["attention_mask"].tolist()[2] == [1, 1, 1, 0]
    assert data.targets["labels"].tolist()[2] == [8, 0, IGNORED, IGNORED]


def test_text_with_a_sample_for_each_document(tmp_path, tokenizer_folder):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcdef", "de")))
    data = _task(tokenizer_folder, arguments={"sequence_length": 4, "pack": False}).load(path)
    assert data.inputs["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [4, 5, 0, 0]]
    (tmp_path / "d.txt").write_text("abcd")
    whole = _task(tokenizer_folder, arguments={"sequence_length": 4, "pack": False}).load(tmp_path / "d.txt")
    assert list(whole.inputs) == ["input_ids"]


def test_text_without_a_tokenizer(tmp_path):
    (tmp_path / "d.txt").write_text("abcd")
    with pytest.raises(TaskError, match="need a tokenizer"):
        _task().load(tmp_path / "d.txt")
    with pytest.raises(TaskError, match="there is no tokenizer in this checkpoint"):
        _task(tmp_path).load(tmp_path / "d.txt")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sequence_length": 1}, "tasks.text.arguments.sequence_length: expected a whole number"),
        ({"pack": "no"}, "tasks.text.arguments.pack: expected true or false"),
        ({"sequence_lenght": 8}, "did you mean 'sequence_length'"),
    ],
)
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(TaskError, match=sentence):
        _task(arguments=arguments)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            {"inputs": [[1, 2], [3, 4]], "labels": [[1, 2, 3], [1, 2, 3]]},
            r"labels \[2, 3\] do not fit input_ids \[2, 2\]",
        ),
        ({"inputs": [[1, 2]], "labels": [[1, -5]]}, "a label is negative"),
        ({"inputs": [[1, 2], [3, 4]], "labels": [[1, 2], [3, -100]]}, "sample 1 has no token to predict"),
        ({"inputs": [[0.5, 1.0]]}, "not integers"),
        ({"inputs": [1, 2]}, r"shape \[2\]"),
    ],
)
def test_unusable_tokens(tmp_path, arrays, sentence):
    with pytest.raises(TaskError, match=sentence):
        _task().load(_tokens(tmp_path, **arrays))


def test_tokens_beyond_the_vocabulary(tmp_path):
    task = _task()
    data = task.load(_tokens(tmp_path, inputs=[[1, 9]]))
    with pytest.raises(TaskError, match="the token 9 and the model only 5 outputs"):
        task.score(torch.zeros(1, 2, 5), data.targets)
    with pytest.raises(TaskError, match="not \\[samples, tokens, vocabulary\\]"):
        task.score(torch.zeros(1, 5), data.targets)


def _texts(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("pack", [True, False])
def test_a_document_is_recognised_in_any_company(tmp_path, tokenizer_folder, pack):
    task = _task(tokenizer_folder, arguments={"sequence_length": 4, "pack": pack})
    seen = task.load(_texts(tmp_path / "seen.jsonl", "abc", "de", "fghijk")).sample_digests()
    test = task.load(_texts(tmp_path / "test.jsonl", "vwxyzabc", "de ", "abc", "de", "fgh")).sample_digests()
    assert (len(seen), len(test)) == (3, 5)
    assert [digest in seen for digest in test] == [False, True, True, True, False]


def test_a_batch_has_the_documents_that_begin_in_it(tmp_path, tokenizer_folder):
    data = _task(tokenizer_folder, arguments={"sequence_length": 4}).load(
        _texts(tmp_path / "d.jsonl", "abcdefghij", "kl")
    )
    first, second = data.sample_digests()
    assert [batch.sample_digests() for batch in data.batches(1)] == [[first], [], [second], []]
    assert data.subset([2, 0]).to("cpu").sample_digests() == [second, first]


def test_tokens_are_recognised_whatever_their_padding(tmp_path):
    narrow = _task().load(_tokens(tmp_path, inputs=np.array([[5, 6, 7], [8, 9, 9]], dtype=np.int32)))
    wide = _task().load(
        _tokens(
            tmp_path,
            inputs_input_ids=[[5, 6, 7, 0], [0, 8, 9, 9], [5, 6, 0, 0]],
            inputs_attention_mask=[[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]],
        )
    )
    digests = wide.sample_digests()
    assert digests[:2] == narrow.sample_digests()
    assert len(set(digests)) == 3
