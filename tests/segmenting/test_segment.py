"""What begins a block and what does not, on small models; and the finer granularities."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from automerge.errors import ModelError
from automerge.segmenting.segment import segment
from automerge.segmenting.segmentation import Granularity, Segmentation

GRANULARITIES: list[Granularity] = ["transition", "layer", "tensor", "whole"]


def outline(found: Segmentation) -> list[tuple[str, list[str]]]:
    """Kind and the top-level names of each block."""
    return [(block.kind, list(dict.fromkeys(name.split(".")[0] for name in block.tensors()))) for block in found.blocks]


class Wrapped(nn.Module):
    """Adds a level around a model, and hides its result in containers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> dict[str, Any]:
        return {"result": (self.inner(*args), None)}


# --- layouts


def test_a_perceptron_is_one_vector_block() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    found = segment(model, (torch.randn(2, 4),))
    assert outline(found) == [("vector", ["0", "1", "3"])]
    assert (found.blocks[0].transition, found.blocks[0].shape_in, found.blocks[0].shape_out) == (
        "input",
        [2, 4],
        [2, 2],
    )
    assert found.blocks[0].buffers == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_a_perceptron_on_sequences_is_one_sequence_block() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert outline(segment(model, (torch.randn(2, 5, 4),))) == [("sequence", ["0", "1", "2"])]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_channel_first_convolutions_of_any_dimension(dimensions: int) -> None:
    convolution = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1]
    model = nn.Sequential(convolution(3, 4, 3), norm(4), convolution(4, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(2, 3, *[8] * dimensions)
    model(images)
    found = segment(model, (images,))
    assert outline(found) == [("convolutional", ["0", "1", "2"]), ("vector", ["4"])]
    assert found.blocks[1].transition == f"{dimensions + 2}-D convolutional -> 2-D vector at 4"


class Bare(nn.Module):
    """No layer of torch.nn: parameters and functions only."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.mix = nn.Parameter(torch.randn(8, 16))
        self.shift = nn.Parameter(torch.randn(16))
        self.out = nn.Parameter(torch.randn(16, 4))
        self.unused = nn.Parameter(torch.randn(5))
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("scratch", torch.zeros(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.conv2d(images - self.mean - self.scratch, self.kernel)
        tokens = maps.flatten(2).mT @ self.mix + self.shift
        return torch.einsum("bc,cd->bd", tokens.mean(1), self.out)


def test_functions_and_bare_parameters() -> None:
    found = segment(Bare(), (torch.randn(2, 3, 8, 8),))
    assert outline(found) == [
        ("convolutional", ["kernel", "mean"]),
        ("sequence", ["mix", "shift"]),
        ("vector", ["out"]),
        ("remainder", ["unused"]),
    ]
    assert found.blocks[-1].name == "remainder"
    assert found.blocks[-1].shape_in is None


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_class_token_positions_and_norm_of_the_pooled_vector(batch: int, norm_first: bool, batch_first: bool) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.positions = nn.Parameter(torch.randn(1, 17, 8))
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1) + self.positions
            tokens = self.encoder(tokens if batch_first else tokens.transpose(0, 1))
            return self.head(self.norm(tokens[:, 0] if batch_first else tokens[0]))

    assert outline(segment(Classifier(), (torch.randn(batch, 3, 16, 16),))) == [
        ("convolutional", ["patches"]),
        ("sequence", ["token", "positions", "encoder"]),
        ("vector", ["norm", "head"]),
    ]


def test_integers_have_no_layout() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    assert outline(segment(model, (torch.zeros(2, 5, dtype=torch.long),))) == [("sequence", ["0", "1"])]
    assert outline(segment(model, (torch.zeros(2, dtype=torch.long),))) == [("vector", ["0", "1"])]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.cell = nn.LSTMCell(8, 8)
        self.out = nn.Linear(8, 9)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = state = torch.zeros(ids.shape[0], 8)
        steps = []
        for step in range(ids.shape[1]):
            hidden, state = self.cell(self.table(ids[:, step]), (hidden, state))
            steps.append(self.out(hidden))
        return torch.stack(steps, 1)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.memory = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(32, 9)

    def forward(self, ids: Tensor) -> Tensor:
        _, (hidden, _) = self.memory(self.table(ids))
        return self.out(hidden.transpose(0, 1).reshape(ids.shape[0], -1))


def test_recurrent_cells_and_layers() -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    expected = [("vector", ["table"]), ("recurrent", ["cell"]), ("vector", ["out"])]
    assert outline(segment(Cells(), (ids,))) == expected
    expected = [("sequence", ["table"]), ("recurrent", ["memory"]), ("vector", ["out"])]
    assert outline(segment(LastState(), (ids,))) == expected


# --- reshapes that do not count


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width, 2),
            nn.ReLU(),
            nn.Linear(2, width),
            nn.Sigmoid(),
            nn.Unflatten(1, (width, 1, 1)),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.layers(self.pool(maps))


class MapAttention(nn.Module):
    """Attention over the positions of a map, as in diffusion models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.fused = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        queries, keys, values = self.fused(self.norm(maps).flatten(2).transpose(1, 2)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return maps + self.out(mixed).transpose(1, 2).reshape(maps.shape)


class TokenMixer(nn.Module):
    """A depth-wise convolution over the tokens, as in state-space models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.contract = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = F.silu(self.mix(self.expand(self.norm(tokens)).mT)).mT
        return tokens + self.contract(mixed)


class Experts(nn.Module):
    """A mixture of experts on tokens folded into one axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 16), nn.Linear(16, width)) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        flat = self.norm(tokens).view(-1, tokens.shape[-1])
        weights = self.router(flat).softmax(-1)
        mixed = sum(weights[:, number, None] * expert(flat) for number, expert in enumerate(self.experts))
        assert isinstance(mixed, Tensor)
        return tokens + mixed.view(tokens.shape)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("inside", [Gate, MapAttention])
def test_reshapes_inside_one_forward_stay_in_the_map(inside: type[nn.Module], batch: int) -> None:
    layers = [nn.Conv2d(3, 8, 3), inside(8), nn.Conv2d(8, 8, 3), inside(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    if inside is MapAttention:  # after the last convolution there is no way back into the map's own block
        layers = [layers[0], layers[1], layers[2], *layers[4:]]
        model = nn.Sequential(*layers, nn.Linear(8, 2))
    last = str(len(model) - 1)
    for candidate in (model, Wrapped(Wrapped(model))):
        found = segment(candidate, (torch.randn(batch, 3, 16, 16),))
        assert [block.kind for block in found.blocks] == ["convolutional", "vector"]
        assert [name.rsplit(".", 2)[-2] for name in found.blocks[1].parameters] == [last, last]
        assert found.blocks[1].transition.startswith("4-D convolutional -> 2-D vector at ")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("inside", [TokenMixer, Experts])
def test_reshapes_inside_one_forward_stay_in_the_sequence(inside: type[nn.Module], batch: int) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), inside(8), inside(8), nn.LayerNorm(8), nn.Linear(8, 9))
    found = segment(model, (torch.zeros(batch, 5, dtype=torch.long),))
    assert [block.kind for block in found.blocks] == ["sequence"]


class Bottleneck(nn.Module):
    """A transformer between an encoder and a decoder of convolutions, with a skip connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 8, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 16, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.decode = nn.ConvTranspose2d(16, 2, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encode(images)
        tokens = self.transformer(maps.flatten(2).transpose(1, 2) + self.positions)
        return self.decode(torch.cat([maps, tokens.transpose(1, 2).reshape(maps.shape)], 1))


def test_a_transformer_between_convolutions_is_a_block_however_it_is_wrapped() -> None:
    for model in (Bottleneck(), Wrapped(Bottleneck())):
        found = segment(model, (torch.randn(2, 3, 16, 16),))
        kinds = [(block.kind, len(block.parameters)) for block in found.blocks]
        assert kinds == [("convolutional", 4), ("sequence", 27)]


class WindowedLayer(nn.Module):
    """Attention in windows of a channel-last map, whose other layers work on the 4-D map itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = WindowedAttention(width)
        self.after = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps + self.attention(self.before(maps))
        return maps + self.mix(self.after(maps))


class WindowedAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fused = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(torch.randn(4, 4))
        self.out = nn.Linear(width, width)

    def forward(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        windows = maps.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        queries, keys, values = self.fused(windows.reshape(-1, 4, channels)).chunk(3, -1)
        mixed = self.out((queries @ keys.mT + self.bias).softmax(-1) @ values)
        return mixed.view(windows.shape).permute(0, 1, 3, 2, 4, 5).reshape(maps.shape)


def test_a_windowed_transformer_on_channel_last_maps() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.norm = nn.LayerNorm(8)
            self.layers = nn.Sequential(WindowedLayer(8), WindowedLayer(8))
            self.last = nn.LayerNorm(8)
            self.head = nn.Linear(8, 2)

        def forward(self, images: Tensor) -> Tensor:
            maps = self.layers(self.norm(self.patches(images).permute(0, 2, 3, 1)))
            return self.head(self.last(maps).mean((1, 2)))

    assert outline(segment(Model(), (torch.randn(2, 3, 32, 32),))) == [
        ("convolutional", ["patches"]),
        ("sequence", ["norm", "layers", "last"]),
        ("vector", ["head"]),
    ]


def test_a_norm_over_channels_stays_with_its_convolution() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.norm = nn.LayerNorm(8)

        def forward(self, images: Tensor) -> Tensor:
            return self.norm(self.patches(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    found = segment(nn.Sequential(Embedding(), nn.Flatten(2), nn.Linear(16, 4)), (torch.randn(2, 3, 16, 16),))
    assert outline(found) == [("convolutional", ["0"]), ("sequence", ["2"])]
    assert len(found.blocks[0].parameters) == 4
    assert found.blocks[1].transition == "4-D convolutional -> 3-D sequence at 2"


# --- branches, sharing, ties, remainder


class Siamese(nn.Module):
    """One backbone for two images, two heads of two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.deep = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        self.flat = nn.Linear(16, 5)

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        pooled = torch.cat([self.backbone(one).mean((2, 3)), self.backbone(two).mean((2, 3))], 1)
        return self.deep(pooled), self.flat(pooled)


def test_a_module_used_twice_is_one_block_and_each_head_is_one() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert outline(segment(Siamese(), (images, images))) == [
        ("convolutional", ["backbone"]),
        ("vector", ["deep"]),
        ("vector", ["flat"]),
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_are_held_once(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False))
        model[2].weight = model[0].weight
        found = segment(model, (torch.zeros(2, 5, dtype=torch.long),))
    assert found.tied == {"2.weight": "0.weight"}
    assert found.blocks[0].parameters == ["0.weight", "1.weight", "1.bias"]


def test_tied_by_memory_instead_of_identity() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight.data = model[0].weight.data
    assert segment(model, (torch.randn(2, 8),)).tied == {"1.weight": "0.weight"}


def test_queries_that_are_parameters_belong_where_they_meet_data() -> None:
    class Pooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 4, 8))
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            queries = self.norm(self.queries.expand(len(tokens), -1, -1))
            return self.attention(queries, tokens, tokens)[0]

    found = segment(Pooler(), (torch.randn(2, 5, 8),))
    assert outline(found) == [("sequence", ["queries", "norm", "attention"])]


def test_computed_weights_belong_to_their_layer() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        torch.nn.utils.weight_norm(nn.Linear(4, 4)),
    )
    found = segment(model, (torch.randn(2, 4),), granularity="layer")
    assert outline(found) == [("vector", ["0"]), ("vector", ["1"]), ("vector", ["2"])]
    assert [len(list(block.tensors())) for block in found.blocks] == [3, 4, 3]


# --- what a forward may do


def test_checkpointing_scripts_own_gradients_and_writing_in_place() -> None:
    @torch.jit.script
    def scaled(maps: Tensor, scale: Tensor) -> Tensor:
        return torch.relu(maps * scale)

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, maps: Tensor) -> Tensor:
            return maps.view_as(maps)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.scale = nn.Parameter(torch.randn(1))
            self.second = nn.Conv2d(8, 8, 3)
            self.third = nn.Conv2d(8, 8, 3)
            self.rows = nn.Parameter(torch.randn(8))

        def forward(self, images: Tensor) -> Tensor:
            maps = torch.utils.checkpoint.checkpoint(self.first, images, use_reentrant=False)
            maps = self.third(Same.apply(self.second(scaled(maps, self.scale))))
            padded = torch.zeros(len(maps), 8, 4, 4)
            padded[:, :, :2, :2] = maps
            padded[:, :, 3].copy_(self.rows[None, :, None].expand(len(maps), 8, 4))
            return padded

    found = segment(Model(), (torch.randn(2, 3, 8, 8),))
    assert outline(found) == [("convolutional", ["scale", "rows", "first", "second", "third"])]


def test_the_module_is_left_as_it_was() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Dropout(), nn.Linear(8, 2)).train()
    model[1].eval()
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    fast_path, state = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()

    segment(model, (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),))

    assert model.training
    assert not model[1].training
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.equal(torch.get_rng_state(), state)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, values: Tensor, decide: bool = True) -> Tensor:
        return self.layer(values) if not decide or values.sum() > 0 else values


class Selecting(Branching):
    def forward(self, values: Tensor, decide: bool = True) -> Tensor:
        return self.layer(values[values[:, 0] > 0])


@pytest.mark.parametrize("model", [Branching(), Selecting()])
def test_control_flow_that_needs_values_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"depends on the values of a tensor.*; pass other example inputs"):
        segment(nn.Sequential(model), (torch.randn(2, 3),))


def test_other_example_inputs_avoid_the_branch() -> None:
    found = segment(Branching(), (torch.randn(2, 3),), {"decide": False})
    assert outline(found) == [("vector", ["layer"])]


def test_unusable_modules_and_inputs_are_refused_in_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"cannot be called on the example inputs: RuntimeError in module '1'"):
        segment(nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), (torch.randn(2, 4),))
    with pytest.raises(ModelError, match="no operation that combines its parameters with the inputs"):
        segment(Constant())
    with pytest.raises(ModelError, match="'weight' of LazyLinear has no shape yet"):
        segment(nn.LazyLinear(3), (torch.randn(2, 3),))
    with pytest.raises(ModelError, match="compiled by TorchScript"):
        segment(torch.jit.script(nn.Linear(3, 3)), (torch.randn(2, 3),))
    assert "Traceback" not in capfd.readouterr().err


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(3))

    def forward(self) -> Tensor:
        return self.value * 2


# --- granularities


class Stack(nn.Module):
    """A stem, layers of which the first has an extra tensor, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8, affine=False))
        self.layers = nn.ModuleList(TokenMixer(8) for _ in range(3))
        self.layers[0].first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).mT
        tokens = self.layers[0].first(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens).mean(1))


def test_layers_are_found_by_structure() -> None:
    found = segment(Stack(), (torch.randn(2, 3, 16, 16),), granularity="layer")
    assert [block.name for block in found.blocks] == [
        "0-convolutional/stem.0",
        "0-convolutional/stem.1",
        "1-sequence/layers.0",
        "1-sequence/layers.1",
        "1-sequence/layers.2",
        "1-sequence/norm",
        "2-vector/head",
    ]
    assert found.blocks[2].transition == "4-D convolutional -> 3-D sequence at layers.0.first"
    assert found.blocks[3].transition == "inside 1-sequence at layers.1"


def test_each_tensor_a_block_with_its_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    found = segment(model, (torch.randn(2, 3, 8, 8),), granularity="tensor")
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    assert [(block.name, block.parameters, block.buffers) for block in found.blocks] == [
        ("0-convolutional/0.weight", ["0.weight"], []),
        ("0-convolutional/0.bias", ["0.bias"], []),
        ("0-convolutional/1.weight", ["1.weight"], [f"1.{name}" for name in statistics]),
        ("0-convolutional/1.bias", ["1.bias"], []),
        ("0-convolutional/2", [], [f"2.{name}" for name in statistics]),
    ]


def test_the_whole_is_one_block_remainder_included() -> None:
    found = segment(Bare(), (torch.randn(2, 3, 8, 8),), granularity="whole")
    (block,) = found.blocks
    assert (block.name, block.kind, block.share) == ("whole", "convolutional", 1.0)
    assert sorted(block.tensors()) == sorted(Bare().state_dict())


# --- properties


@st.composite
def pipelines(draw: st.DrawFn) -> list[tuple[str, str | None]]:
    """A random pipeline of steps that fit each other: (step, layout of a step with weights of its own, or none)."""
    steps: list[tuple[str, str | None]] = []
    form = draw(st.sampled_from(["map", "tokens", "vector"]))
    steps.append((f"start-{form}", None))
    for _ in range(draw(st.integers(1, 8))):
        choices: dict[str, tuple[str, str | None]] = {
            "map": {
                "conv": ("map", "convolutional"),
                "batch-norm": ("map", None),
                "flatten": ("tokens", None),
                "pool": ("vector", None),
            },
            "tokens": {
                "linear": ("tokens", "sequence"),
                "attention": ("tokens", "sequence"),
                "gru": ("tokens", "recurrent"),
                "norm": ("tokens", None),
                "mean": ("vector", None),
            },
            "vector": {"linear": ("vector", "vector"), "norm": ("vector", None)},
        }[form]
        step = draw(st.sampled_from(sorted(choices)))
        form, layout = choices[step]
        steps.append((step, layout))
    return steps


class Pipeline(nn.Module):
    """Steps of eight channels each, in a row."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        makers = {
            "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
            "batch-norm": lambda: nn.BatchNorm2d(8),
            "linear": lambda: nn.Linear(8, 8),
            "attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "gru": lambda: nn.GRU(8, 8, batch_first=True),
            "norm": lambda: nn.LayerNorm(8),
        }
        self.parts = nn.ModuleDict({str(i): makers[step]() for i, step in enumerate(steps) if step in makers})

    def forward(self, data: Tensor) -> Tensor:
        for number, step in enumerate(self.steps):
            part = dict(self.parts).get(str(number))
            if step == "flatten":
                data = data.flatten(2).transpose(1, 2)
            elif step == "pool":
                data = data.mean((2, 3))
            elif step == "mean":
                data = data.mean(1)
            elif step == "attention" and part is not None:
                data = data + part(data, data, data)[0]
            elif step == "gru" and part is not None:
                data = part(data)[0]
            elif part is not None:
                data = part(data)
        return data


# A residual path around attention leads from a recurrence to a norm, and from a norm to a recurrence.
ATTENTION: list[tuple[str, str | None]] = [("attention", "sequence"), ("norm", None), ("attention", "sequence")]
AFTER_RECURRENCE = [("start-map", None), ("flatten", None), ("gru", "recurrent"), *ATTENTION]
BEFORE_RECURRENCE = [("start-tokens", None), *ATTENTION, ("gru", "recurrent")]


@given(pipelines(), st.sampled_from([1, 2]), st.sampled_from(GRANULARITIES))
@example(AFTER_RECURRENCE, 1, "transition")
@example(BEFORE_RECURRENCE, 1, "transition")
@settings(max_examples=60, deadline=None)
def test_properties_of_random_pipelines(
    steps: list[tuple[str, str | None]], batch: int, granularity: Granularity
) -> None:
    start, shapes = steps[0][0], {"map": (batch, 8, 4, 4), "tokens": (batch, 5, 8), "vector": (batch, 8)}
    with torch.device("meta"):
        model = Pipeline([step for step, _ in steps])
        inputs = (torch.empty(shapes[start.removeprefix("start-")]),)
    if not model.state_dict():
        assert segment(model, inputs, granularity=granularity).blocks == []
        return
    found = segment(model, inputs, granularity=granularity)

    held = [name for block in found.blocks for name in block.tensors()]
    assert sorted(held) == sorted(model.state_dict())
    assert segment(model, inputs, granularity=granularity) == found
    order = list(model.state_dict())
    for block in found.blocks:
        assert block.parameters == sorted(block.parameters, key=order.index)
        assert block.buffers == sorted(block.buffers, key=order.index)
        assert block.parameter_count == sum(model.get_parameter(name).numel() for name in block.parameters)

    coarse = segment(model, inputs)
    where = {name.split(".")[1]: i for i, block in enumerate(coarse.blocks) for name in block.tensors()}
    weighty = [(number, layout) for number, (_, layout) in enumerate(steps) if layout]
    for number, layout in weighty:
        assert coarse.blocks[where[str(number)]].kind == layout
    for (one, before), (other, after) in itertools.pairwise(weighty):
        assert (where[str(one)] == where[str(other)]) == (before == after)
    assert list(where.values()) == sorted(where.values())
