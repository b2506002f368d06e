"""The emoji example's network."""

from pathlib import Path

import pytest
import torch

from emoji.resnet import build


def test_images_become_logits() -> None:
    logits = build(classes=7, width=4, depth=2, stages=2)(torch.randn(5, 3, 32, 32))
    assert logits.shape == (5, 7)
    assert logits.dtype == torch.float32


def test_the_state_holds_the_statistics_of_every_normalisation() -> None:
    model = build(width=4)
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    # the stem's, two in each of three blocks, and those of the two shortcuts that change the shape
    assert len(norms) == 1 + 3 * 2 + 2
    buffers = {f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name, _ in model.named_buffers()} == buffers


def test_training_moves_the_statistics_and_evaluation_reads_them() -> None:
    model = build(width=4)
    images = 3 + torch.randn(8, 3, 32, 32)
    fresh = model.eval()(images)
    assert torch.equal(fresh, model(images))
    model.train()(images)
    assert not torch.allclose(fresh, model.eval()(images))


def test_an_image_does_not_depend_on_its_batch_in_evaluation() -> None:
    model = build(width=4).eval()
    images = torch.randn(6, 3, 32, 32)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


@pytest.mark.parametrize("stages", [1, 3, 5])
def test_every_stage_halves_the_image(stages: int) -> None:
    model = build(width=2, stages=stages)
    sides: list[int] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, __, output: sides.append(output.shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert sides == [16 // 2**stage for stage in range(stages)]


def test_every_parameter_receives_a_gradient() -> None:
    model = build(width=4, depth=2)
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("changes", [{"width": 0}, {"depth": 0}, {"classes": 0}, {"stages": 0}, {"stages": 6}])
def test_impossible_sizes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at"):
        build(**changes)


@pytest.mark.slow
def test_onnx_export_has_a_dynamic_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(width=4, stages=2).eval()
    path = tmp_path / "resnet.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model, (torch.randn(3, 3, 32, 32),), path, dynamo=True, dynamic_shapes=({0: batch},), input_names=["inputs"]
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 7):
        images = torch.randn(size, 3, 32, 32)
        (logits,) = session.run(None, {"inputs": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-5)
