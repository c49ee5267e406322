"""Random converted layers, forward and backward, for `make test-asan`: whatever the shapes, native code stays inside.

    python tests/fuzz_layers.py [--seed 0] [--cases 1000 | --seconds SECONDS | --only NUMBER]

Each case also runs twice and must give the same bits, and the shapes and dtypes of the plain layer. Where the plain
layer raises, the converted one must too.
"""

import argparse
import copy
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.kernels import native_instruction_sets

ON_INTEGERS = ("int8", "sbm8", "cpt-int8")
RECIPES = (*ON_INTEGERS, "sbm8-cpt", "sbm8-hoffer", "bf16")
WITH_RANGE_NORM = ("sbm8", "sbm8", "sbm8-hoffer")
REFUSALS = ("cannot run", "have no range")  # what a converted layer may say where the plain one works
Case = tuple[str, nn.Module, Tensor]


def size(draw: random.Random, most: int) -> int:
    """A size: often 0 or 1, often at the edge of a vector or a panel, else anything."""
    kind = draw.random()
    if kind < 0.12:
        return draw.choice((0, 1, 1, 1))
    if kind < 0.4:
        return min(most, draw.choice((2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129)))
    return draw.randint(1, most)


def linear(draw: random.Random) -> Case:
    """A linear layer on any number of leading axes."""
    inputs, outputs = size(draw, 300), size(draw, 200)
    leading = [size(draw, 40) for _ in range(draw.randint(0, 3))]
    return "linear", nn.Linear(inputs, outputs, bias=draw.random() < 0.7), torch.randn(*leading, inputs)


def convolution(draw: random.Random) -> Case:
    """A convolution or transposed one of 1 to 3 axes."""
    axes, groups, transposed = draw.randint(1, 3), draw.choice((1, 1, 2, 3, 5)), draw.random() < 0.3
    most = {1: 70, 2: 40, 3: 8}[axes]
    kernel = [draw.choice((1, 2, 3, 3, 5)) for _ in range(axes)]
    stride, dilation = ([draw.choice((1, 1, 2, 3)) for _ in range(axes)] for _ in range(2))
    padding: Any = [draw.randint(0, 3) for _ in range(axes)]
    inputs, outputs = (max(1, size(draw, 40)) * groups for _ in range(2))
    if draw.random() < 0.15:
        inputs = outputs = groups = draw.randint(1, 33)  # depthwise
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw.random() < 0.6}
    if transposed:
        layers: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        options["output_padding"] = [draw.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
    else:
        layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        options["padding_mode"] = draw.choice(("zeros",) * 4 + ("reflect", "replicate", "circular"))
        if draw.random() < 0.2:
            padding, options["stride"] = draw.choice(("same", "valid")), 1
    layer = layers[axes - 1](inputs, outputs, kernel, padding=padding, **options)
    batch = [] if draw.random() < 0.1 else [size(draw, 6)]
    x = torch.randn(*batch, inputs, *[size(draw, most) for _ in range(axes)])
    return "transposed" if transposed else "convolution", layer, x


def norm(draw: random.Random) -> Case:
    """A batch normalisation, alone or between a convolution and a ReLU."""
    axes, channels = draw.randint(0, 3), max(1, size(draw, 80))
    shape = (size(draw, 20), channels, *[size(draw, 12) for _ in range(axes)])
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes]
    layer: nn.Module = kind(channels, affine=draw.random() < 0.8, track_running_stats=draw.random() < 0.8)
    if draw.random() < 0.5:
        layer = nn.Sequential(layer, nn.ReLU(inplace=draw.random() < 0.5))
    return "norm", layer, torch.randn(shape)


class First(nn.Module):
    """A layer's first result."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        """Without the rest."""
        y: Tensor = self.layer(*(x,) * self.times)[0]
        return y


def recurrent(draw: random.Random) -> Case:
    """An LSTM or GRU."""
    inputs, hidden = max(1, size(draw, 40)), max(1, size(draw, 40))
    layer = draw.choice((nn.LSTM, nn.GRU))(inputs, hidden, num_layers=draw.randint(1, 2), batch_first=True)
    return "recurrent", First(layer), torch.randn(max(1, size(draw, 8)), draw.randint(1, 5), inputs)


def attention(draw: random.Random) -> Case:
    """Self-attention."""
    heads = draw.randint(1, 4)
    width = heads * draw.randint(1, 16)
    layer = First(nn.MultiheadAttention(width, heads, batch_first=True), 3)
    return "attention", layer, torch.randn(max(1, size(draw, 8)), draw.randint(1, 20), width)


def in_memory(x: Tensor, draw: random.Random) -> Tensor:
    """The same numbers in another kind of memory."""
    kind = draw.choice(("plain", "plain", "last", "gaps", "turned", "negative", "shifted"))
    if kind == "last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if kind == "gaps" and x.dim():
        return x.repeat_interleave(2, -1)[..., ::2]
    if kind == "turned" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "negative":
        return torch._neg_view(-x)
    if kind == "shifted":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def trained(model: nn.Module, x: Tensor, g: Tensor | None) -> list[Tensor]:
    """Two steps and an evaluation: outputs, gradients, parameters."""
    found: list[Tensor] = []
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(()))], lr=0.01)
    for _ in range(2):
        leaf = x.detach().requires_grad_()
        y = model(leaf)
        y.backward(torch.ones_like(y) if g is None else g)
        found += [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found.append(model.eval()(x))
    return found


def outcome(model: nn.Module, x: Tensor, recipe: str | None, engine: str, order: int) -> list[Tensor] | str:
    """What `trained` gives of a copy, or its refusal."""
    model = nn.Sequential(copy.deepcopy(model))
    draw = random.Random(order)
    try:
        if recipe is not None:
            method = lowbit.Recipe.from_name(recipe).replace(first="convert", last="convert")
            lowbit.convert_(model, method, engine=engine, strict=False)
            if method.is_dynamic:
                lowbit.PrecisionController.from_recipe(model, total_steps=64)
        with torch.no_grad():
            shape = copy.deepcopy(model)(x).shape if recipe is None else None
        g = None if shape is None else in_memory(torch.randn(shape, dtype=x.dtype), draw)
        return trained(model, in_memory(x, draw), g if recipe is None else None)
    except (RuntimeError, ValueError, TypeError, lowbit.UsageError) as error:
        return f"{type(error).__name__}: {error}"


def main() -> int:
    """Run so many cases, or cases until the time is over; 1 where one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--cases", type=int, default=1000)
    length.add_argument("--seconds", type=float)
    length.add_argument("--only", type=int)
    options = parser.parse_args()
    engines = ("reference", "int8", "int8") if native_instruction_sets() is not None else ("reference",)
    counts: Counter[str] = Counter()
    start, number, wrong = time.monotonic(), options.only or 0, 0
    while counts.total() < options.cases if options.seconds is None else time.monotonic() - start < options.seconds:
        draw = random.Random(f"{options.seed} {number}")
        torch.manual_seed(number)
        make = draw.choice((linear, linear, convolution, convolution, convolution, norm, norm, recurrent, attention))
        engine = draw.choice(engines)
        recipe = draw.choice(WITH_RANGE_NORM if make is norm else RECIPES)
        engine = engine if recipe in ON_INTEGERS else "reference"
        dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16))
        torch.set_num_threads(draw.randint(1, 2))
        try:
            kind, layer, x = make(draw)
        except (RuntimeError, ValueError):  # no such layer: the number counts for no case
            if options.only is not None:
                parser.error(f"number {number} of seed {options.seed} gives no layer: give another one")
            number += 1
            continue
        layer, x = layer.to(dtype), x.to(dtype)
        what = f"case {number}: {layer} {recipe} {engine} {dtype} {tuple(x.shape)}"
        if options.only is not None:
            print(what, flush=True)
        plain = outcome(layer, x, None, engine, number)
        ours, again = (outcome(layer, x, recipe, engine, number) for _ in range(2))
        complaint = compared(plain, ours, again)
        counts[f"{kind} {engine}" + (" refused" if isinstance(ours, str) else "")] += 1
        if complaint:
            wrong += 1
            print(f"{what}\n  {complaint}", flush=True)
        if options.only is not None:
            break
        number += 1
    took = time.monotonic() - start
    print(
        f"{counts.total()} cases of seed {options.seed} in {took:.0f} s, {wrong} wrong: {dict(sorted(counts.items()))}"
    )
    return int(wrong > 0)


def compared(plain: list[Tensor] | str, ours: list[Tensor] | str, again: list[Tensor] | str) -> str:
    """What is wrong with two runs of a converted layer; empty where nothing is."""
    if isinstance(ours, str) or isinstance(again, str):
        return "" if isinstance(plain, str) or any(said in ours for said in REFUSALS) else f"raises {ours}"
    if isinstance(plain, str):
        return f"runs where the plain layer raises {plain}"
    for i, (a, b, c) in enumerate(zip(plain, ours, again, strict=True)):
        if (a is None) != (b is None):
            return f"result {i} is None on one side"
        if a is not None and (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"result {i} is {b.dtype} {tuple(b.shape)}, plain {a.dtype} {tuple(a.shape)}"
        if a is not None and not torch.equal(b.nan_to_num(), c.nan_to_num()):
            return f"result {i} differs from one run to the next"
        if a is not None and a.isfinite().all() and not b.isfinite().all():
            return f"result {i} is not finite"
    return ""


if __name__ == "__main__":
    sys.exit(main())
