"""MobileNetV2.

Notation: B batch, C channels, H and W pixels.
"""

from typing import cast

from torch import Tensor, nn

from lowbit.train.models.resnet import init_convolutions


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise and 1×1 linear projection; adds its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        expand = [] if expansion == 1 else [_conv_bn_relu6(inputs, width, 1)]
        self.body = nn.Sequential(
            *expand,
            _conv_bn_relu6(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""
        y = cast(Tensor, self.body(x))
        return x + y if self.adds else y


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1, without dropout.

    Args:
        classes: outputs.
        channels: C of the input.
        strides: of the stem and of the seven groups; the default is the paper's, for 224 pixels.

    Source: Sandler et al., arXiv:1801.04381, table 2.
    """

    strides: tuple[int, ...] = (2, 1, 2, 2, 2, 1, 2, 1)
    groups_of_table_2 = (  # expansion, channels, blocks
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    )

    def __init__(self, *, classes: int, channels: int = 3, strides: tuple[int, ...] = strides) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(channels, 32, 3, strides[0])
        inputs, blocks = 32, []
        for (expansion, outputs, depth), stride in zip(self.groups_of_table_2, strides[1:], strict=True):
            for first in range(depth):
                blocks.append(InvertedResidual(inputs, outputs, 1 if first else stride, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv_bn_relu6(inputs, 1280, 1)
        self.head = nn.Linear(1280, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) float32 to logits (B, classes)."""
        return cast(Tensor, self.head(self.last(self.blocks(self.stem(x))).mean((2, 3))))
