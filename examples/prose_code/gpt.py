"""A small decoder-only transformer that predicts the next byte of a text.

The architecture is that of the Llama family at the size of an example: pre-norm layers with RMSNorm (Zhang and Sennrich
2019, https://arxiv.org/abs/1910.07467), rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), a gated
feed-forward network (SwiGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202), no biases, and an output head of its own.
Positions are not learned, because rotary ones need no parameter and learn sooner; the head is not tied to the
embedding, because tying saves nothing worth having at 256 tokens and an untied head can be merged by itself. There is
neither dropout nor a buffer, so a model computes the same function in training and in evaluation mode and its state is
its parameters alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
"""The tokens are the bytes of UTF-8: every text has one tokenization, and there is nothing to learn or to store."""

# The longest wavelength is some thousand tokens, many times the example's context; longer ones would stand still in it.
ROTARY_BASE = 1000.0


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions over [n, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        # [n, T, 3 * width] -> three times [n, heads, T, width / heads]
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """A gated feed-forward network over [n, T, width]."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, expansion * width, bias=False)
        self.expand = nn.Linear(width, expansion * width, bias=False)
        self.contract = nn.Linear(expansion * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        contracted: Tensor = self.contract(F.silu(self.gate(hidden)) * self.expand(hidden))
        return contracted


class DecoderLayer(nn.Module):
    """A pre-norm transformer decoder layer over [n, T, width]."""

    def __init__(self, width: int, heads: int, expansion: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width)
        self.feed_forward = FeedForward(width, expansion)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden), cosine, sine)
        transformed: Tensor = self.feed_forward(self.norm2(hidden))
        return hidden + transformed


class DecoderTransformer(nn.Module):
    """Token ids int64 [n, T] -> logits float32 [n, T, vocabulary]; those at a position are of the next token."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([DecoderLayer(width, heads) for _ in range(depth)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        cosine, sine = rotations(input_ids.shape[1], self.head_width, input_ids.device)
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def rotations(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle by which each position turns each pair of channels: float32 [T, width / 2]."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + width / 2) of [n, heads, T, width] by the angles of their position."""
    first, second = values.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def build(vocabulary: int = VOCABULARY, width: int = 64, depth: int = 2, heads: int = 4) -> nn.Module:
    """Builds the network with freshly initialised weights, drawn from torch's global generator.

    Args:
        vocabulary: number of tokens, and of logits a position.
        width: channels of a token; an even multiple of ``heads``.
        depth: number of decoder layers.
        heads: attention heads of a layer.

    Returns:
        A module that maps token ids int64 [n, T], T of any length, to logits float32 [n, T, vocabulary].

    Raises:
        ValueError: when ``width`` is not an even multiple of ``heads``, or a number is below one.
    """
    if min(vocabulary, width, depth, heads) < 1:
        raise ValueError(
            f"vocabulary, width, depth, heads must be at least 1, not {vocabulary}, {width}, {depth}, {heads}"
        )
    if width % (2 * heads):
        raise ValueError(f"width must be an even multiple of heads ({heads}), not {width}")
    return DecoderTransformer(vocabulary, width, depth, heads)
