"""The prose and code example's network."""

from pathlib import Path

import pytest
import torch

from prose_code.gpt import build, rotate, rotations


def test_tokens_become_logits() -> None:
    model = build(vocabulary=50, width=32, depth=3, heads=4)
    logits = model(torch.randint(50, (5, 9)))
    assert logits.shape == (5, 9, 50)
    assert logits.dtype == torch.float32


def test_training_and_evaluation_mode_are_the_same_function_and_no_state_moves() -> None:
    model = build()
    tokens = torch.randint(256, (4, 16))
    assert torch.equal(model.train()(tokens), model.eval()(tokens))
    assert list(model.buffers()) == []


def test_a_logit_does_not_see_the_tokens_after_it() -> None:
    model = build()
    tokens = torch.randint(256, (3, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_a_longer_context_and_other_rows_do_not_change_a_row() -> None:
    model = build()
    tokens = torch.randint(256, (6, 20))
    torch.testing.assert_close(model(tokens)[2:3, :8], model(tokens[2:3, :8]))


def test_token_order_matters() -> None:
    # Causal attention of one layer sees the set of the tokens before the last: only their positions tell their order.
    model = build(depth=1)
    tokens = torch.randint(256, (2, 10))
    swapped = tokens.clone()
    swapped[:, [1, 6]] = tokens[:, [6, 1]]
    assert not torch.equal(tokens, swapped)
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1])


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_distance_alone() -> None:
    cosine, sine = rotations(32, 8, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 32, 8)
    turned_query, turned_key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    torch.testing.assert_close(turned_query.norm(dim=-1), query.norm(dim=-1))
    products = turned_query[0, 0] @ turned_key[0, 0].T
    for distance in (-5, 0, 3):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (products.diagonal(3)[0] - products.diagonal(0)[0]).abs() > 1e-3


def test_every_parameter_receives_a_gradient() -> None:
    model = build()
    model(torch.arange(256).reshape(4, 64)).square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("changes", [{"width": 66}, {"width": 60, "heads": 4}, {"depth": 0}, {"vocabulary": 0}])
def test_impossible_sizes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        build(**changes)


def test_onnx_export_has_a_dynamic_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(width=16, depth=1, heads=2).eval()
    path = tmp_path / "gpt.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model,
        (torch.randint(256, (3, 12)),),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["input_ids"],
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 7):
        tokens = torch.randint(256, (size, 12))
        (logits,) = session.run(None, {"input_ids": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens).detach(), rtol=1e-4, atol=1e-5)
