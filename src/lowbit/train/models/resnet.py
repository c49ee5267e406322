"""Residual networks, of the CIFAR and of the ImageNet kind.

Notation: B batch, C channels, H and W pixels.
"""

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, normalised, with a ReLU between them, and a shortcut: ``relu(body(x) + shortcut(x))``."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H/stride, W/stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1×1, a 3×3 and a 1×1 convolution and a shortcut; the 3×3 carries the stride, as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, 4*width, H/stride, W/stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A residual network: stem, groups of blocks that double in width, global average, linear head.

    The CIFAR kind of depth 6n+2 is ``ResNet(depths=(n, n, n), width=16)``; ResNet-18 is
    ``ResNet(depths=(2, 2, 2, 2), width=64)``, with ``stem="large"`` on images of 64 pixels and more.
    A block that changes shape has a 1×1 convolution with batch normalisation as its shortcut.
    Convolution weights are drawn from N(0, 2/(k²·outputs)).

    Args:
        depths: blocks in each group.
        width: channels of the stem and, before a bottleneck's expansion, of the first group.
        classes: outputs.
        channels: C of the input.
        block: `BasicBlock` or `Bottleneck`.
        stem: ``"small"`` is a 3×3 convolution of stride 1; ``"large"`` a 7×7 of stride 2, then a 3×3
            maximum of stride 2.
        strides: stride of each group; ``None`` means 1 for the first and 2 for the others.

    Source: He et al., arXiv:1512.03385, section 4.2 and table 1.
    """

    def __init__(
        self,
        *,
        depths: tuple[int, ...],
        width: int,
        classes: int,
        channels: int = 3,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        stem: Literal["small", "large"] = "small",
        strides: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        strides = (1,) + (2,) * (len(depths) - 1) if strides is None else strides
        kernel, stride = (7, 2) if stem == "large" else (3, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1) if stem == "large" else nn.Identity(),
        )
        inputs, groups = width, []
        for index, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            blocks: list[nn.Module] = []
            for first in range(depth):
                blocks.append(block(inputs, width << index, 1 if first else stride))
                inputs = (width << index) * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(inputs, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) float32 to logits (B, classes)."""
        return cast(Tensor, self.head(self.groups(self.stem(x)).mean((2, 3))))


def init_convolutions(model: nn.Module) -> None:
    """Draw every convolution weight from N(0, 2/(kH·kW·outputs/groups)), the variance of "fan out"."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
