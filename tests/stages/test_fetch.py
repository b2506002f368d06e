"""fetch: everything on local disk, by digest; what cannot be merged is refused before it is downloaded."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.errors import CheckpointError, MergeError, PluginError, StorageError, TaskError
from automerge.spec import Spec
from automerge.stages.documents import Manifest
from automerge.stages.fetch import fetch
from automerge.stages.merge import merge
from automerge.stages.search import search
from automerge.stages.segment import segment
from automerge.testing.s3_server import S3Server
from tests.e2e.tiny import TinyPair, tiny_spec


def changed(spec: Spec, **changes: object) -> Spec:
    return Spec.model_validate({**spec.model_dump(), **changes})


def with_source(spec: Spec, index: int = 0, **changes: object) -> Spec:
    sources = [source.model_dump() for source in spec.sources]
    sources[index] |= changes
    return changed(spec, sources=sources)


def fetched_files(folder: Path) -> list[str]:
    """Everything below a fetch's folder but its metrics."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".prom"
    )


def fetched_and_merged(spec: Spec, folder: Path) -> dict[str, torch.Tensor]:
    """The merged weights of a run without its end."""
    fetch(spec, folder / "fetch")
    segment(spec, folder / "fetch", folder / "segment")
    search(spec, folder / "fetch", folder / "segment", folder / "search")
    merge(spec, folder / "fetch", folder / "search" / "recipe.json", folder / "merge")
    return load_file(folder / "merge" / "model.safetensors")


def metric(folder: Path, name: str) -> float:
    lines = (folder / "metrics" / "fetch.prom").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}{{")).rpartition(" ")[2])


def test_the_manifest_names_every_input_by_digest(spec: Spec, tmp_path: Path) -> None:
    manifest = fetch(spec, tmp_path / "fetch")
    assert [(item.name, item.role) for item in manifest.inputs] == [
        ("base", "base"),
        ("left", "source"),
        ("right", "source"),
        ("left/validation", "validation"),
        ("left/test", "test"),
        ("right/validation", "validation"),
        ("right/test", "test"),
    ]
    assert manifest.spec == spec.digest()
    for item in manifest.inputs:
        for record in item.files:
            content = (tmp_path / "fetch" / record.path).read_bytes()
            assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with open_checkpoint(Path(spec.sources[0].uri)) as checkpoint:
        assert manifest.digests()["left"] == checkpoint.digest()
    assert Manifest.read(tmp_path / "fetch" / "manifest.json") == manifest


def test_a_second_fetch_downloads_nothing(pair: TinyPair, s3_env: S3Server, tmp_path: Path) -> None:
    from automerge.storage import upload

    upload(pair.folder, f"s3://{s3_env.bucket}/reuse")
    spec = tiny_spec(f"s3://{s3_env.bucket}/reuse", "")
    first = fetch(spec, tmp_path)
    assert metric(tmp_path, "automerge_fetch_downloaded_bytes") == metric(tmp_path, "automerge_fetch_size_bytes") > 0
    assert fetch(spec, tmp_path) == first
    assert metric(tmp_path, "automerge_fetch_downloaded_bytes") == 0


def test_a_damaged_copy_is_downloaded_again(pair: TinyPair, s3_env: S3Server, tmp_path: Path) -> None:
    from automerge.storage import upload

    upload(pair.folder, f"s3://{s3_env.bucket}/damaged")
    spec = tiny_spec(f"s3://{s3_env.bucket}/damaged", "")
    first = fetch(spec, tmp_path)
    copy = tmp_path / first.input("left").files[0].path
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fetch(spec, tmp_path) == first
    assert copy.read_bytes() == content


def test_the_specs_sha256_is_checked(spec: Spec, tmp_path: Path) -> None:
    digest = fetch(spec, tmp_path / "first").digests()["left"]
    fetch(with_source(spec, sha256=digest.upper()), tmp_path / "second")
    with pytest.raises(CheckpointError, match=f"'left' at .* has digest {digest}, the spec expects 00ff; correct"):
        fetch(with_source(spec, sha256="00ff"), tmp_path / "third")
    assert not (tmp_path / "third" / "manifest.json").exists()


def test_files_of_an_earlier_fetch_from_elsewhere_do_not_stay(spec: Spec, tmp_path: Path) -> None:
    fetch(spec, tmp_path / "fetch")
    other = tmp_path / "other.safetensors"
    save_file(load_file(spec.sources[0].uri), other)
    fetch(with_source(spec, uri=str(other)), tmp_path / "fetch")
    assert [path.name for path in (tmp_path / "fetch" / "checkpoints" / "left").iterdir()] == ["other.safetensors"]


def test_pytorch_checkpoints_are_compared_once_they_are_here(spec: Spec, tmp_path: Path) -> None:
    state = load_file(spec.sources[0].uri)
    torch.save(state, tmp_path / "left.pt")
    good = with_source(spec, uri=str(tmp_path / "left.pt"))
    assert fetch(good, tmp_path / "fetch").input("left").path == "checkpoints/left/left.pt"
    torch.save({**state, "head.bias": state["head.bias"][:3].clone()}, tmp_path / "left.pt")
    with pytest.raises(CheckpointError, match=r"does not fit .*head\.bias has shape"):
        fetch(good, tmp_path / "fetch")


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"search": {"techniques": ["linear", "tiess"]}}, PluginError, r"search\.techniques\.1: .* 'ties'\?"),
        ({"registry": {"kind": "mlflo"}}, PluginError, r"registry\.kind: unknown registry kind 'mlflo'; .*'mlflow'"),
        ({"base": None, "search": {"techniques": ["ties"]}}, MergeError, "without a base .* ties"),
    ],
)
def test_names_are_checked_before_anything_is_fetched(
    spec: Spec, tmp_path: Path, changes: dict[str, object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        fetch(changed(spec, **changes), tmp_path / "fetch")
    assert fetched_files(tmp_path / "fetch") == []


def test_another_architecture_is_refused_by_the_headers_alone(spec: Spec, tmp_path: Path) -> None:
    state = load_file(spec.sources[1].uri)
    save_file({**state, "head.weight": state["head.weight"][:, :5].clone()}, tmp_path / "narrow.safetensors")
    narrow = with_source(spec, 1, uri=str(tmp_path / "narrow.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"'right' does not fit 'left': 1 tensor: head\.weight has shape \[4, 5\]"
    ):
        fetch(narrow, tmp_path / "fetch")
    assert fetched_files(tmp_path / "fetch") == []
    # What is declared as private may differ.
    fetch(changed(narrow, private=["head.*"]), tmp_path / "fetch")


def test_everything_must_be_there_before_the_first_download(spec: Spec, tmp_path: Path) -> None:
    tasks = [task.model_dump() for task in spec.tasks]
    tasks[1]["test"] = tasks[1]["test"].replace("right-test", "rigth-test")
    with pytest.raises(StorageError, match=r"no such file; did you mean .*right-test\.safetensors\?"):
        fetch(changed(spec, tasks=tasks), tmp_path / "fetch")
    assert fetched_files(tmp_path / "fetch") == []


def test_unusable_data_and_weights_are_named_by_their_place_in_the_spec(spec: Spec, tmp_path: Path) -> None:
    save_file({"inputs": torch.zeros(2, 1, 6, 6)}, tmp_path / "unlabelled.safetensors")
    tasks = [task.model_dump() for task in spec.tasks]
    tasks[0]["test"] = str(tmp_path / "unlabelled.safetensors")
    with pytest.raises(TaskError, match=r"^tasks\.left\.test: .*unlabelled\.safetensors: there are no labels"):
        fetch(changed(spec, tasks=tasks), tmp_path / "fetch")

    state = load_file(spec.sources[0].uri)
    state["head.bias"][1] = torch.inf
    save_file(state, tmp_path / "diverged.safetensors")
    with pytest.raises(MergeError, match=r"source 'left', tensor 'head\.bias': 0 NaN and 1 infinite"):
        fetch(with_source(spec, uri=str(tmp_path / "diverged.safetensors")), tmp_path / "fetch")
    assert not (tmp_path / "fetch" / "manifest.json").exists()


def test_objects_without_a_digest_are_downloaded_once(pair: TinyPair, s3_env: S3Server, tmp_path: Path) -> None:
    client = s3_env.client()
    for key in pair.keys:
        client.put_object(Bucket=s3_env.bucket, Key=f"plain/{key}", Body=(pair.folder / key).read_bytes())
    spec = tiny_spec(f"s3://{s3_env.bucket}/plain", "")
    first = fetch(spec, tmp_path)
    assert fetch(spec, tmp_path) == first
    assert metric(tmp_path, "automerge_fetch_downloaded_bytes") == 0
    # An interrupted fetch has no manifest yet.
    (tmp_path / "manifest.json").unlink()
    assert fetch(spec, tmp_path) == first
    assert metric(tmp_path, "automerge_fetch_downloaded_bytes") == 0

    changed_weights = {name: tensor + 1 for name, tensor in load_file(pair.folder / "left.safetensors").items()}
    save_file(changed_weights, tmp_path / "new.safetensors")
    content = (tmp_path / "new.safetensors").read_bytes()
    assert len(content) == (pair.folder / "left.safetensors").stat().st_size
    client.put_object(Bucket=s3_env.bucket, Key="plain/left.safetensors", Body=content)
    assert fetch(spec, tmp_path).digests()["left"] == hashlib.sha256(content).hexdigest()
    assert metric(tmp_path, "automerge_fetch_downloaded_bytes") == len(content)


def test_a_base_of_another_float_dtype_fits(spec: Spec, tmp_path: Path) -> None:
    assert spec.base is not None
    base = {name: tensor.bfloat16() for name, tensor in load_file(spec.base.uri).items()}
    save_file(base, tmp_path / "base.safetensors")
    half = changed(spec, base={"uri": str(tmp_path / "base.safetensors")})
    fetch(half, tmp_path / "fetch")
    save_file({name: tensor.int() for name, tensor in base.items()}, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"'base' does not fit 'left': .* has dtype int32, expected float32"):
        fetch(half, tmp_path / "fetch")


def test_sources_of_two_float_dtypes_need_an_output_dtype(spec: Spec, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in load_file(spec.sources[1].uri).items()}
    save_file(half, tmp_path / "right.safetensors")
    mixed = with_source(spec, 1, uri=str(tmp_path / "right.safetensors"))
    with pytest.raises(CheckpointError, match=r"'right' does not fit 'left': .* has dtype bfloat16, expected float32"):
        fetch(mixed, tmp_path / "fetch")
    merged = fetched_and_merged(changed(mixed, merge={"dtype": "float32"}), tmp_path / "run")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_a_tied_model_stored_with_one_name_or_both(tmp_path: Path) -> None:
    """A base as PyTorch file with both names, a source with one, and one that stores the tensor twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=True,
    )
    models = {name: LlamaForCausalLM(config) for name in ("base", "one", "twice")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(models["base"].state_dict(), tmp_path / "base" / "pytorch_model.bin")
    twice = {name: tensor.clone() for name, tensor in models["twice"].state_dict().items()}
    save_file(twice, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    tokens = torch.arange(8).repeat(4, 1) + torch.arange(4)[:, None]
    for split, shift in (("validation", 0), ("test", 4)):
        save_file({"inputs.input_ids": tokens + shift}, tmp_path / f"{split}.safetensors")

    def spec_with(**changes: object) -> Spec:
        return Spec.model_validate(
            {
                "name": "tied",
                "model": {"kind": "transformers", "target": "AutoModelForCausalLM"},
                "base": {"uri": str(tmp_path / "base")},
                "sources": [{"name": name, "uri": str(tmp_path / name)} for name in ("one", "twice")],
                "tasks": [
                    {
                        "name": name,
                        "kind": "language_modelling",
                        "specialist": name,
                        "validation": str(tmp_path / "validation.safetensors"),
                        "test": str(tmp_path / "test.safetensors"),
                    }
                    for name in ("one", "twice")
                ],
                "search": {"trials": 2, "initial": 1, "techniques": ["task_arithmetic"], "objective": "soft_metric"},
                "evaluation": {"resamples": 100, "onnx": False, "baselines": False},
                "registry": {"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
                "compute": {"device": "cpu", "threads": 1},
                **changes,
            }
        )

    merged = fetched_and_merged(spec_with(), tmp_path / "run")
    assert "lm_head.weight" not in merged and "model.embed_tokens.weight" in merged

    # What no tie explains is refused, by the headers where the form of the tensor alone says so.
    save_file({**twice, "extra": torch.zeros(3)}, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="'twice' does not fit 'one': 1 tensor: extra is not in 'one'"):
        fetch(spec_with(), tmp_path / "early")
    assert fetched_files(tmp_path / "early") == []
    save_file({**twice, "extra": torch.zeros(8)}, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="'twice' does not fit 'one': 1 tensor: extra is not in 'one'"):
        fetch(spec_with(), tmp_path / "late")


def test_names_that_the_factorys_model_does_not_tie_are_refused_by_the_headers(spec: Spec, tmp_path: Path) -> None:
    state = load_file(spec.sources[1].uri)
    save_file({**state, "twin.bias": state["head.bias"].clone()}, tmp_path / "twin.safetensors")
    with pytest.raises(CheckpointError, match=r"'right' does not fit 'left': 1 tensor: twin\.bias is not in 'left'"):
        fetch(with_source(spec, 1, uri=str(tmp_path / "twin.safetensors")), tmp_path / "fetch")
    assert fetched_files(tmp_path / "fetch") == []
