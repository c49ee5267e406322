"""The int8 engine of CUDA devices: products of two matrices of 8-bit codes through `torch._int_mm`.

Notation: a, b codes with zero points z_a, z_b; m rows and n columns of the result, k what is summed over.
``sum_k (a - z_a)(b - z_b) = sum_k a b - z_a sum_k b - z_b sum_k a + k z_a z_b``, in 32-bit integers.

Nothing here asks for the device: on CPU tensors the same operators give the same numbers.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.engines.base import Pair, Product
from lowbit.engines.codes import Codes, encode_by_torch, per_row
from lowbit.engines.int8 import refusal_of_codes, values_of
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import BF16, Format
from lowbit.numerics.parts import NUMBERS, NUMBERS_OR_NONE, Listed
from lowbit.numerics.quantizer import Quantized
from lowbit.numerics.scales import Float32, MinMax, SampleMean, Scale
from lowbit.numerics.transforms import NoTransform
from lowbit.products.operators import Linear, Op
from lowbit.products.setting import Setting, Slot

_OPERATORS: tuple[type[Op], ...] = (Linear,)

# The formats that this engine computes in full, with the bits of the moment; any other is refused.
_TAKEN: Listed = {
    Format: {"rounding": ("nearest", "stochastic")},
    Integer: {"bits": range(2, 9), "zero": ("symmetric", "integer")},
    Scale: {
        "granularity": ("tensor", "sample", "row", "kept-channel", "output-channel"),
        "running": NUMBERS_OR_NONE,
        "running_start": ("first", "zero"),
        "floor": NUMBERS,
    },
    MinMax: {},
    SampleMean: {"fewest": NUMBERS_OR_NONE},
    Float32: {},
    NoTransform: {},
}

# What torch._int_mm takes on CUDA: more than 16 rows, and multiples of 8 as k and n.
_LEAST_ROWS = 17
_WHOLE = 8
# The sum of so many products of bytes, 255 by 255 at most, stays below 2**31; a multiple of 8.
MOST_SUMMED = (2**31 - 1) // 255**2 // _WHOLE * _WHOLE


class IntMM:
    """See the top of this file."""

    name: ClassVar[str] = "int8"
    devices: ClassVar[Sequence[str] | None] = ("cuda",)
    dtypes: ClassVar[Sequence[torch.dtype] | None] = (torch.float32, torch.bfloat16)
    adds_bias: ClassVar[bool] = True

    def refusal(self, pair: Pair) -> str:
        """It refuses everything but linear layers of the integers that it lists."""
        if pair.op.geometry is not None:
            return "the int8 engine on cuda takes linear layers only, not a convolution"
        if why := refusal_of_codes(pair, _OPERATORS, _TAKEN):
            return why
        return "the int8 engine on cuda does not take a bf16 operand" if BF16 in pair.formats else ""

    def encode(self, x: Tensor, slot: Slot, setting: Setting) -> Codes:
        """See `lowbit.engines.codes.encode_by_torch`."""
        product, operand = slot.product, slot.operand
        return encode_by_torch(
            x,
            slot,
            noise=setting.noise_of(product, operand).draw(product, operand, x) if slot.stochastic else None,
            observed=setting.input_range if slot.keeps_range else None,
        )

    def multiply(self, product: Product, a: Codes, b: Codes, bias: Tensor | None) -> Tensor:
        """See `multiply_codes`."""
        first, second = (q.numbers.view(-1, q.shape[-1]) for q in (a, b))
        lhs = first.t() if product.name == "grad_weight" else first
        rhs = second.t() if product.name == "output" else second
        added = None if bias is None else bias.float()
        zeros, scales = (a.zero, b.zero), (per_row(a.scale, lhs.shape[0]), b.scale)
        return multiply_codes(lhs, rhs, zeros, scales, added, product.dtype).view(product.shape)

    def values(self, operand: Codes, slot: Slot) -> Quantized:
        """The values of the codes."""
        return values_of(operand, slot)

    def sum_bias(self, op: Op, g: Tensor) -> Tensor:  # noqa: ARG002 - a matrix
        """It sums in float32."""
        return g.flatten(0, -2).sum(0, dtype=torch.float32)

    def ran(self, product: Product, a: Codes, b: Codes) -> tuple[str, str]:  # noqa: ARG002 - all alike
        """One operator runs them all."""
        return self.name, "aten::_int_mm"


def multiply_codes(
    a: Tensor, b: Tensor, zeros: tuple[int, int], scales: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``sum_k (a - z_a)(b - z_b)`` times the scales plus bias, in `dtype`.

    Shapes that the operator does not take are padded with zeros. Sums too long for 32 bits are cut, and the parts are
    added in float32.

    Args:
        a: int8 or uint8 ``(m, k)``, any strides.
        b: int8 or uint8 ``(k, n)``, any strides.
        zeros: z_a and z_b, the codes of a real zero.
        scales: float32 of each row (one or m) and of each column (one or n).
        bias: float32 ``(n,)``.
        dtype: of the result.

    Returns:
        ``(m, n)`` on the device of `a`: exact sums, each scaled in float32.

    Raises:
        TypeError: codes that are neither int8 nor uint8.
        ValueError: shapes that do not multiply.
    """
    for q in (a, b):
        if q.dtype not in (torch.int8, torch.uint8):
            raise TypeError(f"codes are {q.dtype}: give int8 or uint8")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"codes of shapes {tuple(a.shape)} and {tuple(b.shape)}: give (m, k) and (k, n)")
    (a, zero_a), (b, zero_b) = _signed(a, zeros[0]), _signed(b, zeros[1])
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    if total.numel():
        for start in range(0, a.shape[1], MOST_SUMMED):
            end = start + MOST_SUMMED
            total += _sums(a[:, start:end], b[start:end], zero_a, zero_b)
    total.mul_(scales[0].view(-1, 1)).mul_(scales[1])
    return (total if bias is None else total.add_(bias)).to(dtype)


def _signed(q: Tensor, zero: int) -> tuple[Tensor, int]:
    """Codes as int8 and their zero point; of uint8 codes, both are 128 less."""
    return (q, zero) if q.dtype == torch.int8 else (q.view(torch.int8).bitwise_xor(-128), zero - 128)


def _sums(a: Tensor, b: Tensor, zero_a: int, zero_b: int) -> Tensor:
    """``sum_k (a - z_a)(b - z_b)``, int32."""
    (m, k), n = a.shape, b.shape[1]
    most, columns = _whole(k), _whole(n)
    # Rows of both sides along k: the layout that every generation of units takes.
    product = torch._int_mm(_padded(a, max(m, _LEAST_ROWS), most), _padded(b.t(), columns, most).t())
    sums = product[:m, :n]
    if zero_a:
        sums = sums - zero_a * b.sum(0, dtype=torch.int32)
    if zero_b:
        sums = sums - zero_b * a.sum(1, dtype=torch.int32, keepdim=True)
    return sums + k * zero_a * zero_b if zero_a and zero_b else sums


def _whole(size: int) -> int:
    return -(-size // _WHOLE) * _WHOLE


def _padded(q: Tensor, rows: int, columns: int) -> Tensor:
    """The same numbers in dense rows, with zeros after them up to this shape."""
    return F.pad(q, (0, columns - q.shape[1], 0, rows - q.shape[0])).contiguous()
