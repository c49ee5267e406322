"""What is trained to be timed: networks with a batch each."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit.train.models import GPT, ResNet


class Work(NamedTuple):
    """A network, a batch for it and the batch's labels."""

    model: nn.Module
    x: Tensor
    y: Tensor


def _normal(*shape: int) -> Tensor:
    """Normal numbers, where torch makes the networks."""
    return torch.randn(shape, dtype=torch.get_default_dtype(), device=torch.get_default_device())


def _labels(classes: int, *shape: int) -> Tensor:
    """Whole numbers below `classes`, where torch makes the networks."""
    return torch.randint(classes, shape, dtype=torch.int64, device=torch.get_default_device())


def _mlp() -> Work:
    sizes = [1024, 2048, 2048, 2048]
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return Work(nn.Sequential(*hidden, nn.Linear(2048, 16)), _normal(1024, 1024), _labels(16, 1024))


def _gpt(d: int, batch: int) -> Work:
    model = GPT(vocabulary=1024, d=d, layers=4, heads=8, context=256)
    return Work(model, _labels(1024, batch, 256), _labels(1024, batch * 256))


def _resnet(depths: tuple[int, ...], width: int, batch: int) -> Work:
    model: Any = ResNet(depths=depths, width=width, classes=10)
    x = _normal(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    return Work(model.to(memory_format=torch.channels_last), x, _labels(10, batch))


# An MLP 1024-2048-2048-2048-16 at batch 1024; GPTs of 4 layers, 8 heads, 256 positions and 1,024 tokens at batch 8 and
# 4; ResNets on 3×32×32 images, memory channels last, at batch 32 and 128.
WORKS: dict[str, Callable[[], Work]] = {
    "mlp": _mlp,
    "gpt-512": partial(_gpt, 512, 8),
    "gpt-1024": partial(_gpt, 1024, 4),
    "resnet18": partial(_resnet, (2, 2, 2, 2), 64, 32),
    "resnet20": partial(_resnet, (3, 3, 3), 16, 128),
}
