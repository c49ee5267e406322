"""The reference engine: torch's own products of values on their grids, on any device. It is the definition."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.engines.base import Pair, Product
from lowbit.numerics.formats import FP32
from lowbit.numerics.quantizer import Grid, Quantized, quantize
from lowbit.numerics.rounding import field_of
from lowbit.products.operators import Op
from lowbit.products.setting import Setting, Slot


def in_full(x: Tensor) -> Tensor:
    """The tensor in the dtype that products are computed in: float32 for the 16-bit types, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


_backends: Any = torch.backends
# Where torch keeps how float32 is multiplied on a device: matrices and convolutions.
_FLOAT32 = {
    "cpu": (_backends.mkldnn.matmul, _backends.mkldnn.conv),
    "cuda": (_backends.cuda.matmul, _backends.cudnn.conv),
}


@contextmanager
def in_float32(device: str) -> Iterator[None]:
    """Multiply float32 as float32 in this context, not as TF32 or bf16: cuDNN's convolutions take TF32 unasked.

    TF32 keeps all 8 bits of a code, but only 11 of the code times its scale.
    """
    changed = [(b, b.fp32_precision) for b in _FLOAT32.get(device, ()) if b.fp32_precision not in ("none", "ieee")]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, before in changed:
            backend.fp32_precision = before


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One operand as values on its grid, float32 or float64 in its own shape.

    Args:
        numbers: the values.
        grid: where they lie; None if nothing has limits.
        exact: whether the format leaves values as they are.
    """

    numbers: Tensor
    grid: Grid | None
    exact: bool = False


class Reference:
    """See the top of this file."""

    name: ClassVar[str] = "reference"
    devices: ClassVar[Sequence[str] | None] = None
    dtypes: ClassVar[Sequence[torch.dtype] | None] = None
    adds_bias: ClassVar[bool] = False

    def refusal(self, pair: Pair) -> str:  # noqa: ARG002 - whatever it is
        """It runs everything that is defined."""
        return ""

    def encode(self, x: Tensor, slot: Slot, setting: Setting) -> Rounded:
        """See `lowbit.numerics.quantizer.quantize`; a meta tensor has a shape but no values."""
        x, fmt = in_full(x), slot.format
        if x.is_meta:
            return Rounded(numbers=x if fmt == FP32 else torch.empty_like(x), grid=None, exact=fmt == FP32)
        product, operand = slot.product, slot.operand
        noise = field_of(setting.noise_of(product, operand), product, operand, x) if fmt.stochastic else None
        hat = quantize(
            x,
            fmt,
            sharing=slot.sharing,
            levels=slot.levels,
            noise=noise,
            observed=setting.observed(slot, x),
        )
        return Rounded(numbers=hat.values, grid=hat.grid, exact=fmt == FP32)

    def take(self, operand: Quantized) -> Rounded:
        """An operand that another engine encoded, by its real values."""
        return Rounded(numbers=operand.values, grid=operand.grid)

    def multiply(self, product: Product, a: Rounded, b: Rounded, bias: Tensor | None) -> Tensor:
        """The operator's own product, in the dtype of its operands."""
        assert bias is None
        if a.exact and b.exact:
            return self.product(product, a.numbers, b.numbers)
        with in_float32(a.numbers.device.type):
            return self.product(product, a.numbers, b.numbers)

    def product(self, product: Product, a: Tensor, b: Tensor) -> Tensor:
        """The product of two plain tensors."""
        op = product.op
        if product.name == "output":
            return op.output(a, b)
        if product.name == "grad_input":
            return op.grad_input(a, b, product.shape)
        return op.grad_weight(a, b, product.shape)

    def values(self, operand: Rounded, slot: Slot) -> Quantized:  # noqa: ARG002 - the grid knows it
        """The values as they are."""
        return Quantized(operand.numbers, operand.grid)

    def sum_bias(self, op: Op, g: Tensor) -> Tensor:
        """The operator's own sum."""
        return op.grad_bias(in_full(g))

    def ran(self, product: Product, a: Rounded, b: Rounded) -> tuple[str, str]:  # noqa: ARG002 - all alike
        """The operator of torch that multiplied."""
        return self.name, product.op.kernel(product.name)
