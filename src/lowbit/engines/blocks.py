"""Matrices of 8-bit codes in blocks of the summed axis: how the int8 engine encodes and multiplies them.

Notation: q code, S scale, b block of the summed axis k. ``sum_b S_a S_b sum_{k in b} q_a q_b``: each block is summed in
32-bit integers, and blocks are added in float32.

A Hadamard transform needs no way back. Its matrix is orthogonal, so if both operands are transformed along k, the
product of the transforms is that of the operands. Where a short last block was filled with zeros, rounding leaves
values in these places, which are not part of the operands: their product is subtracted.

Where some blocks of an operand have two codes for each number, `lowbit.engines.residuals` adds the second ones.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.engines import residuals
from lowbit.engines.base import Pair, Product
from lowbit.engines.codes import Codes
from lowbit.engines.residuals import Residual
from lowbit.kernels import cpu
from lowbit.kernels.cpu import Rows
from lowbit.numerics.element import Steps
from lowbit.numerics.elements import Integer
from lowbit.numerics.fallback import Fallback
from lowbit.numerics.formats import Format
from lowbit.numerics.parts import NUMBERS, NUMBERS_OR_NONE, Listed, unlisted
from lowbit.numerics.quantizer import Grid, Quantized, encode_transformed
from lowbit.numerics.rounding import uniform_noise
from lowbit.numerics.scales import E4M3, Float32, IntegerScale, MinMax, PowerOfTwoScale, Scale
from lowbit.numerics.transforms import Hadamard, NoTransform
from lowbit.products.operators import Linear, Op
from lowbit.products.setting import Slot

_OPERATORS: tuple[type[Op], ...] = (Linear,)

# The formats in blocks that are computed in full, with the bits of the moment; any other is refused.
_BLOCKED: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(2, 9), "zero": ("symmetric",)},
    Scale: {"granularity": ("block", "square"), "block": range(4, 2**15 + 1, 4), "floor": NUMBERS},
    MinMax: {},
    Float32: {},
    PowerOfTwoScale: {"direction": ("up", "floor")},
    E4M3: {},
    IntegerScale: {"bits": range(2, 17)},
    NoTransform: {},
    Hadamard: {"size": NUMBERS, "signs": NUMBERS_OR_NONE},
}
# Formats in blocks of which some have two codes for each number; one operand of a product may have such a format.
_TWO_CODES: Listed = {
    Format: {},
    Fallback: {"bits": range(2, 9), "share": NUMBERS},
    Scale: {"granularity": ("block", "square"), "block": range(4, 2**15 + 1, 4), "floor": NUMBERS},
    MinMax: {},
    Float32: {},
    NoTransform: {},
}
# What the other operand may be: symmetric codes with scales along what the product keeps.
_KEPT: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(2, 9), "zero": ("symmetric",)},
    Scale: {"granularity": ("tensor", "sample", "row", "kept-channel", "output-channel"), "floor": NUMBERS},
    MinMax: {},
    Float32: {},
    NoTransform: {},
}
# Of blocked formats, those whose scales the native pass makes, in float32 and as powers of two rounded down; torch
# encodes the others.
_SCALE = {"granularity": ("block", "square"), "block": range(4, 2**15 + 1, 4), "floor": NUMBERS}
_NATIVE_FLOAT: Listed = {Scale: _SCALE, MinMax: {}, Float32: {}}
_NATIVE_FLOOR: Listed = {Scale: _SCALE, MinMax: {}, PowerOfTwoScale: {"direction": ("floor",)}}


@dataclass(frozen=True, kw_only=True)
class BlockCodes:
    """One operand as codes of a matrix, after its transform: ``q S``.

    Args:
        numbers: int8 ``(R, C)``; a transform may have made the axis of the sum longer.
        scale: float32 ``(R / rows of a block, C / columns of a block)``, rounded up.
        block: rows and columns of a block.
        shape: of the tensor that was encoded.
        rest: float32 ``(kept axis, filled places)``, the values where a transform filled the axis of the sum; None
            where it did not.
        residual: the second codes of the blocks that have two; None if none may have them.
    """

    numbers: Tensor
    scale: Tensor
    block: tuple[int, int]
    shape: torch.Size
    rest: Tensor | None = None
    residual: Residual | None = None

    def each(self) -> Tensor:
        """The value of each code."""
        tall = self.scale.repeat_interleave(self.block[0], 0)[: self.numbers.shape[0]]
        first = self.numbers * tall.repeat_interleave(self.block[1], 1)[:, : self.numbers.shape[1]]
        return first if self.residual is None else residuals.values(first, self.numbers, self.block, self.residual)

    def scales(self, *, along: bool) -> Tensor:
        """Scales of each block of the depth, ``(blocks, width)``; `along` says that a row runs along the depth."""
        scale, (rows, columns) = self.scale, self.block
        if along:
            return scale.repeat_interleave(rows, 0)[: self.numbers.shape[0]].t().contiguous()
        return scale.repeat_interleave(columns, 1)[:, : self.numbers.shape[1]].contiguous()


def refusal_of_blocks(
    pair: Pair, blocked: Listed = _BLOCKED, kept: Listed = _KEPT, two_codes: Listed = _TWO_CODES
) -> str:
    """Why two operands, of which one is blocked, are not matrices of codes in blocks, or ``""``.

    Args:
        pair: the two operands.
        blocked: an engine's formats in blocks.
        kept: its formats of an operand beside one in blocks.
        two_codes: its formats of which some blocks have two codes.
    """
    if type(pair.op) not in _OPERATORS:
        return f"blocks along what the product sums over have no integer kernel for {pair.op.kind}"
    for fmt, keeps in zip(pair.formats, pair.kept, strict=True):
        if fmt.has_width and fmt.bits > 8:
            return f"codes of {fmt.bits} bits do not fit 8-bit units"
        listed = two_codes if fmt.has_two_codes else blocked if fmt.is_blocked else kept
        if why := unlisted(fmt, listed):
            return why
        if not keeps and not fmt.is_blocked:
            return f"scales per {fmt.granularity} lie along what the product sums over"
    a, b = pair.formats
    if a.has_two_codes and b.has_two_codes:
        return "both operands have blocks of two codes"
    if a.transform != b.transform:
        return f"its operands have different transforms, {str(a.transform) or 'none'} and {str(b.transform) or 'none'}"
    sizes = {fmt.scale.block for fmt in pair.formats if fmt.scale is not None and fmt.scale.block is not None}
    if len(sizes) > 1:
        return f"blocks of {min(sizes)} and of {max(sizes)} do not lie on each other"
    return ""


def encode_blocks(x: Tensor, slot: Slot, key: tuple[int, int] | None) -> BlockCodes:
    """Codes of an operand in blocks, in one native pass; by torch where that pass does not make the scales."""
    sharing, fmt, levels = slot.sharing, slot.format, slot.levels
    assert fmt.scale is not None
    assert levels is not None
    view = x.detach().reshape(sharing.view)
    view = view.float() if fmt.transform.along_axis else view
    turned = fmt.transform.forward(view, sharing.place).contiguous()
    sizes = dict(sharing.blocks)
    block = (sizes.get(0, 1), sizes.get(1, 1))
    longer = turned.shape != view.shape and key is not None  # what was filled in has noise of its own
    floor_power = not unlisted(fmt.scale, _NATIVE_FLOOR)
    if turned.numel() and cpu.runs(turned) and not longer and (floor_power or not unlisted(fmt.scale, _NATIVE_FLOAT)):
        q, scale = cpu.encode_blocks(
            turned, block, levels=float(levels), floor=fmt.scale.floor, floor_power=floor_power, key=key
        )
    else:
        noise = None
        if key is not None:
            noise = uniform_noise(torch.tensor(key, dtype=torch.int64, device="cpu"), sharing.view)
        placed, found = encode_transformed(view.float(), fmt, sharing, levels=levels, noise=noise)
        assert found.steps is not None
        q = placed.joined(found.q.nan_to_num(0.0)).to(torch.int8).contiguous()
        scale = found.steps.scale.reshape([-(-n // size) for n, size in zip(q.shape, block, strict=True)])
    residual = None
    if fmt.has_two_codes and q.numel():
        q, residual = residuals.split(turned, q, scale, block, fmt, float(levels))
    codes = BlockCodes(numbers=q, scale=scale, block=block, shape=x.shape, residual=residual)
    if q.shape == view.shape:
        return codes
    values, axis, own = codes.each(), sharing.axis, view.shape[sharing.axis]
    rest = fmt.transform.back(values, values, sharing.place).narrow(axis, own, q.shape[axis] - own)
    return replace(codes, rest=rest.movedim(axis, 1).contiguous())


def multiply_blocks(product: Product, a: Codes | BlockCodes, b: Codes | BlockCodes, bias: Tensor | None) -> Tensor:
    """One native call for two matrices of codes, of which one at least is in blocks."""
    blocked = [operand for operand in (a, b) if isinstance(operand, BlockCodes)]
    unfinished = any(operand.rest is not None or operand.residual is not None for operand in blocked)
    out = torch.empty(product.shape, dtype=torch.float32 if unfinished else product.dtype, device="cpu")
    sides, block = [], 0
    for operand, along in ((a, product.name != "grad_weight"), (b, product.name == "output")):
        rows, width = operand.numbers.shape if isinstance(operand, BlockCodes) else _matrix(operand.shape)
        sides.append(Rows(data=operand.numbers, rows=rows, width=width, stride=width, along=along))
        if isinstance(operand, BlockCodes):
            block = operand.block[1 if along else 0]
    depth = sides[0].width if sides[0].along else sides[0].rows
    if depth == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.zero_().add_(bias.to(product.dtype))
    blocks = -(-depth // block)
    scales = []
    for operand, side in zip((a, b), sides, strict=True):
        if isinstance(operand, BlockCodes):
            scales.append(operand.scales(along=side.along))
        else:
            scales.append(operand.scale.expand(blocks, side.rows if side.along else side.width).contiguous())
    cpu.multiply_blocks(
        sides[0],
        sides[1],
        out,
        block=block,
        scales=(scales[0], scales[1]),
        bias=None if bias is None else bias.float().contiguous(),
    )
    for i, operand in enumerate((a, b)):
        if isinstance(operand, BlockCodes) and operand.residual is not None:
            of, other = sides[i], sides[1 - i]
            residuals.add(out, operand.residual, of, other, scales[1 - i], block, first=i == 0)
    rest = [operand.rest for operand in blocked if operand.rest is not None]
    return out if not rest else out.sub_((rest[0] @ rest[1].t()).view(out.shape))


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """All leading axes by the last one."""
    return shape.numel() // max(shape[-1], 1), shape[-1]


def values_of_blocks(operand: BlockCodes, slot: Slot) -> Quantized:
    """The real values of the codes, transformed back, and their grid."""
    sharing, fmt = slot.sharing, slot.format
    original = torch.empty(sharing.view, dtype=torch.float32, device="meta")  # only its shape counts
    x = fmt.transform.back(operand.each(), original, sharing.place)
    steps_scale = operand.scale
    for axis in sorted(sharing.dims):
        steps_scale = steps_scale.unsqueeze(axis)
    high: Tensor | float = slot.levels or 0.0
    if operand.residual is not None:
        finer = operand.residual.finer_of(operand.scale).reshape(steps_scale.shape)
        steps_scale, high = steps_scale / finer, high * finer
    steps = Steps(scale=steps_scale, low=-high, high=high)
    return Quantized(x.reshape(operand.shape), Grid(format=fmt, sharing=sharing, steps=steps))
