"""A small network of convolutions, with a block of matrix products behind them, for studies of many recipes."""

import itertools

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three convolutions with batch normalisation, then three linear layers.

    Args:
        classes: number of classes.
        shape: channels, height and width of an image.
    """

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        widths = (shape[0], 16, 32, 64)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        ]
        side = [-(-size // 8) for size in shape[1:]]
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(64 * side[0] * side[1], 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) give logits (B, classes)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]
