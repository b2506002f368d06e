"""A LoRA adapter on its base reads like the checkpoint that PEFT's merge_and_unload would write.

The expected weights come from the formulas of the papers, element by element in float64, not from the code under test.
"""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from automerge.checkpoint import Checkpoint, checkpoint_digest, open_checkpoint, sha256_file
from automerge.checkpoint import adapter as adapter_module
from automerge.checkpoint.adapter import Adapter
from automerge.checkpoint.peek import peek_tensors
from automerge.errors import CheckpointError
from tests.checkpoint.adapters import PREFIX, lora, write_adapter

BASE = {
    "q.weight": torch.linspace(-1, 1, 24).reshape(6, 4),
    "q.bias": torch.arange(6.0),
    "square.weight": torch.linspace(0, 1, 16).reshape(4, 4),
    "emb.weight": torch.linspace(-2, 2, 20).reshape(5, 4),
    "conv.weight": torch.linspace(-1, 1, 6 * 3 * 2 * 2).reshape(6, 3, 2, 2),
    "line.weight": torch.linspace(-1, 1, 6 * 3 * 2).reshape(6, 3, 2),
    "head.weight": torch.ones(3, 4),
    "steps": torch.tensor(3),
}


def product(b: Tensor, a: Tensor) -> Tensor:
    """B @ A in plain Python numbers."""
    rows, rank, columns = len(b), len(a), a.shape[1]
    return torch.tensor(
        [
            [math.fsum(float(b[i, k]) * float(a[k, j]) for k in range(rank)) for j in range(columns)]
            for i in range(rows)
        ],
        dtype=torch.float64,
    )


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    save_file(BASE, tmp_path / "base.safetensors")
    return open_checkpoint(tmp_path / "base.safetensors")


def opened(base: Checkpoint, folder: Path, tensors: dict[str, Tensor], **config: Any) -> Adapter:
    adapter = open_checkpoint(write_adapter(folder, tensors, **config), base)
    assert isinstance(adapter, Adapter)
    return adapter


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_what_is_adapted_and_what_is_not(base: Checkpoint, tmp_path: Path, binary: bool) -> None:
    parts = lora("q", 6, 4)
    adapter = opened(base, tmp_path / "lora", parts, binary=binary)
    assert adapter.tensors == base.tensors
    assert adapter.changed == ["q.weight"]
    a, b = parts.values()
    close(adapter.read("q.weight"), BASE["q.weight"].double() + 6 / 2 * product(b, a))
    for name in BASE:
        if name != "q.weight":
            assert torch.equal(adapter.read(name), BASE[name])
            assert adapter.extent(name) == base.extent(name)
    assert adapter.extent("q.weight") is None


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 10}}, 5.0),
        ({"alpha_pattern": {"k": 10, "deep.q": 8, "q": 12}}, 4.0),
        ({"alpha_pattern": {r"layers\.\d+\.deep\.q": 10}}, 5.0),
        ({"alpha_pattern": {"^deep.q": 10, "eep.q": 10, "": 10}}, 3.0),
        ({"r": 4, "rank_pattern": {".*deep.*": 2}}, 3.0),
        ({"rank_pattern": None, "alpha_pattern": None}, 3.0),
    ],
)
def test_the_scale(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    name = "layers.7.deep.q"
    save_file({f"{name}.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    parts = lora(name, 6, 4)
    adapter = opened(open_checkpoint(tmp_path / "base.safetensors"), tmp_path / "lora", parts, **config)
    a, b = parts.values()
    close(adapter.read(f"{name}.weight"), scale * product(b, a))


def test_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds [in, out]; of a square one only the flag says it."""
    save_file({"wide.weight": torch.zeros(4, 6), "square.weight": torch.zeros(4, 4)}, tmp_path / "base.safetensors")
    base = open_checkpoint(tmp_path / "base.safetensors")
    parts = lora("wide", 6, 4) | lora("square", 4, 4, seed=1)
    a, b, square_a, square_b = parts.values()
    adapter = opened(base, tmp_path / "lora", parts, fan_in_fan_out=True)
    close(adapter.read("wide.weight"), 3 * product(b, a).T)
    close(adapter.read("square.weight"), 3 * product(square_b, square_a).T)
    # The flag that PEFT writes is that of the last layer: where the shapes contradict it, a square one is ambiguous.
    alone = opened(base, tmp_path / "alone", lora("wide", 6, 4))
    close(alone.read("wide.weight"), 3 * product(b, a).T)
    with pytest.raises(CheckpointError, match=r"square\.weight is square, and fan_in_fan_out contradicts"):
        opened(base, tmp_path / "lora", parts)


def test_embeddings_and_convolutions(base: Checkpoint, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "emb.lora_embedding_A": torch.randn(2, 5, generator=generator),
        "emb.lora_embedding_B": torch.randn(4, 2, generator=generator),
        "conv.lora_A.weight": torch.randn(2, 3, 2, 2, generator=generator),
        "conv.lora_B.weight": torch.randn(6, 2, 1, 1, generator=generator),
        "line.lora_A.weight": torch.randn(2, 3, 2, generator=generator),
        "line.lora_B.weight": torch.randn(6, 2, 1, generator=generator),
    }
    adapter = opened(base, tmp_path / "lora", parts)
    emb_a, emb_b, conv_a, conv_b, line_a, line_b = parts.values()
    close(adapter.read("emb.weight"), BASE["emb.weight"] + 3 * product(emb_b, emb_a).T)
    for name, a, b in (("conv", conv_a, conv_b), ("line", line_a, line_b)):
        delta = torch.zeros(BASE[f"{name}.weight"].shape, dtype=torch.float64)
        for index in itertools.product(*map(range, delta.shape)):
            delta[index] = sum(b[index[0], k].item() * a[(k, *index[1:])].item() for k in range(2))
        close(adapter.read(f"{name}.weight"), BASE[f"{name}.weight"] + 3 * delta)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_scales_each_output_to_its_magnitude(tmp_path: Path, transposed: bool) -> None:
    weight = torch.linspace(-1, 1, 24).reshape(6, 4)
    save_file({"q.weight": weight.T.contiguous() if transposed else weight}, tmp_path / "base.safetensors")
    magnitude = torch.arange(1.0, 7.0)
    parts = lora("q", 6, 4)
    a, b = parts.values()
    expected = weight.double() + 3 * product(b, a)
    for row, length in zip(expected, magnitude, strict=True):
        row *= float(length) / math.sqrt(math.fsum(float(x) ** 2 for x in row))
    base = open_checkpoint(tmp_path / "base.safetensors")
    adapter = opened(base, tmp_path / "lora", parts | {"q.lora_magnitude_vector": magnitude}, use_dora=True)
    close(adapter.read("q.weight"), expected.T if transposed else expected)


def test_modules_that_were_trained_whole(base: Checkpoint, tmp_path: Path) -> None:
    """They take the base's place, in any shape; some are new."""
    parts = lora("q", 6, 4) | {
        "head.weight": torch.full((7, 4), 2.0, dtype=torch.float16),
        "score.dense.weight": torch.ones(2, 2),
        "old.modules_to_save.weight": torch.zeros(1),
    }
    adapter = opened(base, tmp_path / "lora", parts, modules_to_save=["head", "score", "old"])
    assert adapter.changed == ["head.weight", "old.weight", "q.weight", "score.dense.weight"]
    assert list(adapter.tensors) == sorted(adapter.tensors)
    head = adapter.read("head.weight")
    assert (head.dtype, head.shape) == (torch.float16, (7, 4))
    assert adapter.tensors["head.weight"].shape == (7, 4)
    assert adapter.read("score.dense.weight").tolist() == [[1, 1], [1, 1]]
    extent = adapter.extent("head.weight")
    assert extent is not None and extent.file.name == "adapter_model.safetensors"


def test_an_embedding_that_grew_and_is_adapted_as_well(base: Checkpoint, tmp_path: Path) -> None:
    grown = torch.ones(8, 4)
    parts = {
        "emb.base_layer.weight": grown,
        "emb.lora_embedding_A": torch.ones(2, 8),
        "emb.lora_embedding_B": torch.ones(4, 2),
    }
    adapter = opened(base, tmp_path / "lora", parts)
    assert adapter.tensors["emb.weight"].shape == (8, 4)
    assert adapter.read("emb.weight").tolist() == (grown + 3 * 2).tolist()


def test_names_of_adapters_in_the_keys(base: Checkpoint, tmp_path: Path) -> None:
    """As a state dict that was not saved by PEFT has them."""
    parts = {name.replace(".weight", ".default.weight"): tensor for name, tensor in lora("q", 6, 4).items()}
    parts |= {"head.modules_to_save.default.weight": torch.zeros(3, 4)}
    adapter = opened(base, tmp_path / "lora", parts, modules_to_save=["head"])
    assert adapter.changed == ["head.weight", "q.weight"]
    two = parts | {name.replace("default", "other"): tensor for name, tensor in parts.items() if "lora" in name}
    with pytest.raises(CheckpointError, match=r"holds several adapters \(default, other\)"):
        opened(base, tmp_path / "lora", two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_an_adapted_tensor_is_rounded_once_to_the_bases_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 24).reshape(6, 4).to(dtype)
    save_file({"q.weight": weight}, tmp_path / "base.safetensors")
    parts = {name: tensor.bfloat16() for name, tensor in lora("q", 6, 4).items()}
    adapter = opened(open_checkpoint(tmp_path / "base.safetensors"), tmp_path / "lora", parts)
    a, b = parts.values()
    found = adapter.read("q.weight")
    assert found.dtype == dtype == adapter.tensors["q.weight"].torch_dtype
    assert torch.equal(found.double(), (weight.double() + 3 * product(b, a)).to(dtype).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_sum_that_leaves_the_bases_dtype_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    largest = torch.full((6, 4), torch.finfo(dtype).max).to(dtype)
    save_file({"q.weight": largest}, tmp_path / "base.safetensors")
    parts = {"q.lora_A.weight": torch.full((2, 4), 99.0), "q.lora_B.weight": torch.full((6, 2), 99.0)}
    adapter = opened(open_checkpoint(tmp_path / "base.safetensors"), tmp_path / "lora", parts)
    with pytest.raises(
        CheckpointError, match=r"24 values of 'q\.weight' on the base are not finite in its dtype, float"
    ):
        adapter.read("q.weight")


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    """Of several tiles, the last a small one."""
    rows = 3 * (adapter_module._TILE // 333) + 1
    save_file({"q.weight": torch.randn(rows, 333)}, tmp_path / "base.safetensors")
    adapter = opened(open_checkpoint(tmp_path / "base.safetensors"), tmp_path / "lora", lora("q", rows, 333))
    results = [adapter.read("q.weight")]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(adapter.read("q.weight"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_digest_is_that_of_the_adapters_two_files(base: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    adapter = opened(base, folder, lora("q", 6, 4))
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert [file.name for file in adapter.files] == list(names)
    assert adapter.digest() == checkpoint_digest({name: sha256_file(folder / name) for name in names})
    other = opened(base, tmp_path / "other", lora("q", 6, 4), lora_alpha=7)
    assert other.digest() != adapter.digest()


def test_a_tensor_that_the_base_holds_under_two_names(tmp_path: Path) -> None:
    shared = torch.zeros(5, 4)
    torch.save({"emb.weight": shared, "out.weight": shared, "x": torch.zeros(1)}, tmp_path / "base.pt")
    base = open_checkpoint(tmp_path / "base.pt")
    assert base.aliases == {"out.weight": "emb.weight"}
    parts = lora("out", 5, 4)
    adapter = opened(base, tmp_path / "lora", parts)
    assert adapter.aliases == base.aliases and adapter.changed == ["emb.weight", "out.weight"]
    assert torch.equal(adapter.read("emb.weight"), adapter.read("out.weight"))
    assert adapter.read("emb.weight").any()
    apart = opened(base, tmp_path / "apart", {"out.weight": torch.ones(5, 4)}, modules_to_save=["out"])
    assert apart.aliases == {} and apart.changed == ["out.weight"]
    with pytest.raises(CheckpointError, match=r"two names of one tensor of the base, 'emb\.weight' and 'out\.weight'"):
        opened(base, tmp_path / "both", parts | lora("emb", 5, 4))


def test_peeking_sees_what_opening_sees(base: Checkpoint, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", lora("q", 6, 4) | {"head.weight": torch.zeros(9, 4)})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def reader(name: str, start: int, stop: int) -> bytes:
        assert name == "adapter_config.json" or stop < 1000, "only the header"
        return files[name][start:stop]

    sizes = {name: len(content) for name, content in files.items()}
    assert peek_tensors(sizes, reader, "s3://x", base.tensors) == open_checkpoint(folder, base).tensors
    assert peek_tensors(sizes, reader, "s3://x") is None


def test_forms_that_are_not_clear(base: Checkpoint, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", lora("q", 6, 4))
    with pytest.raises(CheckpointError, match="lora: a LoRA adapter, which means nothing without its base"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"mean nothing without adapter_config\.json; pass its folder"):
        open_checkpoint(folder / "adapter_model.safetensors", base)
    save_file(BASE, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both the weights of a model \(model\.safetensors\) and an adapter"):
        open_checkpoint(folder, base)
    assert list(open_checkpoint(folder / "model.safetensors").tensors) == sorted(BASE)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"weights of an adapter and no adapter_config\.json"):
        open_checkpoint(folder, base)


Q = lora("q", 6, 4)
REFUSED: list[tuple[str, dict[str, Tensor], dict[str, Any], str]] = [
    ("another method", Q, {"peft_type": "IA3"}, "an adapter of the type 'IA3', only LORA is read; merge the adapter"),
    ("trained biases", Q, {"bias": "all"}, "bias 'all' is not supported, only 'none'"),
    ("biases of B", Q, {"lora_bias": True}, "cannot be applied exactly: it sets 'lora_bias'"),
    ("PiSSA", Q, {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base before the training"),
    ("an option of a later release", Q, {"use_magic": {"x": 1}}, "it sets 'use_magic'"),
    ("no rank", Q, {"r": 0}, "adapter_config.json: r: "),
    ("a scale that is no number", Q, {"lora_alpha": "much"}, "adapter_config.json: lora_alpha: "),
    ("another rank", Q, {"r": 3}, "q has rank 2, and adapter_config.json says 3"),
    ("no B", dict([*Q.items()][:1]), {}, "lacks B of q"),
    ("no A", dict([*Q.items()][1:]), {}, "lacks A of q"),
    ("another width", lora("q", 6, 5), {}, r"A \[2, 5\] and B \[6, 2\] do not fit q\.weight, .* \[6, 4\] in the base"),
    ("ranks that differ", Q | {"q.lora_B.weight": torch.ones(6, 3)}, {}, "do not fit q.weight"),
    ("another model", lora("model.q", 6, 4), {}, r"adapts 1 tensors that its base does not hold: model\.q\.weight"),
    ("a tensor of nobody", Q | {"x.weight": torch.ones(1)}, {}, "neither LoRA's nor one of the base's"),
    ("another kind of part", Q | {"q.lora_lambda": torch.ones(1)}, {}, "a kind of adapter that is not supported"),
    ("trained tokens", Q | {"emb.token_adapter.trainable_tokens_delta": torch.ones(1)}, {}, "not supported"),
    ("integers", {name: part.int() for name, part in Q.items()}, {}, "is int32, not floating-point"),
    ("magnitudes", Q | {"q.lora_magnitude_vector": torch.ones(6)}, {}, "q has DoRA magnitudes, and use_dora is False"),
    ("no magnitudes", Q, {"use_dora": True}, "q has no DoRA magnitudes, and use_dora is True"),
    *(
        (f"magnitudes {shape}", Q | {"q.lora_magnitude_vector": torch.ones(shape)}, {"use_dora": True}, message)
        for shape, message in {
            (3,): r"q has DoRA magnitudes \[3\], which do not fit the 6 rows of its B; get the adapter again",
            (1,): r"magnitudes \[1\], which",
            (8, 6): r"magnitudes \[8, 6\], which",
            (2, 3): r"magnitudes \[2, 3\], which",
            (): r"magnitudes \[\], which",
        }.items()
    ),
    ("an endless rank", Q, {"r": 10**400}, "adapter_config.json: r: "),
    ("an endless rank of a module", Q, {"rank_pattern": {"q": 10**400}}, "adapter_config.json: rank_pattern.q: "),
    ("an endless scale", Q, {"lora_alpha": 10**400}, "adapter_config.json: lora_alpha: "),
    ("an endless scale of a module", Q, {"alpha_pattern": {"q": 10**400}}, "adapter_config.json: alpha_pattern.q: "),
    ("a pattern", Q, {"alpha_pattern": {"(": 2}}, r"the pattern '\(' is no regular expression"),
    ("a pattern that takes for ever", Q, {"alpha_pattern": {"(.*)*x": 2}}, "is too complex"),
    ("another one", Q, {"rank_pattern": {"a?" * 40 + "a" * 40: 2}}, "is too complex"),
    ("a third", Q, {"rank_pattern": {"(q|q)" * 30: 2}}, "is too complex"),
]


@pytest.mark.parametrize(("tensors", "config", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_cannot_be_applied_exactly_is_refused(
    base: Checkpoint, tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], message: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        opened(base, tmp_path / "lora", tensors, **config)
    assert time.monotonic() - begun < 5


def test_dora_of_other_layers_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    parts = {
        "emb.lora_embedding_A": torch.ones(2, 5),
        "emb.lora_embedding_B": torch.ones(4, 2),
        "emb.lora_magnitude_vector": torch.ones(5),
    }
    with pytest.raises(CheckpointError, match="emb: DoRA is supported for linear layers only"):
        opened(base, tmp_path / "lora", parts, use_dora=True)


def test_weights_of_another_format_and_a_quantised_base(base: Checkpoint, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", Q)
    save_file({f"unet.{name}": part for name, part in Q.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"does not begin with {PREFIX!r}, so it is not in PEFT's format"):
        open_checkpoint(folder, base)
    save_file({"q.weight": torch.zeros(6, 4, dtype=torch.uint8)}, tmp_path / "quantised.safetensors")
    quantised = open_checkpoint(tmp_path / "quantised.safetensors")
    with pytest.raises(
        CheckpointError, match=r"q\.weight, which is uint8 in the base; pass the base before it was quan"
    ):
        opened(quantised, tmp_path / "lora", Q)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"peft_type": 1}', b"\xff", b"[" * 100_000, b'{"r":1,"r":2}'])
def test_a_damaged_configuration_is_one_sentence(base: Checkpoint, tmp_path: Path, content: bytes) -> None:
    folder = write_adapter(tmp_path / "lora", Q)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
        open_checkpoint(folder, base)


def test_code_in_a_pickle_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "proof"), "w"))

    folder = write_adapter(tmp_path / "lora", Q, binary=True)
    torch.save({"base_model.model.q.lora_A.weight": Attack()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="refused: its pickle asks for"):
        open_checkpoint(folder, base)
    assert not (tmp_path / "proof").exists()


def test_closing_an_adapter_leaves_the_base_open(base: Checkpoint, tmp_path: Path) -> None:
    with opened(base, tmp_path / "lora", Q):
        pass
    assert base.read("q.bias").tolist() == [0, 1, 2, 3, 4, 5]


def test_the_configuration_says_where_it_comes_from_without_effect(base: Checkpoint, tmp_path: Path) -> None:
    """What PEFT writes into every configuration changes nothing."""
    written = {
        "auto_mapping": {"base_model_class": "Net"},
        "base_model_name_or_path": "somewhere/else",
        "peft_version": "0.21.2",
        "inference_mode": True,
        "layers_to_transform": [1, 2],
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "init_lora_weights": "gaussian",
        "loftq_config": {},
        "trainable_token_indices": None,
        "use_qalora": False,
    }
    adapter = opened(base, tmp_path / "lora", Q, **written)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_version"] == "0.21.2"
    assert adapter.changed == ["q.weight"]
