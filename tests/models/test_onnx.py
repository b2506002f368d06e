"""Exports, and the check that finds a wrong one."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from automerge.errors import ModelError
from automerge.models.architecture import load_architecture
from automerge.models.onnx import check_onnx, export_onnx
from automerge.spec import ModelSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ARCHITECTURE = load_architecture(
    ModelSpec(kind="factory", target="architectures:Small", python_path=[str(Path(__file__).parent)]), {}
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = ARCHITECTURE.build("a", {})
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.with_name("model.onnx.data").write_text("the weights of an earlier, larger model")
    export_onnx(ARCHITECTURE, module, {"inputs": torch.randn(1, 1, 6, 6)}, path)
    return module, path


def _images(n):
    return {"inputs": torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(n))}


def test_the_file_runs_with_any_batch(exported):
    module, path = exported
    assert check_onnx(path, ARCHITECTURE, module, [_images(1), _images(5), _images(2)]) < 1e-5


def test_the_file_says_nothing_of_this_machine(exported):
    _, path = exported
    content = path.read_bytes()
    for word in (b"/", b"site-packages", b"stack_trace", b".py", b"architectures"):
        assert word not in content, word
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]


def test_inputs_output_and_weights_keep_their_names(exported):
    module, path = exported
    graph = onnx.load(path).graph
    assert [item.name for item in graph.input] == ["inputs"]
    assert [item.name for item in graph.output] == ["logits"]
    assert {item.name for item in graph.initializer} & set(module.state_dict()) >= {"head.weight", "head.bias"}
    first = graph.input[0].type.tensor_type.shape.dim
    assert [item.dim_param or item.dim_value for item in first] == ["batch", 1, 6, 6]


def test_equal_weights_give_equal_bytes(exported, tmp_path):
    module, path = exported
    export_onnx(ARCHITECTURE, module, _images(3), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_the_check_finds_other_weights(exported):
    _, path = exported
    torch.manual_seed(1)
    with pytest.raises(ModelError, match=r"model.onnx: the ONNX file's logits differ from torch's by up to"):
        check_onnx(path, ARCHITECTURE, ARCHITECTURE.build("a", {}), [_images(2)])


def test_the_check_finds_a_damaged_file(exported, tmp_path):
    module, path = exported
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ModelError, match=r"broken.onnx: the ONNX file does not do what the model does"):
        check_onnx(broken, ARCHITECTURE, module, [_images(2)])


def test_large_weights_lie_beside_the_file(exported, tmp_path, capfd):
    module, _ = exported
    path = tmp_path / "large.onnx"
    written = export_onnx(ARCHITECTURE, module, _images(2), path, max_inline_bytes=100)
    assert written == sorted(tmp_path.iterdir()) == [path, tmp_path / "large.onnx.data"]
    assert check_onnx(path, ARCHITECTURE, module, [_images(3)]) < 1e-5
    # The pair works wherever it is copied to; the weights are nowhere else.
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for file in written:
        shutil.copy(file, copied)
        file.unlink()
    assert check_onnx(copied / path.name, ARCHITECTURE, module, [_images(3)]) < 1e-5
    (copied / "large.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"large\.onnx: the ONNX file does not do what the model does"):
        check_onnx(copied / path.name, ARCHITECTURE, module, [_images(3)])
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").isEnabledFor(logging.ERROR)


def test_an_export_that_cannot_be_put_in_place_leaves_no_weights(exported, tmp_path):
    module, _ = exported
    (tmp_path / "large.onnx").mkdir()
    with pytest.raises(ModelError, match=r"large\.onnx: the ONNX file cannot be written"):
        export_onnx(ARCHITECTURE, module, _images(2), tmp_path / "large.onnx", max_inline_bytes=100)
    assert [item.name for item in tmp_path.iterdir()] == ["large.onnx"]


class _LooksAtItsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x) if float(x.sum()) > 0 else x


def test_a_model_that_cannot_be_exported_says_so_in_a_line_and_leaves_no_file(tmp_path, capfd):
    with pytest.raises(ModelError, match="the model cannot be exported to ONNX: ") as error:
        export_onnx(ARCHITECTURE, _LooksAtItsData().eval(), {"inputs": torch.ones(2, 2)}, tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 30}


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_transformers_models(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config, target = {
        "llama": (lambda: transformers.LlamaConfig(**TINY), "AutoModelForCausalLM"),
        "t5": (
            lambda: transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30),
            "AutoModelForSeq2SeqLM",
        ),
        "vit": (lambda: transformers.ViTConfig(**TINY, image_size=16, patch_size=8), "AutoModelForImageClassification"),
    }[name]
    config().save_pretrained(tmp_path)
    architecture = load_architecture(ModelSpec(kind="transformers", target=target), {"a": tmp_path})
    torch.manual_seed(0)
    module = architecture.build("a", {})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    inputs = architecture.example(module)
    attention = module.config._attn_implementation
    path = tmp_path / "model.onnx"
    export_onnx(architecture, module, inputs, path)
    assert module.config._attn_implementation == attention
    batches = [inputs, {key: torch.cat([tensor] * 3) for key, tensor in inputs.items()}]
    if name != "vit":
        batches.append({key: tensor[:, :5].contiguous() for key, tensor in inputs.items()})
    assert check_onnx(path, architecture, module, batches) < 1e-4
    assert str(tmp_path).encode() not in path.read_bytes()
