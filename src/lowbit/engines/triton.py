"""The triton engine: 8-bit codes on the integer matrix units of NVIDIA GPUs, by kernels of our own.

Notation: q code, S scale, z zero point.

It runs only where it was proven: at its first use in a process it encodes and multiplies scattered and extreme numbers
on the GPU, and refuses every product if a code or a result differs from those of the definition on the CPU.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lowbit.engines.base import Pair, Product
from lowbit.engines.blocks import BlockCodes, refusal_of_blocks, values_of_blocks
from lowbit.engines.int8 import refusal_of_codes
from lowbit.engines.int_mm import multiply_codes
from lowbit.numerics.element import Steps
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import BF16, Format, integer
from lowbit.numerics.parts import NUMBERS, NUMBERS_OR_NONE, Listed
from lowbit.numerics.quantizer import Grid, Quantized, encode
from lowbit.numerics.ranges import extremes
from lowbit.numerics.rounding import uniform_noise
from lowbit.numerics.scales import Float32, MinMax, PowerOfTwoScale, SampleMean, Scale
from lowbit.numerics.transforms import NoTransform
from lowbit.products.operators import Linear, Op
from lowbit.products.setting import Setting, Slot

if TYPE_CHECKING:
    from lowbit.kernels.triton import calls

_OPERATORS: tuple[type[Op], ...] = (Linear,)

# The formats that this engine computes in full, with the bits of the moment; any other is refused.
_TAKEN: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(2, 9), "zero": ("symmetric", "integer")},
    Scale: {
        "granularity": ("tensor", "row", "kept-channel", "output-channel"),
        "running": NUMBERS_OR_NONE,
        "running_start": ("first", "zero"),
        "floor": NUMBERS,
    },
    MinMax: {},
    SampleMean: {"fewest": NUMBERS_OR_NONE},
    Float32: {},
    NoTransform: {},
}
_BLOCKED: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(2, 9), "zero": ("symmetric",)},
    Scale: {"granularity": ("block", "square"), "block": (32,), "floor": NUMBERS},
    MinMax: {},
    Float32: {},
    PowerOfTwoScale: {"direction": ("floor",)},
    NoTransform: {},
}
# What the other operand may be: symmetric codes with scales along what the product keeps.
_KEPT: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(2, 9), "zero": ("symmetric",)},
    Scale: {"granularity": ("tensor", "row", "kept-channel", "output-channel"), "floor": NUMBERS},
    MinMax: {},
    Float32: {},
    NoTransform: {},
}

# Compute capability 8.0 is the first whose units the kernels compile for.
LEAST = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One operand as int8 codes: ``x ~ (q - zero) S``.

    Args:
        numbers: int8 ``(rows, columns)``; where there is a zero point, 128 less than the code.
        scale: float32, one, or one for each row or column.
        zero: int32 ``(1,)``, likewise 128 less; None if the format has none.
        shape: of the tensor that was encoded.
    """

    numbers: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: torch.Size


@cache
def missing() -> str:
    """Why this machine cannot run the kernels, or ``""``: looked for and tested once in a process."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install 'lowbit[triton]'`"
    from lowbit.kernels.triton import variants

    if variants.INTERPRETED:
        return self_test("cpu")
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU here"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST:
        return (
            f"this GPU has compute capability {capability[0]}.{capability[1]}: the kernels need {LEAST[0]}.{LEAST[1]}"
        )
    return self_test("cuda")


def self_test(device: str) -> str:
    """Encode and multiply scattered and extreme numbers on a device, and compare with the definition on the CPU.

    Returns:
        What is wrong, or ``""``.
    """
    try:
        return _wrong_codes(device) or _wrong_products(device)
    except Exception as error:  # whatever the compiler or the driver raises: it is the reason of the refusal
        return f"the kernels do not run on this GPU: {type(error).__name__}: {error}"


def _scattered(rows: int, columns: int, by: int) -> Tensor:
    """int64 numbers in -128..127."""
    index = torch.arange(rows * columns, dtype=torch.int64, device="cpu")
    return ((index * by >> 6) % 256 - 128).view(rows, columns)


def _wrong_codes(device: str) -> str:
    from lowbit.kernels.triton import calls

    words = (0x9E3779B9, 17)
    for rows, columns in ((1, 1), (37, 144), (5, 259)):
        x = _scattered(rows, columns, 40503).float() * 1.37 + _scattered(rows, columns, 48271).float() * 2.0**-9
        for key in (None, words):
            noise = None if key is None else uniform_noise(torch.tensor(key, dtype=torch.int64, device="cpu"), x.shape)
            fmt = integer(bits=8, zero="symmetric", rounding="nearest" if key is None else "stochastic")
            rule = calls.Rule(levels=127.0, key=key)
            for found, dims in zip(calls.range_codes(x.to(device), "both", row=rule, column=rule), (1, 0), strict=True):
                wanted = encode(x, fmt, dims=(dims,), noise=noise)
                assert found is not None
                assert wanted.steps is not None
                same = torch.equal(found.q.cpu().float(), wanted.q)
                if not same or not torch.equal(found.scale.cpu(), wanted.steps.scale.flatten()):
                    return f"codes are wrong on this GPU (shape {rows}x{columns})"
    return ""


def _wrong_products(device: str) -> str:
    from lowbit.kernels.triton import calls

    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for m, k, n in ((1, 1, 1), (48, 144, 64), (33, 130, 41)):
        for extreme in (None, -128, 127):
            a, b = _scattered(m, k, 40503).to(torch.int8), _scattered(k, n, 48271).to(torch.int8)
            if extreme is not None:
                a, b = torch.full_like(a, -128), torch.full_like(b, extreme)
            wanted = multiply_codes(a, b, (3, 0), (one, one), None, torch.float32)
            zero = torch.full((1,), 3, dtype=torch.int32, device=device)
            for layout in ("output", "grad_input", "grad_weight"):
                left = calls.Codes(
                    q=(a.t() if layout == "grad_weight" else a).contiguous().to(device), scale=one.to(device), zero=zero
                )
                right = calls.Codes(
                    q=(b.t() if layout == "output" else b).contiguous().to(device), scale=one.to(device)
                )
                if not torch.equal(calls.int8_mm(layout, left, right, None, torch.float32).cpu(), wanted):
                    return f"products of 8-bit codes are wrong on this GPU ({layout}, {m}x{k}x{n})"
    return ""


class Triton:
    """See the top of this file."""

    name: ClassVar[str] = "triton"
    devices: ClassVar[Sequence[str] | None] = ("cuda",)
    dtypes: ClassVar[Sequence[torch.dtype] | None] = (torch.float32, torch.bfloat16)
    adds_bias: ClassVar[bool] = True

    def refusal(self, pair: Pair) -> str:
        """It refuses what it does not list, and everything where it was not proven."""
        if pair.op.geometry is not None:
            return "the triton engine takes linear layers only, not a convolution"
        if BF16 in pair.formats:
            return "the triton engine does not take a bf16 operand"
        if any(fmt.is_blocked for fmt in pair.formats):
            return refusal_of_blocks(pair, _BLOCKED, _KEPT, {}) or missing()
        return refusal_of_codes(pair, _OPERATORS, _TAKEN) or missing()

    def encode(self, x: Tensor, slot: Slot, setting: Setting) -> Operand | BlockCodes:
        """Codes, in one read for the range and one for the codes; in blocks, in one read."""
        from lowbit.kernels.triton import calls

        key = None
        if slot.stochastic:
            key = None if setting.noise is None else setting.noise.words(slot.product, slot.operand)
            if key is None:
                raise ValueError(
                    f"{setting.layer or 'a product'}: {slot.operand} in {slot.product} rounds stochastically and got "
                    "no counter-based noise, which the triton engine needs: use the reference engine with recorded "
                    "noise"
                )
        fmt, matrix = slot.format, x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
        assert fmt.scale is not None
        assert slot.levels is not None
        rule = calls.Rule(levels=float(slot.levels), floor=fmt.scale.floor, key=key)
        if slot.is_blocked:
            return _in_blocks(matrix, slot, rule, x.shape)
        by = _by(slot)
        if not x.numel():
            count = {"row": matrix.shape[0], "column": matrix.shape[1]}.get(by, 1)
            zero = torch.zeros(1, dtype=torch.int32, device=x.device) if by == "affine" else None
            scale = torch.ones(count, dtype=torch.float32, device=x.device)
            return Operand(numbers=matrix.to(torch.int8), scale=scale, zero=zero, shape=x.shape)
        observed = setting.input_range if slot.keeps_range else None
        if observed is None and type(fmt.scale.range) is SampleMean:
            observed = extremes(x.detach().float(), rule=fmt.scale.range, dims=tuple(range(x.dim())))
        rules = {"column": rule} if by == "column" else {"row": rule}
        rows, columns = calls.range_codes(matrix, by, **rules, observed=observed)
        found = columns if rows is None else rows
        assert found is not None
        return Operand(numbers=found.q, scale=found.scale, zero=found.zero, shape=x.shape)

    def multiply(
        self, product: Product, a: Operand | BlockCodes, b: Operand | BlockCodes, bias: Tensor | None
    ) -> Tensor:
        """One launch."""
        from lowbit.kernels.triton import calls

        rows, columns = product.shape[:-1].numel(), product.shape[-1]
        depth = a.numbers.shape[0 if product.name == "grad_weight" else 1]
        if not rows * columns * depth:
            empty = torch.zeros(product.shape, dtype=product.dtype, device=a.numbers.device)
            return empty if bias is None else empty.add_(bias.to(product.dtype))
        bias = None if bias is None else bias.float()
        if isinstance(a, Operand) and isinstance(b, Operand):
            found = calls.int8_mm(product.name, _codes(a), _codes(b), bias, product.dtype)
            return found.view(product.shape)
        left, right = (
            _codes_in_blocks(t, along, -(-depth // calls.BLOCK))
            for t, along in ((a, product.name != "grad_weight"), (b, product.name == "output"))
        )
        return calls.int8_mm_blocks(product.name, left, right, bias, product.dtype).view(product.shape)

    def values(self, operand: Operand | BlockCodes, slot: Slot) -> Quantized:
        """The values of the codes, and their grid."""
        if isinstance(operand, BlockCodes):
            return values_of_blocks(operand, slot)
        sharing, zero = slot.sharing, operand.zero
        one, high = operand.scale.numel() == 1, slot.levels or 0.0
        scale = operand.scale.view([1 if one or d in sharing.dims else n for d, n in enumerate(sharing.view)])
        q = operand.numbers.view(sharing.view).float()
        x = (q if zero is None else q - zero).mul_(scale)
        steps = Steps(
            scale=scale,
            zero=None if zero is None else (zero + 128).float(),
            low=-high if zero is None else 0.0,
            high=high,
        )
        return Quantized(x.reshape(operand.shape), Grid(format=slot.format, sharing=sharing, steps=steps))

    def sum_bias(self, op: Op, g: Tensor) -> Tensor:  # noqa: ARG002 - a matrix
        """It sums in float32."""
        return g.flatten(0, -2).sum(0, dtype=torch.float32)

    def ran(self, product: Product, a: Operand | BlockCodes, b: Operand | BlockCodes) -> tuple[str, str]:  # noqa: ARG002 - operands say it
        """The integer units of the GPU, by one of two kernels."""
        blocked = isinstance(a, BlockCodes) or isinstance(b, BlockCodes)
        return "int8", "triton::int8_mm_blocks" if blocked else "triton::int8_mm"


def _by(slot: Slot) -> str:
    """What shares a scale in an operand as a matrix, as `calls.range_codes` takes it."""
    if not slot.symmetric:
        return "affine"
    if len(slot.sharing.dims) == len(slot.sharing.view):
        return "all"
    return "column" if slot.sharing.dims == (0,) else "row"


def _codes(operand: Operand) -> "calls.Codes":
    from lowbit.kernels.triton import calls

    return calls.Codes(q=operand.numbers, scale=operand.scale, zero=operand.zero)


def _in_blocks(matrix: Tensor, slot: Slot, rule: "calls.Rule", shape: torch.Size) -> BlockCodes:
    from lowbit.kernels.triton import calls

    sizes = dict(slot.sharing.blocks)
    block = sizes.get(0, 1), sizes.get(1, 1)
    scale_of = slot.format.scale
    assert scale_of is not None
    if not matrix.numel():
        blocks = [-(-n // size) for n, size in zip(matrix.shape, block, strict=True)]
        scale = torch.ones(blocks, dtype=torch.float32, device=matrix.device)
        return BlockCodes(numbers=matrix.to(torch.int8), scale=scale, block=block, shape=shape)
    found = calls.block_codes(matrix, block, rule, power=isinstance(scale_of.format, PowerOfTwoScale))
    return BlockCodes(numbers=found.q, scale=found.scale, block=block, shape=shape)


def _codes_in_blocks(operand: Operand | BlockCodes, along: bool, blocks: int) -> "calls.Codes":
    """Codes with scales ``(blocks, width)``; those of an operand that is not in blocks are the same in each."""
    from lowbit.kernels.triton import calls

    if isinstance(operand, BlockCodes):
        return calls.Codes(q=operand.numbers, scale=operand.scales(along=along))
    width = operand.numbers.shape[0 if along else 1]
    return calls.Codes(q=operand.numbers, scale=operand.scale.expand(blocks, width).contiguous())
