"""A model from a transformers checkpoint folder, without the network."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from automerge.errors import ModelError
from automerge.models.architecture import load_architecture
from automerge.models.state import load_state, state_names
from automerge.spec import ModelSpec

transformers = pytest.importorskip("transformers")

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "tie_word_embeddings": True,
}


def _folder(tmp_path, config):
    folder = tmp_path / "checkpoint"
    config.save_pretrained(folder)
    return folder


def _architecture(folder, target, **update):
    return load_architecture(ModelSpec(kind="transformers", target=target, **update), {"a": folder})


def test_a_causal_language_model_computes_what_from_pretrained_computes(tmp_path):
    folder = tmp_path / "checkpoint"
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    original.save_pretrained(folder)
    architecture = _architecture(folder, "AutoModelForCausalLM")
    module = architecture.build("a", {})
    assert not module.training
    assert state_names(module).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    from safetensors.torch import load_file

    load_state(module, load_file(folder / "model.safetensors"), "a")
    assert module.lm_head.weight is module.model.embed_tokens.weight
    inputs = architecture.example(module)
    assert inputs["input_ids"].shape == (1, 16)
    logits = architecture.call(module, {**inputs, "attention_mask": torch.ones(1, 16, dtype=torch.int64)})
    torch.testing.assert_close(logits, original(**inputs).logits)


def test_frequencies_stay_float32_under_half_precision_weights(tmp_path):
    folder = _folder(tmp_path, transformers.LlamaConfig(**LLAMA))
    module = _architecture(folder, "LlamaForCausalLM").build("a", {})
    before = module.model.rotary_emb.inv_freq.clone()
    state = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in module.state_dict().items()}
    load_state(module, state, "a")
    assert module.dtype == torch.bfloat16
    assert torch.equal(module.model.rotary_emb.inv_freq, before)


def test_an_unknown_buffer_of_old_checkpoints_is_still_an_error(tmp_path):
    folder = _folder(tmp_path, transformers.LlamaConfig(**LLAMA))
    module = _architecture(folder, "LlamaForCausalLM").build("a", {})
    with pytest.raises(ModelError, match=r"does not know: something.else"):
        load_state(module, {**module.state_dict(), "something.else": torch.zeros(1)}, "a")


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CASES = [
    (
        "AutoModelForImageClassification",
        lambda: transformers.ViTConfig(**VISION, image_size=16, patch_size=8, num_channels=1),
        {"pixel_values": [1, 1, 16, 16]},
        [1, 2],
    ),
    (
        "AutoModelForImageClassification",
        lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        {"pixel_values": [1, 3, 224, 224]},
        [1, 2],
    ),
    (
        "AutoModelForSeq2SeqLM",
        lambda: transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=30),
        {"input_ids": [1, 16], "decoder_input_ids": [1, 8]},
        [1, 8, 30],
    ),
    (
        "WhisperForConditionalGeneration",
        lambda: transformers.WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=20,
            vocab_size=30,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
        ),
        {"input_features": [1, 8, 40], "decoder_input_ids": [1, 8]},
        [1, 8, 30],
    ),
    (
        "AutoModelForSequenceClassification",
        lambda: transformers.BertConfig(**VISION, vocab_size=30, max_position_embeddings=12),
        {"input_ids": [1, 12]},
        [1, 2],
    ),
]


@pytest.mark.parametrize(
    ("target", "config", "shapes", "logits"), CASES, ids=["vit", "resnet", "t5", "whisper", "bert"]
)
def test_example_inputs_from_the_configuration(tmp_path, target, config, shapes, logits):
    architecture = _architecture(_folder(tmp_path, config()), target)
    module = architecture.build("a", {})
    inputs = architecture.example(module)
    assert {name: list(tensor.shape) for name, tensor in inputs.items()} == shapes
    with torch.no_grad():
        assert list(architecture.call(module, inputs).shape) == logits
    with torch.device("meta"):
        module = architecture.build("a", {})
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        assert list(architecture.call(module, architecture.example(module)).shape) == logits


def test_arguments_are_entries_of_the_configuration(tmp_path):
    folder = _folder(tmp_path, transformers.ViTConfig(**VISION, image_size=16, patch_size=8))
    architecture = _architecture(folder, "AutoModelForImageClassification", arguments={"num_labels": 4})
    assert architecture.build("a", {}).classifier.out_features == 4
    eager = architecture.build("a", {"num_labels": 7, "attn_implementation": "eager"})
    assert eager.classifier.out_features == 7
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(
        ModelError, match=r"model.arguments: ViTConfig has no entry 'num_chanels'; did you mean 'num_channels'"
    ):
        architecture.build("a", {"num_chanels": 1})


def test_wrong_classes(tmp_path):
    folder = _folder(tmp_path, transformers.ViTConfig(**VISION, image_size=16, patch_size=8))
    for target, sentence in (
        (
            "AutoModelForCausalLN",
            "transformers has no class 'AutoModelForCausalLN'; did you mean 'AutoModelForCausalLM'",
        ),
        ("AutoConfig", "transformers.AutoConfig is not a model class"),
        ("AutoModelForCausalLM", "cannot be built from the config.json of 'a' \\(ViTConfig\\): ValueError"),
    ):
        with pytest.raises(ModelError, match=r"model.target: .*" + sentence):
            _architecture(folder, target).build("a", {})


def test_a_folder_without_a_usable_configuration(tmp_path):
    architecture = _architecture(tmp_path, "AutoModel")
    with pytest.raises(ModelError, match=r"the checkpoint of 'a' has no config.json"):
        architecture.build("a", {})
    for content in ("{", "{}", json.dumps({"model_type": "no_such_model"})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config.json: transformers cannot read it"):
            architecture.build("a", {})


def test_code_of_a_checkpoint_runs_only_where_the_spec_says_so(tmp_path):
    ran = tmp_path / "ran"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig"}}))
    (folder / "code.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(ran)!r}, 'w')\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(ModelError, match=r"set model.trust_remote_code: true"):
        _architecture(folder, "AutoModel").build("a", {})
    assert not ran.exists()
    trusting = _architecture(folder, "AutoModel", trust_remote_code=True)
    with pytest.raises(ModelError, match="OwnConfig"):
        trusting.build("a", {})
    assert ran.exists()
    assert [path.name for path in trusting.companion_files(folder)] == ["code.py", "config.json"]


def test_code_of_another_repository_is_never_run(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "some/where--code.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"names code outside the checkpoint \(some/where--code.OwnConfig\)"):
        _architecture(tmp_path, "AutoModel", trust_remote_code=True).build("a", {})


def test_parameters_are_not_filled_with_random_numbers(tmp_path):
    folder = _folder(tmp_path, transformers.LlamaConfig(**LLAMA))
    state = torch.get_rng_state()
    _architecture(folder, "AutoModelForCausalLM").build("a", {})
    assert torch.equal(torch.get_rng_state(), state)


def test_companion_files(tmp_path):
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "README.md",
        "merges.txt",
        "preprocessor_config.json",
    ):
        (tmp_path / name).touch()
    expected = ["config.json", "merges.txt", "preprocessor_config.json", "tokenizer.json"]
    architecture = _architecture(tmp_path, "AutoModel")
    assert [path.name for path in architecture.companion_files(tmp_path)] == expected
    assert [path.name for path in architecture.companion_files(tmp_path / "model.safetensors")] == expected
