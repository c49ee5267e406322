"""Every model by its name: what it maps, how it is built, and which blocks it repeats."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from lowbit.errors import UsageError, unknown
from lowbit.inputs import userfile
from lowbit.train.data import Task
from lowbit.train.models.mlp import MLP
from lowbit.train.models.mobilenet import MobileNetV2
from lowbit.train.models.others import of_file, of_timm, of_torchvision
from lowbit.train.models.recurrent import LSTM
from lowbit.train.models.resnet import BasicBlock, Bottleneck, ResNet
from lowbit.train.models.transformer import GPT

SMALL = 64
"""Below this many pixels on its shorter side, an image gets the small stem of a network."""


def build(name: str, task: Task) -> nn.Module:
    """Make the network `name` for `task`, with weights drawn from torch's global generator.

    The weights of 2-d convolutions are channels last in memory, in every format, and so are their outputs: the int8
    engine then copies nothing between layers.

    An image whose shorter side has fewer than 64 pixels changes the ImageNet kinds: ``resnet18`` and
    ``resnet50`` get a 3×3 stem of stride 1 without maximum pooling, ``mobilenetv2`` stride 1 in its stem and
    in its second group. A stride that would leave fewer than 2 pixels becomes 1, so that batch
    normalisation has more than one value in a batch of 1.

    Args:
        name: one of `names()`, with a model's name in place of ``NAME``, or ``FILE.py:CLASS``: the file is executed,
            and the class is made with those of `classes` and `shape` (of one sample) that its constructor takes.
        task: what to map. Images (B, C, H, W) float32 give logits (B, classes), text (B, T) int64 gives
            logits (B, T, classes).

    Raises:
        UsageError: no such model, a model for the other kind of task, a package that is not installed, more channels
            or fewer than a torchvision model takes, or a class that cannot be made or gives no such logits.
    """
    if userfile.split(name) is not None:
        return _channels_last(of_file(name, task))
    family, _, rest = name.partition(":")
    key = f"{family}:NAME" if rest else name
    if key not in _MODELS or name.endswith(":NAME"):
        raise unknown("model", name, (*names(), "FILE.py:CLASS"))
    entry = _MODELS[key]
    if entry.kind != task.kind:
        fitting = ", ".join(known for known, other in _MODELS.items() if other.kind == task.kind)
        raise UsageError(f"model {name!r} takes {entry.kind} and this task is {task.kind}. Models that fit: {fitting}.")
    model = entry.build(task, rest) if rest else entry.build(task)
    return _channels_last(model)


def _channels_last(model: Any) -> nn.Module:
    return cast(nn.Module, model.to(memory_format=torch.channels_last))


def blocks(name: str) -> str | None:
    """A regular expression that matches the names of the repeated blocks of a model of `names`; None: it has none."""
    entry = _MODELS.get(name)
    return None if entry is None else entry.blocks


def names() -> tuple[str, ...]:
    """Every model that `build` knows; ``NAME`` stands for a model of the package before the colon."""
    return tuple(_MODELS)


def _mlp(task: Task) -> nn.Module:
    channels, height, width = task.shape
    return MLP(inputs=channels * height * width, classes=task.classes)


def _cifar_resnet(n: int, task: Task) -> nn.Module:
    return ResNet(
        depths=(n, n, n),
        width=16,
        classes=task.classes,
        channels=task.shape[0],
        strides=_strides(task, (1, 2, 2)),
    )


def _imagenet_resnet(depths: tuple[int, ...], block: type[BasicBlock] | type[Bottleneck], task: Task) -> nn.Module:
    small = min(task.shape[1:]) < SMALL
    return ResNet(
        depths=depths,
        width=64,
        classes=task.classes,
        channels=task.shape[0],
        block=block,
        stem="small" if small else "large",
        strides=_strides(task, (1, 2, 2, 2)) if small else None,
    )


def _mobilenetv2(task: Task) -> nn.Module:
    strides = MobileNetV2.strides
    if min(task.shape[1:]) < SMALL:
        strides = _strides(task, (1, 1, 1, *strides[3:]))
    return MobileNetV2(classes=task.classes, channels=task.shape[0], strides=strides)


def _strides(task: Task, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that leave at least 2 pixels; the others become 1."""
    size, strides = min(task.shape[1:]), []
    for stride in wanted:
        after = -(-size // stride)
        strides.append(stride if after >= 2 else 1)
        size = after if after >= 2 else size
    return tuple(strides)


def _gpt(task: Task) -> nn.Module:
    return GPT(vocabulary=task.classes, context=task.shape[0])


def _lstm(task: Task) -> nn.Module:
    return LSTM(vocabulary=task.classes)


class _Model(NamedTuple):
    """A network by its task, how it is built, and the pattern of the names of its repeated blocks."""

    kind: Literal["image", "text"]
    build: Callable[..., nn.Module]
    blocks: str | None = None


_GROUPS = r"groups\.\d+\.\d+"
_MODELS = {
    "mlp": _Model("image", _mlp, r"hidden\.\d+"),
    "resnet20": _Model("image", partial(_cifar_resnet, 3), _GROUPS),
    "resnet38": _Model("image", partial(_cifar_resnet, 6), _GROUPS),
    "resnet74": _Model("image", partial(_cifar_resnet, 12), _GROUPS),
    "resnet110": _Model("image", partial(_cifar_resnet, 18), _GROUPS),
    "resnet18": _Model("image", partial(_imagenet_resnet, (2, 2, 2, 2), BasicBlock), _GROUPS),
    "resnet50": _Model("image", partial(_imagenet_resnet, (3, 4, 6, 3), Bottleneck), _GROUPS),
    "mobilenetv2": _Model("image", _mobilenetv2, r"blocks\.\d+"),
    "gpt": _Model("text", _gpt, r"blocks\.\d+"),
    "lstm": _Model("text", _lstm, "lstm"),
    "torchvision:NAME": _Model("image", of_torchvision),
    "timm:NAME": _Model("image", of_timm),
}
