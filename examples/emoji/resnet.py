"""A small residual network with BatchNorm for 32x32 colour images.

The architecture follows He et al. 2015, "Deep Residual Learning for Image Recognition"
(https://arxiv.org/abs/1512.03385), section 4.2: a 3x3 convolution, stages of basic blocks of which each but the first
halves the image and doubles the channels, a global average, and one linear layer. Shortcuts that change the shape are
1x1 convolutions (the paper's option B). Unlike the paper's, the first convolution halves the image, which quarters the
cost.

BatchNorm keeps running statistics as buffers beside the parameters, and a counter of batches: what a merge of two such
networks must treat apart.
"""

import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32
"""Height and width of an input image in pixels."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around both.

    Shapes: [n, channels_in, h, w] -> [n, channels_out, h / stride, w / stride].
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(features)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(features))


class ResNet(nn.Module):
    """Images float32 [n, 3, 32, 32] -> logits float32 [n, classes]."""

    def __init__(self, classes: int, width: int, depth: int, stages: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        channels = [width * 2**stage for stage in range(stages)]
        blocks = []
        for stage, wide in enumerate(channels):
            before = channels[max(0, stage - 1)]
            for number in range(depth):
                first = number == 0
                blocks.append(BasicBlock(before if first else wide, wide, stride=2 if first and stage else 1))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def build(classes: int = 11, width: int = 16, depth: int = 1, stages: int = 3) -> nn.Module:
    """Builds the network with freshly initialised weights, drawn from torch's global generator.

    Args:
        classes: number of logits.
        width: channels of the first stage; every further stage doubles them.
        depth: basic blocks of a stage.
        stages: number of stages. The first sees images of 16x16, each further one half of that before.

    Returns:
        A module that maps images float32 [n, 3, 32, 32] to logits float32 [n, classes].

    Raises:
        ValueError: when a number is below one, or there are more stages than an image can be halved.
    """
    if min(classes, width, depth, stages) < 1:
        raise ValueError(f"classes, width, depth, stages must be at least 1, not {classes}, {width}, {depth}, {stages}")
    if 2**stages > SIDE:
        raise ValueError(f"stages must be at most {SIDE.bit_length() - 1} for images of {SIDE} pixels, not {stages}")
    return ResNet(classes, width, depth, stages)
