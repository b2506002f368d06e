"""A Compact Convolutional Transformer for 8x8 digits.

The architecture follows Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers"
(https://arxiv.org/abs/2104.05704): a convolutional tokenizer instead of patches, a learned positional embedding,
pre-norm transformer encoder layers, and sequence pooling instead of a class token. There is neither dropout nor
BatchNorm, so a model computes the same function in training and in evaluation mode and its state is its parameters
alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8
"""Height and width of an input image in pixels."""


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions and a pooling that turn an image into a feature map with a quarter of its pixels.

    Shapes: [n, 1, 8, 8] -> [n, width, 4, 4].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width // 2, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.conv1(images))
        pooled: Tensor = self.pool(F.relu(self.conv2(hidden)))
        return pooled


class Attention(nn.Module):
    """Multi-head self-attention over [n, tokens, width], without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # [n, tokens, 3 * width] -> three times [n, heads, tokens, width / heads]
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


class EncoderLayer(nn.Module):
    """A pre-norm transformer encoder layer over [n, tokens, width]."""

    def __init__(self, width: int, heads: int, expansion: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        transformed: Tensor = self.contract(F.gelu(self.expand(self.norm2(tokens))))
        return tokens + transformed


class SequencePool(nn.Module):
    """The mean over tokens weighted by a learned softmax score: [n, tokens, width] -> [n, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        weights: Tensor = self.score(tokens).softmax(dim=1)
        return (weights.transpose(1, 2) @ tokens).squeeze(1)


class CompactConvTransformer(nn.Module):
    """Images float32 [n, 1, 8, 8] -> logits float32 [n, classes]."""

    def __init__(self, classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokenizer = ConvTokenizer(width)
        self.position = nn.Parameter(torch.empty(1, (SIDE // 2) ** 2, width))
        self.layers = nn.ModuleList([EncoderLayer(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.pool = SequencePool(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.position, std=0.2)  # the reference's choice

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokenizer(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.head(self.pool(self.norm(tokens)))
        return logits


def build(classes: int = 10, width: int = 64, depth: int = 2, heads: int = 4) -> nn.Module:
    """Builds the network with freshly initialised weights, drawn from torch's global generator.

    Args:
        classes: number of logits.
        width: channels of a token; even, and a multiple of ``heads``.
        depth: number of encoder layers.
        heads: attention heads of a layer.

    Returns:
        A module that maps images float32 [n, 1, 8, 8] to logits float32 [n, classes].

    Raises:
        ValueError: when ``width`` is odd or not a multiple of ``heads``, or a number is below one.
    """
    if min(classes, width, depth, heads) < 1:
        raise ValueError(f"classes, width, depth, heads must be at least 1, not {classes}, {width}, {depth}, {heads}")
    if width % 2 or width % heads:
        raise ValueError(f"width must be even and a multiple of heads ({heads}), not {width}")
    return CompactConvTransformer(classes, width, depth, heads)
