"""The boundaries written down in golden.yaml are met, whatever the classes and attributes are called."""

import ast
import inspect
import resource
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from automerge.segmenting.segment import segment
from automerge.segmenting.segmentation import Segmentation
from tests.segmenting import architectures

GOLDEN: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "golden.yaml").read_text())


def matching(patterns: list[str], names: list[str]) -> set[str]:
    """The names that the globs of golden.yaml stand for; "!" takes names out."""
    held: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("!"):
            held -= {name for name in names if fnmatchcase(name, pattern[1:])}
        else:
            hits = {name for name in names if fnmatchcase(name, pattern)}
            assert hits, f"{pattern} stands for nothing"
            held |= hits
    return held


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_boundaries(name: str) -> None:
    module, args, kwargs = architectures.BUILDERS[name]()
    expected = GOLDEN[name]
    found = segment(module, args, kwargs, expected["granularity"])

    assert found.tied == expected["tied"]
    names = [key for key in module.state_dict() if key not in found.tied]
    wanted = [(block["kind"], matching(block["parameters"], names)) for block in expected["blocks"]]
    assert [(block.kind, set(block.tensors())) for block in found.blocks] == wanted
    assert sum(block.share for block in found.blocks) == pytest.approx(1.0)


def test_llama_7b_takes_seconds_and_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    module, args, kwargs = architectures.llama_7b()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = segment(module, args, kwargs)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    with capsys.disabled():
        print(f"\nLlama 7B: segmented in {seconds:.1f} s, peak memory grew by {grown:.0f} MiB")

    assert [block.parameter_count for block in found.blocks] == [6_738_415_616]
    assert grown < 512  # its weights would be 26 GiB
    assert seconds < 60


def test_llama_7b_has_a_layer_for_each_layer() -> None:
    module, args, kwargs = architectures.llama_7b()
    found = segment(module, args, kwargs, "layer")
    layers = [f"0-sequence/model.layers.{number}" for number in range(32)]
    assert [block.name for block in found.blocks] == [
        "0-sequence/model.embed_tokens",
        *layers,
        "0-sequence/model.norm",
        "0-sequence/lm_head",
    ]
    assert {block.parameter_count for block in found.blocks if block.name in layers} == {202_383_360}


class Renamer(ast.NodeTransformer):
    """Renames every class and every attribute of self, and replaces torch's layers by subclasses with other names."""

    def __init__(self, tree: ast.Module) -> None:
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        stored = {
            node.attr: None
            for found in classes
            for node in ast.walk(found)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        self.classes = {node.name: f"Z{number}" for number, node in enumerate(classes)}
        self.attributes = {name: f"z{len(stored) - number}" for number, name in enumerate(stored)}

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.name = self.classes[node.name]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.classes.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            node.attr = self.attributes.get(node.attr, node.attr)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        layer = node.func
        if isinstance(layer, ast.Attribute) and isinstance(layer.value, ast.Name) and layer.value.id == "nn":
            node.func = ast.Call(ast.Name("disguised", ast.Load()), [layer], [])
        return node


def disguised(layer: type) -> type:
    return layer if layer is nn.Parameter else type(f"Y{abs(hash(layer)) % 1000}", (layer,), {})


def in_numbers(
    found: Segmentation, module: nn.Module
) -> list[tuple[str, list[int], list[int] | None, list[int] | None]]:
    """A segmentation by the positions of the tensors in the state dict instead of their names."""
    number = {name: index for index, name in enumerate(module.state_dict())}
    return [
        (block.kind, [number[name] for name in block.tensors()], block.shape_in, block.shape_out)
        for block in found.blocks
    ]


@pytest.mark.parametrize("granularity", ["transition", "layer", "tensor", "whole"])
@pytest.mark.parametrize("name", ["CompactConvTransformer", "HybridDriver"])
def test_names_change_nothing(name: str, granularity: Any) -> None:
    tree = ast.parse(inspect.getsource(architectures))
    renamer = Renamer(tree)
    renamed = ast.fix_missing_locations(renamer.visit(tree))
    space: dict[str, Any] = {"disguised": disguised}
    exec(compile(renamed, "renamed", "exec"), space)  # noqa: S102 - the test's own architectures under other names

    builder = {"CompactConvTransformer": "cct", "HybridDriver": "hybrid"}[name]
    original, args, kwargs = architectures.BUILDERS[builder]()
    with torch.device("meta"):
        twin = space[renamer.classes[name]]()
    assert not set(twin.state_dict()) & set(original.state_dict())
    expected = in_numbers(segment(original, args, kwargs, granularity), original)
    assert in_numbers(segment(twin, args, kwargs, granularity), twin) == expected
