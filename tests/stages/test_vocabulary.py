"""Sources to which tokens were added: refused unless the spec says what to do, then merged into a model that runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from automerge.errors import CheckpointError, MergeError, SpecError
from automerge.merging.recipe import Recipe
from automerge.spec import MergeSpec, Spec, parse_spec
from automerge.stages.evaluate import evaluate
from automerge.stages.fetch import fetch
from automerge.stages.merge import merge
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.stages.tokens import check_added_tokens
from tests.checkpoint.adapters import lora, write_adapter

ROWS = {"base": 16, "same": 16, "grown": 18, "other": 20}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, and children of it with more tokens; data that use each child's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vocabulary")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS["base"],
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=request.param,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, rows in ROWS.items():
        if name != "base":
            model = LlamaForCausalLM.from_pretrained(folder / "base")
            model.resize_token_embeddings(rows, mean_resizing=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(folder / name)
        tokens = torch.arange(8).repeat(6, 1) * 3 + torch.arange(6)[:, None]
        save_file({"inputs.input_ids": tokens % rows}, folder / f"{name}.safetensors")
    return folder


def spec_of(folder: Path, *sources: str, rule: str = "error", base: bool = True, **changes: Any) -> Spec:
    value: dict[str, Any] = {
        "name": "vocabulary",
        "model": {"kind": "transformers", "target": "AutoModelForCausalLM"},
        "sources": [{"name": name, "uri": str(folder / name)} for name in sources],
        "tasks": [
            {
                "name": name,
                "kind": "language_modelling",
                "specialist": name,
                "validation": str(folder / f"{name}.safetensors"),
                "test": str(folder / f"{name}.safetensors"),
            }
            for name in sources
        ],
        # Models of random weights are no better than a guess, which leaves the metrics undefined.
        "search": {
            "trials": 4,
            "initial": 2,
            "refine": {"steps": 20, "starts": 1},
            "techniques": ["linear", "task_arithmetic"] if base else ["linear"],
            "objective": "soft_metric",
        },
        "evaluation": {"resamples": 100, "onnx": False, "baselines": base},
        "merge": {"vocabulary": rule},
        "compute": {"device": "cpu", "threads": 1},
        **changes,
    }
    return Spec.model_validate(value | ({"base": {"uri": str(folder / "base")}} if base else {}))


def run(spec: Spec, folder: Path) -> dict[str, Tensor]:
    fetch(spec, folder / "fetch")
    segment(spec, folder / "fetch", folder / "segment")
    search(spec, folder / "fetch", folder / "segment", folder / "search")
    merge(spec, folder / "fetch", folder / "search" / "recipe.json", folder / "merge")
    return load_file(folder / "merge" / "model.safetensors")


def evaluated(spec: Spec, folder: Path) -> list[str]:
    found = evaluate(spec, *(folder / name for name in ("fetch", "segment", "search", "merge")), folder / "evaluation")
    return [model.name for model in found.models]


def loads(folder: Path, rows: int) -> None:
    """transformers loads the result, and its vocabulary is of that size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == rows
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows
    merged = load_file(folder / "model.safetensors")
    for name in merged:
        assert torch.equal(model.state_dict()[name], merged[name])


def test_the_default_is_an_error_that_names_the_option(project: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight has shape \[18, 8\], .*say with merge\.vocabulary"
    ):
        fetch(spec_of(project, "same", "grown"), tmp_path)
    assert not (tmp_path / "checkpoints").exists(), "the headers were enough"


def test_the_largest_vocabulary(project: Path, tmp_path: Path) -> None:
    spec = spec_of(project, "grown", "other", rule="largest")
    merged = run(spec, tmp_path)
    other = load_file(project / "other" / "model.safetensors")
    for name in EMBEDDINGS:
        if name in merged:
            assert merged[name].shape == (20, 8)
            torch.testing.assert_close(merged[name][18:], other[name][18:])
    recipe = Recipe.read(tmp_path / "search" / "recipe.json")
    assert recipe.vocabulary is not None
    assert (recipe.vocabulary.rule, recipe.vocabulary.rows) == ("largest", 20)
    assert recipe.vocabulary.tensors == sorted(name for name in EMBEDDINGS if name in merged)
    loads(tmp_path / "merge", 20)
    # Each model with its own number of tokens; the base and 'grown' cannot read the tokens of 'other'.
    rows = evaluated(spec, tmp_path)
    assert {"merged", "other", "linear"} <= set(rows) and "base" not in rows


def test_the_bases_vocabulary(project: Path, tmp_path: Path) -> None:
    changed = spec_of(project, "same", "grown", rule="base").model_dump()
    changed["tasks"][1] |= {split: str(project / "same.safetensors") for split in ("validation", "test")}
    spec = Spec.model_validate(changed)
    merged = run(spec, tmp_path)
    assert merged["model.embed_tokens.weight"].shape == (16, 8)
    loads(tmp_path / "merge", 16)
    assert {"merged", "base", "same", "grown"} <= set(evaluated(spec, tmp_path))


def test_without_a_base(project: Path, tmp_path: Path) -> None:
    merged = run(spec_of(project, "same", "other", rule="largest", base=False), tmp_path)
    assert merged["model.embed_tokens.weight"].shape == (20, 8)
    loads(tmp_path / "merge", 20)


def test_a_rule_changes_nothing_where_the_vocabularies_are_equal(project: Path, tmp_path: Path) -> None:
    twice = [{"name": name, "uri": str(project / "same")} for name in ("same", "again")]
    with_rule = spec_of(project, "same", "again", rule="largest").model_dump() | {"sources": twice}
    for task in with_rule["tasks"]:
        task |= {split: str(project / "same.safetensors") for split in ("validation", "test")}
    without = with_rule | {"merge": {}}
    recipes = []
    for at, value in enumerate((with_rule, without)):
        run(Spec.model_validate(value), tmp_path / str(at))
        recipes.append((tmp_path / str(at) / "search" / "recipe.json").read_bytes())
    assert recipes[0] == recipes[1]


def test_an_adapter_whose_embedding_grew(project: Path, tmp_path: Path) -> None:
    """Its configuration is the base's, its number of tokens its own."""
    base = load_file(project / "base" / "model.safetensors")
    grown = torch.cat([base["model.embed_tokens.weight"], torch.ones(3, 8)])
    parts = lora("model.layers.0.mlp.up_proj", 12, 8) | {"model.embed_tokens.weight": grown}
    # PEFT saves a tied one under both its names.
    untied = "lm_head.weight" in base
    parts["lm_head.weight"] = torch.cat([base["lm_head.weight"], torch.zeros(3, 8)]) if untied else grown
    write_adapter(tmp_path / "adapter", parts)
    value = spec_of(project, "adapter", "same", rule="largest").model_dump()
    value["sources"][0]["uri"] = str(tmp_path / "adapter")
    value["tasks"][0] |= {split: str(project / "grown.safetensors") for split in ("validation", "test")}
    spec = Spec.model_validate(value)
    merged = run(spec, tmp_path / "run")
    torch.testing.assert_close(merged["model.embed_tokens.weight"][16:], torch.ones(3, 8))
    loads(tmp_path / "run" / "merge", 19)
    assert json.loads((project / "base" / "config.json").read_text())["vocab_size"] == 16
    assert {"merged", "adapter"} <= set(evaluated(spec, tmp_path / "run"))


@pytest.mark.parametrize("form", ["map", "list", "added"])
def test_one_number_for_two_tokens_is_refused(project: Path, tmp_path: Path, form: str) -> None:
    """Where the checkpoints bring their tokenizers; numbers that every checkpoint has are not looked at."""

    def tokenizer(*added: str) -> str:
        words = [f"w{number}" for number in range(16)]
        every = [*words, *added]
        if form == "added":
            content = [{"id": 16 + at, "content": token} for at, token in enumerate(added)]
            return json.dumps(
                {"model": {"vocab": {word: at for at, word in enumerate(words)}}, "added_tokens": content}
            )
        vocabulary = [[word, -1.0] for word in every] if form == "list" else {word: at for at, word in enumerate(every)}
        return json.dumps({"model": {"vocab": vocabulary}})

    spec = spec_of(tmp_path, "grown", "other", rule="largest")
    for name in ("base", "grown", "other"):
        shutil.copytree(project / name, tmp_path / name)
        shutil.copyfile(project / f"{'same' if name == 'base' else name}.safetensors", tmp_path / f"{name}.safetensors")
    (tmp_path / "base" / "tokenizer.json").write_text(tokenizer().replace("w3", "renamed"))
    (tmp_path / "grown" / "tokenizer.json").write_text(tokenizer("<a>", "<b>"))
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer("<a>", "<b>", "<c>", "<d>"))
    fetch(spec, tmp_path / "fetch")
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer("<a>", "<x>", "<c>", "<d>"))
    with pytest.raises(
        CheckpointError, match=r"token 17 is '<b>' in 'grown' and '<x>' in 'other', so their embeddings"
    ):
        fetch(spec, tmp_path / "fetch")
    fetch(spec.model_copy(update={"merge": MergeSpec(vocabulary="base")}), tmp_path / "fetch")


def write_tokens(path: Path, *tokens: str) -> None:
    path.write_text(json.dumps({"model": {"vocab": {token: number for number, token in enumerate(tokens)}}}))


class TestTokens:
    """What is read of the tokenizers, without a model."""

    @staticmethod
    def folders(folder: Path, **tokens: str) -> dict[str, Path]:
        for name, each in tokens.items():
            (folder / name).mkdir()
            write_tokens(folder / name / "tokenizer.json", *each)
        return {name: folder / name for name in tokens}

    def test_rows_without_a_token_hide_no_clash(self, tmp_path: Path) -> None:
        folders = self.folders(tmp_path, base="xyz", grown="xyzab", other="xyzac")
        with pytest.raises(CheckpointError, match="token 4 is 'b' in 'grown' and 'c' in 'other'"):
            check_added_tokens(folders, 8, 8)
        check_added_tokens(folders, 8, 4)

    def test_numbers_that_every_checkpoint_has_are_not_looked_at(self, tmp_path: Path) -> None:
        check_added_tokens(self.folders(tmp_path, grown="xyza", other="xyzb"), 4, 8)
        check_added_tokens(self.folders(tmp_path, empty=""), 4, 8)

    @pytest.mark.parametrize(
        "content",
        [
            '{"model": 3}',
            '{"added_tokens": [{"id": "5", "content": "x"}]}',
            '{"added_tokens": [{"id": 5, "content": null}]}',
            '{"added_tokens": [{"id": true, "content": "x"}]}',
            '{"model": {"vocab": {"x": null, "y": 1}}}',
            '{"model": {"vocab": {"x": 0.5}}}',
            '{"model": {"vocab": [[null, -1.0]]}}',
        ],
    )
    def test_a_malformed_file_is_one_sentence(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer file; get it again"):
            check_added_tokens({"a": tmp_path}, 0, 9)


def test_named_tensors(project: Path, tmp_path: Path) -> None:
    """Patterns take the place of what the model says; each must match, and one checkpoint has one number of rows."""
    named = {"vocabulary": "largest", "vocabulary_tensors": ["*embed_tokens*", "lm_head.*"]}
    fetch(spec_of(project, "grown", "other", merge=named), tmp_path / "good")
    with pytest.raises(SpecError, match=r"merge\.vocabulary_tensors: no tensor of the model matches nothing\.\*"):
        fetch(
            spec_of(project, "grown", "other", merge=named | {"vocabulary_tensors": ["nothing.*"]}), tmp_path / "none"
        )
    with pytest.raises(
        MergeError, match=r"'base': 'model\.embed_tokens\.weight' has 16 rows and 'model\.norm\.weight' 8, so"
    ):
        patterns = ["*embed_tokens*", "model.norm*"]
        fetch(spec_of(project, "grown", "other", merge=named | {"vocabulary_tensors": patterns}), tmp_path / "two")


def test_the_spec_is_checked(project: Path) -> None:
    text = spec_of(project, "same", "grown", rule="largest", base=False).model_dump(mode="json")
    with pytest.raises(SpecError, match=r"merge\.vocabulary: 'base' keeps the base's rows, and the spec names no base"):
        parse_spec(json.dumps(text | {"merge": {"vocabulary": "base"}}), folder=project)
    with pytest.raises(SpecError, match="vocabulary_tensors: has no effect while vocabulary is 'error'"):
        parse_spec(json.dumps(text | {"merge": {"vocabulary_tensors": ["x"]}}), folder=project)


class TestFactory:
    """A model of one's own: it says which tensors are its vocabulary, and takes another size."""

    CODE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.embed = nn.Embedding(tokens, 4)
        self.out = nn.Linear(4, tokens)
    def forward(self, input_ids):
        return self.out(self.embed(input_ids))
class Talkative(Net):
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.out
    def resize_token_embeddings(self, tokens):
        self.embed, self.out = nn.Embedding(tokens, 4), nn.Linear(4, tokens)
"""

    def spec(self, folder: Path, name: str, **merge: Any) -> Spec:
        from torch import nn

        (folder / f"nets_{name.lower()}.py").write_text(self.CODE)
        for seed, (source, rows) in enumerate({"base": 5, "a": 5, "b": 7}.items()):
            torch.manual_seed(seed)
            state = {f"embed.{k}": v for k, v in nn.Embedding(rows, 4).state_dict().items()}
            state |= {f"out.{k}": v for k, v in nn.Linear(4, rows).state_dict().items()}
            save_file(state, folder / f"{source}.safetensors")
            save_file({"inputs.input_ids": torch.arange(6).reshape(2, 3) % rows}, folder / f"{source}-data.safetensors")
        value = spec_of(folder, "a", "b", merge={"vocabulary": "largest", **merge}).model_dump()
        value["model"] = {
            "kind": "factory",
            "target": f"nets_{name.lower()}:{name}",
            "python_path": [str(folder)],
            "arguments": {"tokens": 5},
            "example": {"input_ids": {"shape": [1, 3], "dtype": "int64"}},
        }
        value["base"]["uri"] = str(folder / "base.safetensors")
        for source, task in zip(value["sources"], value["tasks"], strict=True):
            source["uri"] = str(folder / f"{source['name']}.safetensors")
            task |= {split: str(folder / f"{task['name']}-data.safetensors") for split in ("validation", "test")}
        return Spec.model_validate(value)

    def test_one_that_has_these_methods(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, "Talkative")
        merged = run(spec, tmp_path / "run")
        assert {name: len(tensor) for name, tensor in merged.items()} == {
            "embed.weight": 7,
            "out.weight": 7,
            "out.bias": 7,
        }
        rows = evaluated(spec, tmp_path / "run")
        assert {"merged", "b", "ties"} <= set(rows) and "a" not in rows, "which cannot read the tokens of b"

    def test_a_private_part_of_the_vocabulary(self, tmp_path: Path) -> None:
        """It keeps its rows, and the model has one number of them."""
        spec = self.spec(tmp_path, "Talkative")
        split = spec.model_copy(update={"private": ["out.*"]})
        with pytest.raises(
            SpecError,
            match=r"private: 'out\.bias', 'out\.weight' are of the vocabulary, whose other tensors change their number "
            "of rows; make all of them private, or none",
        ):
            fetch(split, tmp_path / "split")
        equal = split.model_dump()
        equal["sources"][1]["uri"] = equal["sources"][0]["uri"]
        equal["tasks"][1] |= {name: equal["tasks"][0][name] for name in ("validation", "test")}
        fetch(Spec.model_validate(equal), tmp_path / "equal")

    def test_two_tokens_in_rows_that_all_have(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, "Talkative").model_dump()
        for name, token in {"a": "<a>", "c": "<c>"}.items():
            (tmp_path / name).mkdir()
            shutil.copyfile(tmp_path / "a.safetensors", tmp_path / name / "model.safetensors")
            write_tokens(tmp_path / name / "tokenizer.json", "x", "y", "z", token)
        (tmp_path / "base").mkdir()
        shutil.copyfile(tmp_path / "base.safetensors", tmp_path / "base" / "model.safetensors")
        write_tokens(tmp_path / "base" / "tokenizer.json", "x", "y", "z")
        spec["base"]["uri"] = str(tmp_path / "base")
        for source, task, folder in zip(spec["sources"], spec["tasks"], "ac", strict=True):
            source["uri"] = str(tmp_path / folder)
            task |= {split: str(tmp_path / "a-data.safetensors") for split in ("validation", "test")}
        with pytest.raises(CheckpointError, match="token 3 is '<a>' in 'a' and '<c>' in 'b'"):
            fetch(Spec.model_validate(spec), tmp_path / "fetch")

    def test_one_that_has_not(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="the model does not say which of its tensors have one row per token; name"):
            fetch(self.spec(tmp_path, "Net"), tmp_path / "fetch")
        named = self.spec(tmp_path, "Net", vocabulary_tensors=["embed.*", "out.*"])
        fetch(named, tmp_path / "run" / "fetch")
        from automerge.errors import ModelError

        with pytest.raises(ModelError, match="Net is built for another number of tokens than the 7 of the weights"):
            run(named, tmp_path / "run")
