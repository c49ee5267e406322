"""The protocol of engines: encode an operand, multiply two, give an operand's real values back.

An engine must give the result of the reference engine, which is the definition, or refuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import Quantized
from lowbit.products.operators import Op
from lowbit.products.setting import Setting, Slot

# One operand as an engine has it: a dataclass whose `numbers` are its one large tensor, which autograd keeps for the
# backward separately from the rest. An engine gets only operands that it encoded itself.
Operand = Any


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is to be multiplied.

    Args:
        op: the operator.
        name: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        shape: of the result.
        dtype: of the result.
        channels_last: whether the result is wanted with its channels last in memory; a hint.
    """

    op: Op
    name: str
    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two operands of a product before there are tensors: what `Engine.refusal` is asked for.

    Args:
        op: the operator.
        name: the product.
        formats: with the bits of the moment.
        kept: whether each operand's scales lie along axes that the product keeps.
    """

    op: Op
    name: str
    formats: tuple[Format, Format]
    kept: tuple[bool, bool]


class Engine(Protocol):
    """A way to execute products."""

    # The name by which a layer asks for it.
    name: ClassVar[str]
    # Types of devices that it runs on; None: on all.
    devices: ClassVar[Sequence[str] | None]
    # Dtypes of input, weight and output that it takes; None: all.
    dtypes: ClassVar[Sequence[torch.dtype] | None]
    # Whether `multiply` adds the bias; else it is added to the result.
    adds_bias: ClassVar[bool]

    def refusal(self, pair: Pair) -> str:
        """Why this engine does not run a product; empty if it does."""

    def encode(self, x: Tensor, slot: Slot, setting: Setting) -> Operand:
        """One operand of one product, in its format, with the noise and the range of the call."""

    def multiply(self, product: Product, a: Operand, b: Operand, bias: Tensor | None) -> Tensor:
        """The product of two operands, in the order of `lowbit.methods.operands.SLOTS`, in its dtype or a wider one."""

    def values(self, operand: Operand, slot: Slot) -> Quantized:
        """The real values that the product saw, in the operand's shape, and their grid."""

    def sum_bias(self, op: Op, g: Tensor) -> Tensor:
        """The sum of grad_output over all but its channels."""

    def ran(self, product: Product, a: Operand, b: Operand) -> tuple[str, str]:
        """The units that multiplied two operands, as reports name them, and the operator that did."""
