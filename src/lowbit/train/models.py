"""The networks that the command line trains, each in plain torch modules so that conversion applies.

Notation: B batch, C channels, H and W pixels, T positions of a text, V bytes in the vocabulary.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowbit.errors import UsageError, a_or_an, unknown
from lowbit.inputs import userfile
from lowbit.train.data import Task

SMALL = 64
"""Below this many pixels on its shorter side, an image gets the small stem of a network."""


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
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) float32 to logits (B, classes)."""
        return cast(Tensor, self.head(self.groups(self.stem(x)).mean((2, 3))))


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
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) float32 to logits (B, classes)."""
        return cast(Tensor, self.head(self.last(self.blocks(self.stem(x))).mean((2, 3))))


def _init_convolutions(model: nn.Module) -> None:
    """Draw every convolution weight from N(0, 2/(kH·kW·outputs/groups)), the variance of "fan out"."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Attention(nn.Module):
    """Causal self-attention with one fused projection of query, key and value."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.projection = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d); position t sees the positions up to t."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.projection(y.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-LayerNorm block: ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))`` with GELU and 4d units."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        x = x + self.attention(self.norm1(x))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A decoder with learned positions and a head of its own weights.

    Weights are drawn from N(0, 0.02²), those of the two projections that write to the residual stream
    from N(0, 0.02²/(2·layers)); biases start at 0.

    Args:
        vocabulary: V, tokens and outputs.
        d: width of the residual stream, a multiple of `heads`.
        layers: blocks.
        heads: attention heads.
        context: the most positions in one input.

    Raises:
        UsageError: `d` is not a multiple of `heads`; an input is longer than `context`.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3,
    except for the untied head.
    """

    def __init__(
        self, *, vocabulary: int = 256, d: int = 128, layers: int = 4, heads: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        if d % heads:
            raise UsageError(f"GPT needs d a multiple of heads, given d={d} and heads={heads}.")
        self.context = context
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(context, d)
        self.blocks = nn.Sequential(*(TransformerBlock(d, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("attention.projection", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T) int64 to the logits of the next token (B, T, V)."""
        length = x.shape[1]
        if length > self.context:
            raise UsageError(
                f"this GPT takes {self.context} positions, given {length}: build it with context={length}."
            )
        y = self.tokens(x) + self.positions(torch.arange(length, dtype=torch.int64, device=x.device))
        return cast(Tensor, self.head(self.norm(self.blocks(y))))


class LSTM(nn.Module):
    """Embedding, `layers` of LSTM, linear head.

    Args:
        vocabulary: V, tokens and outputs.
        embedding: width of a token.
        width: hidden units of each layer.
        layers: LSTM layers.
    """

    def __init__(self, *, vocabulary: int = 256, embedding: int = 128, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T) int64 to the logits of the next token (B, T, V); each row starts at state 0."""
        return cast(Tensor, self.head(self.lstm(self.tokens(x))[0]))


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
        return _channels_last(_of_file(name, task))
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


def _of_file(name: str, task: Task) -> nn.Module:
    """A model of a user's class, which maps what the task has to logits of its shape."""
    cls = userfile.load_class(name)
    if not issubclass(cls, nn.Module):
        raise UsageError(f"{name} is not a torch.nn.Module: make it one")
    with userfile.blamed(f"the constructor of {name} raises", str(Path(name.rpartition(":")[0]))):
        takes = inspect.signature(cls).parameters
        given = {"classes": task.classes, "shape": task.shape}
        model = cls(**{key: value for key, value in given.items() if key in takes})
    if any(is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        raise UsageError(f"{name} has parameters without a shape: give its layers their sizes")
    if not any(each.is_meta for each in model.parameters()):
        _check_logits(name, model, task)
    return model


def _check_logits(name: str, model: nn.Module, task: Task) -> None:
    """Raise a UsageError unless a model gives logits for two samples."""
    wanted = (2, task.classes) if task.kind == "image" else (2, *task.shape, task.classes)
    x = torch.zeros((2, *task.shape), dtype=torch.float32 if task.kind == "image" else torch.int64, device="cpu")
    with userfile.blamed(f"{name} raises for an input of {tuple(x.shape)}:", userfile.file_of(model)), torch.no_grad():
        y = model.eval()(x)
    model.train()
    if not isinstance(y, Tensor) or tuple(y.shape) != wanted:
        given = f"a tensor of {tuple(y.shape)}" if isinstance(y, Tensor) else a_or_an(type(y).__name__)
        raise UsageError(f"{name} gives {given} for an input of {tuple(x.shape)}: it must give logits of {wanted}")


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


def _torchvision(task: Task, name: str) -> nn.Module:
    models = _import("torchvision.models")
    if name not in models.list_models(module=models):
        raise UsageError(
            f"torchvision has no classification model {name!r}: torchvision.models.list_models() lists them."
        )
    if task.shape[0] != 3:
        raise UsageError(
            f"torchvision:{name} takes images of 3 channels and this task has {task.shape[0]}. "
            f"timm:NAME adapts to any number of channels, as do this library's own models."
        )
    return cast(nn.Module, models.get_model(name, weights=None, num_classes=task.classes))


def _timm(task: Task, name: str) -> nn.Module:
    timm = _import("timm")
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}: timm.list_models() lists them.")
    return cast(
        nn.Module,
        timm.create_model(name, pretrained=False, num_classes=task.classes, in_chans=task.shape[0]),
    )


def _import(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"models of {package} need {package}, which cannot be imported ({error}): pip install {package}."
        ) from error


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
    "torchvision:NAME": _Model("image", _torchvision),
    "timm:NAME": _Model("image", _timm),
}
