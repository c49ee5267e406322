"""The three products of convolutions on integer codes, and on bf16 values where a recipe has them.

Notation: x input, w weight, g grad_output; q code, S scale, z zero point; P positions, T taps of a kernel, C, O input
and output channels of one group. A product is one call of `lowbit.kernels.cpu.multiply` for each group.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.engines.base import Product
from lowbit.engines.codes import Operand, are_codes, most_summed
from lowbit.errors import UsageError
from lowbit.kernels import cpu
from lowbit.kernels.cpu import Rows, Window
from lowbit.products import strides
from lowbit.products.operators import Geometry


def convolution(a: Operand, b: Operand, product: Product, geometry: Geometry, bias: Tensor | None) -> Tensor:
    """One of the three products of a convolution, plus bias, in its shape and dtype."""
    shape, dtype, transposed = product.shape, product.dtype, geometry.transposed
    if product.name == "output":
        return _convolve(a, b, geometry, shape, bias, dtype, transposed=transposed)
    if product.name == "grad_input":
        return _convolve(a, b, geometry, shape, bias, dtype, transposed=not transposed)
    # The first axis of a transposed convolution's weight counts input channels.
    return _weight(*((b, a) if transposed else (a, b)), geometry, shape, dtype, product.channels_last)


def _three(values: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    padded = (*(fill,) * (3 - len(values)), *values)
    return padded[0], padded[1], padded[2]


def _window(geometry: Geometry, kernel: torch.Size, rows: torch.Size, reached: torch.Size, transposed: bool) -> Window:
    """The window whose rows count the positions of `rows` and whose taps reach into `reached`, both (B, C, *size)."""
    return Window(
        position=(rows[0], *_three(tuple(rows[2:]), 1)),
        size=_three(tuple(reached[2:]), 1),
        kernel=_three(tuple(kernel), 1),
        stride=_three(geometry.stride, 1),
        padding=_three(geometry.padding, 0),
        dilation=_three(geometry.dilation, 1),
        transposed=transposed,
        channels=reached[1] // geometry.groups,
    )


def _new(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty (B, C, *size) whose memory is (B, *size, C)."""
    return torch.empty_strided(shape, strides.channels_last(shape), dtype=dtype, device="cpu")


def _of_group(scale: Tensor, group: int, groups: int) -> Tensor:
    """The scales of one group's channels."""
    if scale.numel() == 1:
        return scale
    count = scale.numel() // groups
    return scale[group * count : (group + 1) * count]


def _row_scales(t: Operand, positions: int) -> Tensor:
    """One scale, or one for each row where each sample has its own."""
    return t.scale if t.scale.numel() == 1 else t.scale.repeat_interleave(positions)


def _convolve(
    a: Operand,
    w: Operand,
    geometry: Geometry,
    shape: torch.Size,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    """The output or the gradient of an input.

    Taps reach from each position of the smaller side, and w is (N, T, C), where the result has N channels and `a` C.
    If `transposed`, taps reach from each position of the larger side, and w is (C, T, N).
    """
    out = _new(shape, dtype)
    groups, taps = geometry.groups, math.prod(w.shape[2:])
    channels, wanted = a.shape[1] // groups, shape[1] // groups
    k = taps * channels
    if out.numel() == 0 or k == 0:
        return out.zero_()
    if k > most_summed(a, w):
        raise UsageError(
            f"a convolution that sums {taps} taps of {channels} channels: more than {most_summed(a, w)} products of "
            "codes overflow 32 bits. Use the reference engine for this layer"
        )
    window = _window(geometry, w.shape[2:], shape, a.shape, transposed)
    rows = shape.numel() // shape[1]
    for group in range(groups):
        left = Rows(
            data=a.numbers, first=group * channels, rows=rows, width=k, stride=a.shape[1], along=True, zero=a.zero,
            window=window,
        )  # fmt: skip
        first = group * (w.shape[0] // groups) * taps * w.shape[1]
        if transposed:
            right = Rows(
                data=w.numbers, first=first, rows=k, width=wanted, stride=wanted, along=False, fold=channels,
                zero=w.zero,
            )  # fmt: skip
        else:
            right = Rows(data=w.numbers, first=first, rows=wanted, width=k, stride=k, along=True, zero=w.zero)
        cpu.multiply(
            left, right, out, first=group * wanted, stride=shape[1], taps=1,
            scales=(_row_scales(a, rows // shape[0]), _of_group(w.scale, group, groups)),
            bias=None if bias is None else bias[group * wanted : (group + 1) * wanted], codes=are_codes(a, w),
        )  # fmt: skip
    return out


def _weight(
    small: Operand, large: Operand, geometry: Geometry, shape: torch.Size, dtype: torch.dtype, ordered: bool
) -> Tensor:
    """The gradient of a weight (first axis of `small`, second of `large`, *kernel)."""
    out = _new(shape, dtype) if ordered else torch.empty(shape, dtype=dtype, device="cpu")
    if out.numel() == 0 or small.shape.numel() == 0:
        return out.zero_()
    window = _window(geometry, shape[2:], small.shape, large.shape, False)
    pieces = list(_pieces(window, most_summed(small, large)))
    if len(pieces) > 1:
        total = torch.zeros_like(out, dtype=torch.float32)
        for piece in pieces:
            total += _weight_of(piece, small, large, geometry, torch.empty_like(total), ordered)
        return out.copy_(total)
    return _weight_of(pieces[0], small, large, geometry, out, ordered)


def _pieces(window: Window, most: int) -> Iterator[tuple[int, int, Window]]:
    """Cut the positions that rows count into runs of at most `most`: (first row, first sample, the run as a window).

    Each run is a range of one axis, at one index of the axes before it, with all of the axes after it.
    """
    position = window.position
    axis = next(a for a in range(4) if a == 3 or math.prod(position[a + 1 :]) <= most)
    inner = math.prod(position[axis + 1 :])
    length = most // inner
    for before in range(math.prod(position[:axis])):
        index = [before // math.prod(position[a + 1 : axis]) % position[a] for a in range(axis)]
        for start in range(0, position[axis], length):
            count = min(length, position[axis] - start)
            at = [*index, start, *[0] * (3 - axis)]
            size = [*[1] * axis, count, *position[axis + 1 :]]
            # Positions count from 0 again, so the taps are shifted by where the run begins.
            padding = [p - a * s for p, a, s in zip(window.padding, at[1:], window.stride, strict=True)]
            run = replace(
                window,
                position=(size[0], size[1], size[2], size[3]),
                padding=(padding[0], padding[1], padding[2]),
            )
            yield (before * position[axis] + start) * inner, at[0], run


def _weight_of(
    piece: tuple[int, int, Window], small: Operand, large: Operand, geometry: Geometry, out: Tensor, ordered: bool
) -> Tensor:
    """The gradient of a weight from one run of positions, in `out`."""
    row, sample, window = piece
    groups, taps = geometry.groups, math.prod(out.shape[2:])
    count, channels = out.shape[0] // groups, out.shape[1]
    rows, before = math.prod(window.position), sample * math.prod(window.size) * large.shape[1]
    for group in range(groups):
        left = Rows(
            data=small.numbers, first=row * small.shape[1] + group * count, rows=rows, width=count,
            stride=small.shape[1], along=False, zero=small.zero,
        )  # fmt: skip
        right = Rows(
            data=large.numbers, first=before + group * channels, rows=rows, width=taps * channels,
            stride=large.shape[1], along=False, zero=large.zero, window=window,
        )  # fmt: skip
        scales = _of_group(small.scale, group, groups), _of_group(large.scale, group, groups)
        cpu.multiply(
            left, right, out, first=group * count * taps * channels, stride=taps * channels, scales=scales,
            taps=1 if ordered else taps, bias=None, codes=are_codes(small, large),
        )  # fmt: skip
    return out
