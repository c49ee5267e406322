"""The int8 engine: 8-bit codes on the processor's 8-bit units, and bf16 values on its bf16 units.

Notation: q code, S scale, z zero point.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit.engines.base import Pair, Product
from lowbit.engines.blocks import (
    BlockCodes,
    encode_blocks,
    multiply_blocks,
    refusal_of_blocks,
    values_of_blocks,
)
from lowbit.engines.codes import (
    MOST_SUMMED,
    Codes,
    Operand,
    Passes,
    Values,
    are_codes,
    encode_by_torch,
    in_order,
    passes,
    per_row,
)
from lowbit.engines.int8_convolutions import convolution
from lowbit.engines.offsets import with_offsets
from lowbit.kernels import cpu, operators
from lowbit.kernels.cpu import Rows
from lowbit.numerics.element import Steps
from lowbit.numerics.elements import Integer, Sign
from lowbit.numerics.formats import BF16, FP32, Format
from lowbit.numerics.parts import ANYTHING, NUMBERS, NUMBERS_OR_NONE, Listed, unlisted
from lowbit.numerics.quantizer import Grid, Quantized, native_grid
from lowbit.numerics.ranges import extremes
from lowbit.numerics.scales import Constant, Float32, Magnitude, MeanMagnitude, MinMax, SampleMean, Scale
from lowbit.numerics.transforms import NO_TRANSFORM, Clip, NoTransform, TanhMax
from lowbit.products.operators import Convolution, Linear, Op
from lowbit.products.setting import Setting, Slot

Unit = Literal["int8", "bf16"]

# Instruction sets, any of which has the units of a kind.
_UNITS: dict[Unit, tuple[str, ...]] = {"int8": ("avx2", "dotprod"), "bf16": ("avx512bf16",)}

_OPERATORS: tuple[type[Op], ...] = (Linear, Convolution)

# What of a format this engine computes in every encoding. Other widths are looked at when they are asked for.
_ROUNDED = {"rounding": ("nearest", "stochastic"), "widths": ANYTHING}
_SCALE = {
    "granularity": ("tensor", "sample", "row", "kept-channel", "output-channel"),
    "running": NUMBERS_OR_NONE,
    "running_start": ("first", "zero"),
    "floor": NUMBERS,
}
# The formats that this engine computes in full, with the bits of the moment, beside bf16; any other is refused.
_TAKEN: Listed = {
    Format: _ROUNDED,
    Integer: {"bits": range(1, 9), "zero": ("symmetric", "integer", "offset")},
    Sign: {},
    Scale: _SCALE,
    MinMax: {},
    SampleMean: {"fewest": NUMBERS_OR_NONE},
    Constant: {"low": NUMBERS, "high": NUMBERS},
    Magnitude: {},
    MeanMagnitude: {},
    Float32: {},
    NoTransform: {},
    Clip: {"low": NUMBERS, "high": NUMBERS},
    TanhMax: {},
}
# Of these, those that native passes encode: whose range they measure themselves, and whose range or offset follows from
# the smallest and the largest value. torch encodes the others.
_NATIVE: Listed = {
    Format: _ROUNDED,
    Integer: {"bits": range(1, 9), "zero": ("symmetric", "integer", "offset")},
    Scale: _SCALE,
    MinMax: {},
    SampleMean: {"fewest": NUMBERS_OR_NONE},
    Float32: {},
    NoTransform: {},
}
_MEASURED = (MinMax, SampleMean)
_OF_ENDS: Listed = {
    Format: _ROUNDED,
    Integer: {"bits": range(1, 9), "zero": ("offset",)},
    Scale: _SCALE,
    MinMax: {},
    Constant: {"low": NUMBERS, "high": NUMBERS},
    Magnitude: {},
    Float32: {},
    NoTransform: {},
    Clip: {"low": NUMBERS, "high": NUMBERS},
    TanhMax: {},
}


@cache
def self_test() -> str:
    """Multiply scattered and extreme codes, once in a process, and compare with exact arithmetic.

    Processors without 8-bit units that sum in 32 bits saturate on the way, so products of extreme codes differ.

    Returns:
        What is wrong, or ``""``.
    """
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for rows, k, columns in ((1, 1, 1), (33, 130, 40), (5, 4096, 17)):
        a = (_count(rows * k) * 40503 // 64 % 256).view(rows, k).to(torch.uint8)
        b = (_count(columns * k) * 48271 // 32 % 256 - 128).view(columns, k).to(torch.int8)
        for low in (-128, 127, None):
            if low is not None:
                a, b = torch.full_like(a, 255), torch.full_like(b, low)
            wanted = (a.long() - 3) @ b.long().t()
            left = Codes(numbers=a, scale=one, zero=3, shape=a.shape, layout="matrix")
            right = Codes(numbers=b, scale=one, zero=0, shape=b.shape, layout="matrix")
            product = Product(op=Linear(), name="output", shape=wanted.shape, dtype=torch.float32)
            found = Int8().multiply(product, left, right, None)
            place = Convolution(stride=(1, 1), padding=(0, 0), dilation=(1, 1))
            left = replace(left, shape=torch.Size((rows, k, 1, 1)), layout="activation")
            right = replace(right, shape=torch.Size((columns, k, 1, 1)), layout="weight")
            product = replace(product, op=place, shape=torch.Size((rows, columns, 1, 1)))
            windows = Int8().multiply(product, left, right, None)
            if not (torch.equal(found, wanted.float()) and torch.equal(windows.flatten(1), wanted.float())):
                return f"products of 8-bit codes are wrong on this processor (shape {rows}x{k}x{columns})"
    return ""


def _count(number: int) -> Tensor:
    """0 to number - 1."""
    return torch.arange(number, dtype=torch.int64, device="cpu")


def missing(unit: Unit) -> str:
    """Why this machine lacks the units, or ``""``."""
    sets = operators.instruction_sets()
    if sets is None:
        return "lowbit was installed without its native kernels (no compiler): reinstall with a C++17 compiler"
    wanted = _UNITS[unit]
    if not any(name in sets for name in wanted):
        found = ", ".join(sets) or "no vectors"
        return f"this processor, or ONEDNN_MAX_CPU_ISA, offers {found} and not {' or '.join(wanted)}"
    return self_test()


# The memory format in which channels come last, by the number of axes.
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Int8:
    """See the top of this file."""

    name: ClassVar[str] = "int8"
    devices: ClassVar[Sequence[str] | None] = ("cpu",)
    dtypes: ClassVar[Sequence[torch.dtype] | None] = (torch.float32, torch.bfloat16)
    adds_bias: ClassVar[bool] = True

    def refusal(self, pair: Pair) -> str:
        """It refuses formats that it does not list, scales along what the product sums over, and missing units."""
        if any(fmt.is_blocked for fmt in pair.formats):
            return refusal_of_blocks(pair) or missing("int8")
        if why := refusal_of_codes(pair, _OPERATORS, _TAKEN, offsets=True):
            return why
        return missing("bf16" if BF16 in pair.formats else "int8")

    def encode(self, x: Tensor, slot: Slot, setting: Setting) -> Operand | BlockCodes:
        """Codes, in one or two passes over memory; values where the format is bf16."""
        fmt, layout, key = slot.format, slot.layout, None
        if fmt.scale is None:
            # The numbers may be the memory of x itself: saved as a detached x, torch raises its usual error if they are
            # changed in place.
            return Values(numbers=in_order(x.detach(), layout), shape=x.shape, layout=layout)
        if slot.stochastic:
            key = None if setting.noise is None else setting.noise.words(slot.product, slot.operand)
            if key is None:
                raise ValueError(
                    f"{setting.layer or 'a product'}: {slot.operand} in {slot.product} rounds stochastically and got "
                    "no counter-based noise, which the int8 engine needs: use the reference engine with recorded noise"
                )
        if slot.is_blocked:
            return encode_blocks(x, slot, key)
        observed = setting.input_range if slot.keeps_range else None
        x = x.contiguous() if layout == "matrix" else x
        if fmt.transform != NO_TRANSFORM and not fmt.clips_in_its_grid:
            x = fmt.transform.forward(x.float(), slot.sharing.place)
        way = passes(x.shape, x.stride(), layout, slot.sharing, slot.stochastic)
        if way is None and layout != "matrix" and x.dim() in _LAST:
            # One copy costs far less than torch's operators, which take several passes over memory.
            x = x.contiguous(memory_format=_LAST[x.dim()])
            way = passes(x.shape, x.stride(), layout, slot.sharing, slot.stochastic)
        # Most formats are measured and rounded as they are, which costs no look-up.
        is_plain = type(fmt.element) is Integer and type(fmt.scale.range) in _MEASURED and fmt.transform == NO_TRANSFORM
        if way is None or not (is_plain or _is_native(fmt)):
            noise = None if key is None else cpu.noise(x.numel(), key)
            return encode_by_torch(x.contiguous(), slot, noise=noise, observed=observed)
        if slot.has_offset:
            return _encode_with_offset(x, slot, way, observed, key)
        assert slot.levels is not None
        numbers, scale, zero = cpu.quantize(
            x,
            way.memory,
            symmetric=slot.symmetric,
            floor=fmt.scale.floor,
            levels=slot.levels,
            samples=slot.samples if way.whole else None,
            observed=observed,
            key=key,
            taps=way.taps,
        )
        return Codes(numbers=numbers, scale=scale, zero=zero, shape=x.shape, layout=layout)

    def multiply(
        self, product: Product, a: Operand | BlockCodes, b: Operand | BlockCodes, bias: Tensor | None
    ) -> Tensor:
        """One native call for a matrix product, one for each group of a convolution's channels."""
        if isinstance(a, BlockCodes) or isinstance(b, BlockCodes):
            assert not isinstance(a, Values)
            assert not isinstance(b, Values)
            return multiply_blocks(product, a, b, bias)
        if isinstance(a, Codes) and isinstance(b, Codes) and not (a.offset is None and b.offset is None):
            return with_offsets(self.multiply, product, a, b, bias)
        bias = None if bias is None else bias.float().contiguous()
        geometry = product.op.geometry
        if geometry is not None:
            return convolution(a, b, product, geometry, bias)
        # Each operand has ``(..., width)`` rows, which lie along what is summed, or are one index of it each.
        sides = []
        for t, runs_along in ((a, product.name != "grad_weight"), (b, product.name == "output")):
            width = t.shape[-1]
            rows = t.shape.numel() // max(width, 1)
            sides.append(Rows(data=t.numbers, rows=rows, width=width, stride=width, along=runs_along, zero=t.zero))
        if isinstance(a, Codes) and sides[0].along and a.scale.numel() not in (1, sides[0].rows):
            a = replace(a, scale=per_row(a.scale, sides[0].rows))
        return _matrix(sides[0], sides[1], (a, b), product.shape, bias, product.dtype)

    def values(self, operand: Operand | BlockCodes, slot: Slot) -> Quantized:
        """The values of the codes, or those rounded to bf16."""
        return values_of_blocks(operand, slot) if isinstance(operand, BlockCodes) else values_of(operand, slot)

    def sum_bias(self, op: Op, g: Tensor) -> Tensor:
        """It sums in float32, in an order that does not depend on the number of threads."""
        rows = g if op.geometry is None else g.movedim(1, -1)
        return cpu.sums(rows.contiguous(), rows.shape[-1])

    def ran(self, product: Product, a: Operand | BlockCodes, b: Operand | BlockCodes) -> tuple[str, str]:  # noqa: ARG002 - operands say it
        """Codes times codes run on int8 units, everything else on bf16 units."""
        if isinstance(a, BlockCodes) or isinstance(b, BlockCodes):
            return "int8", "lowbit::multiply_blocks"
        return ("int8", "lowbit::multiply_codes") if are_codes(a, b) else ("bf16", "lowbit::multiply_halves")


def _encode_with_offset(
    x: Tensor, slot: Slot, way: Passes, observed: tuple[Tensor, Tensor] | None, key: tuple[int, int] | None
) -> Codes:
    """Codes whose real zero is not on the grid: the range in one pass over memory, the codes in another."""
    scale_of, levels = slot.format.scale, slot.levels
    assert scale_of is not None
    assert levels is not None
    if observed is not None:
        lo, hi = observed
    else:
        ends = cpu.extremes(x, (1, 1, x.numel(), False) if way.whole else way.memory)
        lo, hi = scale_of.range.of_ends(*ends) or extremes(x, rule=scale_of.range, dims=tuple(range(x.dim())))
    steps = slot.format.element.steps(lo.float().flatten(), hi.float().flatten(), levels, scale_of.step)
    numbers = cpu.encode(x, way.memory, native_grid(steps, key), signed=False, taps=way.taps)
    offset = steps.offset if steps.offset is not None and bool(steps.offset.any()) else None
    return Codes(numbers=numbers, scale=steps.scale, zero=0, shape=x.shape, layout=slot.layout, offset=offset)


def _matrix(
    a: Rows, b: Rows, of: tuple[Operand, Operand], shape: torch.Size, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of two matrices; sums too long for 32 bits are cut, and the parts are added in float32."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    k = a.width if a.along else a.rows
    if k == 0 or out.numel() == 0:
        return out.zero_() if bias is None else out.zero_().add_(bias.to(dtype))
    codes = type(of[0]) is Codes and type(of[1]) is Codes
    most = MOST_SUMMED[a.data.dtype, b.data.dtype] if codes else k
    if k > most:
        total = torch.zeros(shape, dtype=torch.float32, device="cpu") if bias is None else bias.expand(shape).clone()
        for start in range(0, k, most):
            parts = _part(a, start, most), _part(b, start, most)
            total += _matrix(*parts, of, shape, None, torch.float32)
        return total.to(dtype)
    cpu.multiply(
        a, b, out, first=0, stride=shape[-1], taps=1, scales=(of[0].scale, of[1].scale), bias=bias, codes=codes
    )  # fmt: skip
    return out


def _part(t: Rows, start: int, count: int) -> Rows:
    """A part of what is summed over: at most `count` numbers from `start` on, without a window."""
    if t.along:
        return replace(t, first=t.first + start, width=min(count, t.width - start))
    return replace(t, first=t.first + start * t.stride, rows=min(count, t.rows - start))


def refusal_of_codes(pair: Pair, operators: Sequence[type[Op]], listed: Listed, *, offsets: bool = False) -> str:
    """Why two operands are not 8-bit codes, or bf16 values, of a product that sums once, or ``""``.

    Args:
        pair: the two operands.
        operators: what the engine multiplies.
        listed: its integer formats.
        offsets: whether it takes float offsets, of whole tensors and of the channels of a weight.
    """
    if type(pair.op) not in operators:
        return f"{pair.op.kind} has no integer kernel here"
    for i, (fmt, keeps) in enumerate(zip(pair.formats, pair.kept, strict=True)):
        if fmt == FP32:
            return f"{fmt} has no units of 16 bits or fewer"
        if fmt == BF16:
            continue
        if fmt.has_width and fmt.bits > 8:
            return f"codes of {fmt.bits} bits do not fit 8-bit units"
        if fmt.zero == "offset" and not offsets:
            return "a float offset is not an integer code"
        if fmt.zero == "offset" and BF16 in pair.formats:
            return "a float offset beside a bf16 operand has no integer kernel"
        summed = i == 0 or pair.name == "grad_weight"
        if fmt.zero == "offset" and fmt.granularity not in ("tensor", "sample") and summed:
            return f"float offsets per {fmt.granularity} of anything but a weight have no integer kernel"
        if fmt.zero == "integer" and fmt.granularity != "tensor":
            return f"a zero point per {fmt.granularity} is not one zero point"
        if not keeps:
            return f"scales per {fmt.granularity} lie along what the product sums over"
        if why := unlisted(fmt, listed):
            return why
    return ""


@lru_cache(maxsize=4096)
def takes(fmt: Format) -> bool:
    """Whether this engine's native passes compute all of a format once its codes have 8 bits or fewer."""
    return fmt == BF16 or not unlisted(fmt.with_bits(8) if fmt.has_width else fmt, _NATIVE)


@lru_cache(maxsize=4096)
def _is_native(fmt: Format) -> bool:
    """Whether native passes encode a format with the bits of the moment."""
    return not unlisted(fmt, _NATIVE) or not unlisted(fmt, _OF_ENDS)


def values_of(operand: Operand, slot: Slot) -> Quantized:
    """The real values of codes with their grid; bf16 values have none."""
    if isinstance(operand, Values):
        return Quantized(operand.values())
    high = float(slot.format.code_range[1]) if slot.levels is None else slot.levels
    low = -high if slot.format.zero == "symmetric" else 0.0
    sharing, offset = slot.sharing, operand.offset
    steps = Steps(
        scale=operand.along(operand.scale, sharing),
        zero=operand.zero,
        offset=None if offset is None else operand.along(offset, sharing),
        low=low,
        high=high,
    )
    return Quantized(operand.values(slot.sharing), Grid(format=slot.format, sharing=slot.sharing, steps=steps))
