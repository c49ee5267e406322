"""Linear layers with ReLU between them."""

from itertools import pairwise
from typing import cast

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, on the flattened input.

    Args:
        inputs: numbers in one flattened sample.
        classes: outputs.
        width: outputs of each hidden layer.
        layers: hidden layers, 0 for a linear classifier.
    """

    def __init__(self, *, inputs: int, classes: int, width: int = 256, layers: int = 3) -> None:
        super().__init__()
        sizes = [inputs] + [width] * layers
        hidden = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes)]
        self.hidden = nn.Sequential(*hidden)
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) float32 to logits (B, classes)."""
        return cast(Tensor, self.head(self.hidden(x.flatten(1))))
