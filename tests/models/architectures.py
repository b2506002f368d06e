"""Small networks that the tests name in a spec."""

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A decoder with a tied output, a table that no checkpoint holds, and a counter that one does."""

    def __init__(self, vocabulary: int = 7, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", 1 + torch.arange(width) / width, persistent=False)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.norm(self.embed(input_ids)) * self.scale)


class Small(nn.Module):
    """A convolution, a recurrent layer and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.rnn = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        return self.head(self.rnn(tokens)[0][:, -1])


def small(classes: int = 3) -> nn.Module:
    """A factory function."""
    return Small(classes)


def not_a_module() -> str:
    """What a factory must not return."""
    return "weights"


def fails(**arguments: object) -> nn.Module:
    """What a factory must not do."""
    raise ValueError("no such width\nand more")


constant = 3
