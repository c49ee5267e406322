"""The records of a ledger: products, programs, steps and evaluations, as frozen values that check themselves.

Notation: a step is one update of the weights, counted from 0; one multiply-accumulate (MAC) is one operation.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_fields

Convention = Literal["as-ran", "as-charged"]
PRODUCTS = ("output", "grad_input", "grad_weight")
# The two operands of each product, in the order of `Product.bits`.
OPERANDS = {
    "output": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("grad_output", "input"),
}
PLAIN = "plain"  # the engine of what ran outside converted layers


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product of one layer at one shape and one pair of widths.

    Args:
        layer: the layer's name; outside any layer, the name of the innermost module, which is ``""`` for the model.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kind: what was computed, e.g. ``"conv2d"``.
        engine: how it was executed; ``"plain"`` outside converted layers.
        bits: widths of its two operands in bits, in the order of `OPERANDS`.
        macs: multiply-accumulates of one call.
        input: shape of the layer's input (of the first factor, for a product of two activations).
        weight: shape of its weight (of the second factor).
        output: shape of its output.
        stride: of a convolution, one number per spatial axis; else empty.
        groups: of a convolution.
        transposed: whether it is a transposed convolution.
        grad_input_bits: if this is a `grad_weight` whose `grad_input` did not run, since nothing needed the gradient of
            the layer's input, the widths that it would have had.
    """

    layer: str
    product: str
    kind: str
    engine: str
    bits: tuple[int, int]
    macs: int
    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    grad_input_bits: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.product not in PRODUCTS:
            raise UsageError(f"product {self.product!r}: one of {', '.join(PRODUCTS)}")
        if min(*self.input, *self.weight, *self.output, *self.stride, 0) < 0:
            raise UsageError(f"{self.layer}: shapes {self.input}, {self.weight}, {self.output}: sizes are 0 or more")
        if min(*self.bits, *(self.grad_input_bits or (1,)), self.groups) < 1 or self.macs < 0:
            raise UsageError(f"{self.layer}: bits={self.bits}, macs={self.macs}: two widths from 1, and a count from 0")

    @property
    def bit_operations(self) -> int:
        """Bit operations of one call: multiply-accumulates times the widths of both operands."""
        return self.macs * self.bits[0] * self.bits[1]

    def at(self, bits: Mapping[str, int]) -> "Product":
        """The same product with these widths of its operands, by name; outside converted layers nothing changes."""
        if self.engine == PLAIN:
            return self
        charged = None if self.grad_input_bits is None else _bits_of("grad_input", bits)
        return dataclasses.replace(self, bits=_bits_of(self.product, bits), grad_input_bits=charged)

    def charged(self) -> "Product | None":
        """The `grad_input` that papers charge for this layer although it did not run; None if it did."""
        if self.grad_input_bits is None:
            return None
        return dataclasses.replace(self, product="grad_input", bits=self.grad_input_bits, grad_input_bits=None)


def _bits_of(product: str, bits: Mapping[str, int]) -> tuple[int, int]:
    first, second = OPERANDS[product]
    return bits[first], bits[second]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one step or one evaluation ran.

    Args:
        calls: pairs (index of a product, how often it ran), in order of the index.
        uncounted: pairs (operator, how often it ran in forward passes) of what was not counted outside converted
            layers, without views and the creation of tensors.
        held_bytes: the most bytes that one forward pass kept for its backward; None if none was watched. See
            `lowbit.evidence.memory` for what is counted.
        sent_bytes: the bytes that this process sent to others for their gradients, as far as whatever sends them says.
    """

    calls: tuple[tuple[int, int], ...]
    uncounted: tuple[tuple[str, int], ...] = ()
    held_bytes: int | None = None
    sent_bytes: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if min([n for _, n in (*self.calls, *self.uncounted)] + [self.held_bytes or 0, self.sent_bytes], default=0) < 0:
            raise UsageError(f"{shown(vars(self))}: counts are 0 or more")


class Step(NamedTuple):
    """One update of the weights: its number from 0, the index of its program, and its samples."""

    step: int
    program: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ran in evaluation mode between two steps, and the score it gave.

    Args:
        step: steps done before it.
        program: index of its program; None if only a score is known.
        samples: samples.
        name: of the score, e.g. ``"test_accuracy"``; None without a score.
        score: its value.
        higher_is_better: its direction.
    """

    step: int
    program: int | None
    samples: int
    name: str | None = None
    score: float | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.step, self.samples) < 0:
            raise UsageError(f"an evaluation of {self.samples} samples after {self.step} steps: both are 0 or more")


class Total(NamedTuple):
    """A product, and how often it ran."""

    product: Product
    calls: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls."""
        return self.product.macs * self.calls

    @property
    def bit_operations(self) -> int:
        """Bit operations of all calls."""
        return self.product.bit_operations * self.calls


def per_layer(totals: Iterable[Total]) -> Iterator[tuple[str, list[Total]]]:
    """The totals of each layer, in their order."""
    grouped: dict[str, list[Total]] = {}
    for total in totals:
        grouped.setdefault(total.product.layer, []).append(total)
    yield from grouped.items()


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass, without those that have their default value."""
    return {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.default is dataclasses.MISSING or getattr(record, field.name) != field.default
    }
