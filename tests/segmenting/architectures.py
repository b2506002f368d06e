"""The architectures of golden.yaml: each function builds a model on the meta device, and the inputs of one inference.

The own models here are written as a practitioner would write them; they know nothing of the segmentor.
"""

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class ConvTokenizer(nn.Module):
    """Two strided convolutions; the map is flattened into tokens at the very end."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width // 2, 3, padding=1, bias=False)
        self.scale = nn.BatchNorm2d(width // 2)
        self.second = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(torch.relu(self.scale(self.first(images))))
        maps = self.pool(torch.relu(self.second(maps)))
        return maps.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention by one fused projection, heads as a fourth axis, normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // heads)
        self.key_norm = nn.LayerNorm(width // heads)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        split = self.fused(tokens).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        queries, keys = self.query_norm(queries), self.key_norm(keys)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.between = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.before(tokens))
        return tokens + self.contract(nn.functional.gelu(self.expand(self.between(tokens))))


class CompactConvTransformer(nn.Module):
    """CCT: convolutional tokenizer, transformer with learned positions, attention pooling over the tokens, head."""

    def __init__(self, channels: int = 3, size: int = 16, width: int = 32, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.tokenizer = ConvTokenizer(channels, width)
        self.positions = nn.Parameter(torch.zeros(1, (size // 4) ** 2, width))
        self.layers = nn.ModuleList(EncoderLayer(width, 4) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.pooling = nn.Linear(width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokenizer(images) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.last(tokens)
        weights = self.pooling(tokens).softmax(dim=1)
        pooled = torch.matmul(weights.transpose(1, 2), tokens).squeeze(1)
        return self.head(pooled)


class Backbone(nn.Module):
    """A small CNN with residual connection; gives a map."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.stem_norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.stem_norm(self.stem(images)))
        return torch.relu(maps + self.inner_norm(self.inner(maps)))


class HybridDriver(nn.Module):
    """Camera and lidar backbones feed one transformer; a GRU reads its tokens; a linear layer gives the controls."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.camera = Backbone(3, width)
        self.lidar = Backbone(1, width)
        self.sensor = nn.Parameter(torch.zeros(2, 1, width))
        self.fusion = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, dropout=0.0),
            num_layers=2,
            norm=nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        self.memory = nn.GRU(width, width, num_layers=2, batch_first=True)
        self.controls = nn.Linear(width, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        camera = self.camera(batch["camera"]).flatten(2).transpose(1, 2) + self.sensor[0]
        lidar = self.lidar(batch["lidar"]).flatten(2).transpose(1, 2) + self.sensor[1]
        tokens = self.fusion(torch.cat([camera, lidar], dim=1))
        outputs, _ = self.memory(tokens)
        return {"controls": torch.tanh(self.controls(outputs[:, -1]))}


def cct() -> Built:
    with torch.device("meta"):
        return CompactConvTransformer(), (torch.empty(2, 3, 16, 16),), {}


def hybrid() -> Built:
    with torch.device("meta"):
        batch = {"camera": torch.empty(2, 3, 8, 8), "lidar": torch.empty(2, 1, 4, 4)}
        return HybridDriver(), (batch,), {}


def llama_7b() -> Built:
    """The published 7 B configuration (which is the default of the class)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig()
    with torch.device("meta"):
        return LlamaForCausalLM(config), (), {"input_ids": torch.zeros(1, 16, dtype=torch.long)}


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_hidden_layers=3, hidden_size=48, num_attention_heads=4, intermediate_size=96, image_size=32)
    with torch.device("meta"):
        return ViTForImageClassification(config), (), {"pixel_values": torch.empty(2, 3, 32, 32)}


def resnet() -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[2, 2, 2, 2])
    with torch.device("meta"):
        return ResNetForImageClassification(config), (), {"pixel_values": torch.empty(2, 3, 64, 64)}


def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=3, vocab_size=100, decoder_start_token_id=0)
    with torch.device("meta"):
        ids = torch.zeros(2, 7, dtype=torch.long)
        return T5ForConditionalGeneration(config), (), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=50,
        vocab_size=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    with torch.device("meta"):
        ids = torch.zeros(2, 5, dtype=torch.long)
        features = torch.empty(2, 16, 100)
        return WhisperForConditionalGeneration(config), (), {"input_features": features, "decoder_input_ids": ids}


def gpt2() -> Built:
    """Its linear layers flatten batch and positions into one axis and unflatten them again."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    with torch.device("meta"):
        return GPT2LMHeadModel(config), (), {"input_ids": torch.zeros(2, 7, dtype=torch.long)}


def convnext() -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1])
    with torch.device("meta"):
        return ConvNextForImageClassification(config), (), {"pixel_values": torch.empty(2, 3, 64, 64)}


def swin() -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4)
    with torch.device("meta"):
        return SwinForImageClassification(config), (), {"pixel_values": torch.empty(2, 3, 32, 32)}


def wav2vec2() -> Built:
    """With layer norms between its convolutions and a weight-normalised positional convolution."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16, 16, 16],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 3],
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=24,
    )
    with torch.device("meta"):
        return Wav2Vec2ForSequenceClassification(config), (), {"input_values": torch.empty(2, 4000)}


BUILDERS = {
    "cct": cct,
    "llama_7b": llama_7b,
    "vit": vit,
    "resnet": resnet,
    "t5": t5,
    "whisper": whisper,
    "hybrid": hybrid,
    "gpt2": gpt2,
    "convnext": convnext,
    "swin": swin,
    "wav2vec2": wav2vec2,
}
