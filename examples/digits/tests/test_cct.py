"""The digits example's network."""

from pathlib import Path

import pytest
import torch

from digits.cct import build


def test_images_become_logits() -> None:
    model = build(classes=7, width=32, depth=3, heads=4)
    logits = model(torch.randn(5, 1, 8, 8))
    assert logits.shape == (5, 7)
    assert logits.dtype == torch.float32


def test_training_and_evaluation_mode_are_the_same_function_and_no_state_moves() -> None:
    model = build()
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(model.train()(images), model.eval()(images))
    assert list(model.buffers()) == []


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = build().eval()
    images = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_token_order_matters() -> None:
    # Attention and pooling alone are blind to it: this holds only while the positional embedding is in use.
    model = build().eval()
    images = torch.randn(2, 1, 8, 8)
    before = model(images)
    with torch.no_grad():
        model.position.copy_(model.position.flip(1))  # type: ignore[operator]
    assert not torch.allclose(before, model(images))


def test_every_parameter_receives_a_gradient() -> None:
    model = build()
    model(torch.randn(8, 1, 8, 8)).square().sum().backward()
    # The key bias and the pooling bias shift every score alike, which softmax ignores: zero gradient, yet not missing.
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("changes", [{"width": 63}, {"width": 64, "heads": 5}, {"depth": 0}, {"classes": 0}])
def test_impossible_sizes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        build(**changes)


def test_onnx_export_has_a_dynamic_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(width=16, depth=1, heads=2).eval()
    path = tmp_path / "cct.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model, (torch.randn(3, 1, 8, 8),), path, dynamo=True, dynamic_shapes=({0: batch},), input_names=["inputs"]
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 7):
        images = torch.randn(size, 1, 8, 8)
        (logits,) = session.run(None, {"inputs": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-5)
