"""Operands as 8-bit codes, or as they are for bf16 units, in the memory order that integer products read.

Notation: q code, S scale, z zero point. Activations lie as (rows, channels) or (B, *size, channels), weights as (first
axis, taps, second axis).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.kernels.memory import View, is_channels_last, memory_view
from lowbit.numerics.quantizer import Sharing, encode
from lowbit.products.setting import Layout, Slot


@dataclass(frozen=True, kw_only=True)
class Codes:
    """One operand as 8-bit codes: ``x ~ (q - zero) * scale + offset``.

    Args:
        numbers: uint8 or int8, in the memory order that products read.
        scale: float32, one in all, or one for each row or channel that the product keeps.
        zero: the code of a real zero.
        shape: of the tensor that was encoded.
        layout: of the memory: as it is (``"matrix"``), (B, *size, C) or (first axis, taps, second axis).
        offset: float32, as many as scales; None for 0.
    """

    numbers: Tensor
    scale: Tensor
    zero: int
    shape: torch.Size
    layout: Layout
    offset: Tensor | None = None

    def along(self, each: Tensor, sharing: Sharing) -> Tensor:
        """Scales or offsets, broadcasting against the view."""
        one = each.numel() == 1
        return each.view([1 if one or d in sharing.dims else n for d, n in enumerate(sharing.view)])

    def values(self, sharing: Sharing) -> Tensor:
        """The real values, float32 in the shape of the tensor."""
        q = _in_shape(self.numbers, self.shape, self.layout)
        x = (q.reshape(sharing.view).float() - self.zero).mul_(self.along(self.scale, sharing))
        return (x if self.offset is None else x.add_(self.along(self.offset, sharing))).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Values:
    """One operand as it is, to be rounded to bf16 while it is multiplied: float32 or bfloat16, memory as of `Codes`."""

    numbers: Tensor
    shape: torch.Size
    layout: Layout
    zero: int = 0

    @property
    def scale(self) -> Tensor:
        """One."""
        return torch.ones(1, dtype=torch.float32, device="cpu")

    def values(self) -> Tensor:
        """The real values rounded to bfloat16, float32 in the shape of the tensor."""
        return _in_shape(self.numbers, self.shape, self.layout).to(torch.bfloat16).float()


def _in_shape(q: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Numbers in the memory order of a layout as a tensor of that shape."""
    if layout == "matrix":
        return q.view(shape)
    if layout == "weight":
        return q.view(shape[0], math.prod(shape[2:]), shape[1]).transpose(1, 2).reshape(shape)
    return q.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


Operand = Codes | Values


def _ordered_view(x: Tensor, whole: bool, view: tuple[int, ...], dims: tuple[int, ...]) -> View | None:
    """The view of a weight whose memory is (first axis, taps, second axis)."""
    first, second = x.shape[:2]
    taps = math.prod(x.shape[2:])
    kept = [n for d, n in enumerate(view) if d not in dims and n > 1]
    if whole:
        return 1, 1, x.numel(), False
    if kept == [first] and first != second:
        return 1, first, taps * second, False
    if kept == [second] and first != second:
        return first * taps, second, 1, False
    if first == second and view[0] == 1 and len(kept) == 1:  # (groups 1, first, second, *kernel)
        return (1, first, taps * second, False) if 1 not in dims else (first * taps, second, 1, False)
    return None


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How the native passes take an operand: its memory, one scale or one for each channel, and taps to transpose."""

    memory: View
    whole: bool
    taps: int


@lru_cache(maxsize=4096)
def passes(
    shape: torch.Size, stride: tuple[int, ...], layout: Layout, sharing: Sharing, stochastic: bool
) -> Passes | None:
    """The passes over an operand with such memory; None if they do not take it."""
    x = torch.empty_strided(shape, stride, dtype=torch.float32, device="meta")
    view, dims = sharing.view, sharing.dims
    weight = layout == "weight"
    taps = 1 if layout == "matrix" else math.prod(shape[2:])
    memory = memory_view(x, view, dims)
    whole = len(dims) == len(view) or (memory is not None and memory[1] == 1)  # one scale
    last = memory is not None and memory[3]
    ordered = weight and is_channels_last(x) and not x.is_contiguous()
    if ordered:  # its memory is already in the wanted order; noise is numbered in another
        memory = None if stochastic else _ordered_view(x, len(dims) == len(view), view, dims)
    transposed = not last and not ordered and taps > 1
    if transposed and memory is not None:
        outer, channels, inner, _ = memory
        if channels == 1:
            memory = (shape[0], shape[1], taps, False)
        elif not weight or (inner == taps and not (outer > 1 and inner < 64)) or (inner != taps and outer != 1):
            memory = None
    if memory is None or x.numel() == 0:
        return None
    return Passes(memory=memory, whole=whole, taps=taps if transposed else 1)


def _whole(zero: Tensor | float | None) -> int:
    """A zero point as a number; 0 where it is nan, as its scale is then nan too."""
    value = 0.0 if zero is None else float(zero)
    return 0 if math.isnan(value) else int(value)


def in_order(x: Tensor, layout: Layout) -> Tensor:
    """The memory order that products read, flat."""
    if layout == "matrix":
        return x.contiguous().flatten()
    if layout == "weight":
        return x.flatten(2).transpose(1, 2).contiguous().flatten()
    return x.movedim(1, -1).contiguous().flatten()


def encode_by_torch(x: Tensor, slot: Slot, *, noise: Tensor | None, observed: tuple[Tensor, Tensor] | None) -> Codes:
    """Codes by `lowbit.numerics.quantizer.encode`, on any device, of `x` as it is after its format's transform.

    `noise` has a draw in [0, 1) for each number.
    """
    view, fmt = slot.sharing.view, slot.format
    x = x.float()
    noise = None if noise is None else noise.reshape(view)
    seen = None if observed is None else (observed[0].view((1,) * len(view)), observed[1].view((1,) * len(view)))
    codes = encode(x.reshape(view), fmt, dims=slot.sharing.dims, levels=slot.levels, noise=noise, observed=seen)
    assert codes.steps is not None
    scale, zero, offset = codes.steps.scale.flatten().contiguous(), codes.steps.zero, codes.steps.offset
    if fmt.zero == "symmetric" and isinstance(zero, Tensor):  # what is 0 has the code of a zero point of its own
        scale, zero = scale.masked_fill(zero.flatten() > 0, 0.0), None
    q = codes.q.nan_to_num(0.0).to(torch.int8 if fmt.zero == "symmetric" else torch.uint8).reshape(x.shape)
    return Codes(
        numbers=in_order(q, slot.layout),
        scale=scale,
        zero=_whole(zero),
        shape=x.shape,
        layout=slot.layout,
        offset=None if offset is None else offset.flatten().contiguous(),
    )


def per_row(each: Tensor, rows: int) -> Tensor:
    """Scales or offsets of a matrix's rows: one in all, or one for each row; samples may have several rows."""
    return each if each.numel() in (1, rows) else each.repeat_interleave(rows // each.numel())


def most_summed(a: Operand, b: Operand) -> int:
    """How many products of two operands' numbers the units can sum; without limit on bf16 units."""
    return MOST_SUMMED[a.numbers.dtype, b.numbers.dtype] if are_codes(a, b) else 2**62


def are_codes(a: Operand, b: Operand) -> bool:
    """Whether both are codes, which int8 units multiply; bf16 units multiply everything else."""
    return type(a) is Codes and type(b) is Codes


# The largest number of products of two codes whose sum 32 bits hold, signed, by their types; a code is at most this far
# from the code of zero.
_REACH = {torch.uint8: 255, torch.int8: 127}
MOST_SUMMED = {(a, b): (2**31 - 1) // (_REACH[a] * _REACH[b]) for a in _REACH for b in _REACH}
