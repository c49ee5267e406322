"""Who watches while products run: observers see operands, and counters see shapes.

What is watched is what runs: observers get the operands of the engine itself, and no path depends on being watched.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit.numerics.formats import Format
from lowbit.numerics.quantizer import Grid
from lowbit.products.operators import Op


@dataclass(frozen=True, kw_only=True)
class OperandRun:
    """One operand of one product as it ran: its values before and after quantisation.

    Args:
        format: its format.
        bits: its width.
        exact: the values before.
        quantized: the values after: those of the codes that were multiplied.
        view: a shape with the same elements in the same order, which `dims` refer to.
        dims: the dims of the view that share a scale; None for blocks.
        grid: where its codes lie; None if nothing has limits.
    """

    format: Format
    bits: int
    exact: Tensor
    quantized: Tensor
    view: tuple[int, ...]
    dims: tuple[int, ...] | None
    grid: Grid | None = None

    @property
    def applied(self) -> Format:
        """The format as this shape made it: samples that are too small do not have their own extremes."""
        return self.format.applied(math.prod(self.view[1:]))

    @property
    def clipped(self) -> float:
        """The share of values more than half a step outside the grid; measured on request."""
        return 0.0 if self.grid is None else self.grid.clipped(self.exact)

    @property
    def two_codes(self) -> float:
        """The share of its blocks that have two codes for each number."""
        return 0.0 if self.grid is None else self.grid.two_codes

    @property
    def floored(self) -> float:
        """The share of values whose scale is the floor of the format; measured on request."""
        return 0.0 if self.grid is None else self.grid.floored(self.exact)


@dataclass(frozen=True, kw_only=True)
class ProductRun:
    """One product as it ran, for an observer.

    Args:
        source: what ran it, the layer's site; None for a call of `lowbit.functional`.
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kind: what was computed, e.g. ``"conv2d"``.
        engine: how it was executed.
        kernel: the operator that executed it.
        macs: multiply-accumulates.
        operands: by name.
        result: the product.
        full_precision: computes the product of the operands before quantisation.
        expected: the products of the backward that are due after this one.
        part: which of the layer's products this is, if one call computes several.
    """

    source: object
    layer: str
    product: str
    kind: str
    engine: str
    kernel: str
    macs: int
    operands: dict[str, OperandRun]
    result: Tensor
    full_precision: Callable[[], Tensor]
    expected: tuple[str, ...]
    part: str = ""


class Observer(Protocol):
    """What wants to see every product, e.g. `lowbit.verify`."""

    def __call__(self, run: ProductRun) -> None:
        """Take note of one product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductCall:
    """One product that ran, by its shapes: what a meter counts.

    It costs a few microseconds, whereas an observer's `ProductRun` costs a measurement of every operand.

    Args:
        source: what ran it, the layer's site; None for a call of `lowbit.functional`.
        layer: the layer's name.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kind: what was computed, e.g. ``"conv2d"``.
        engine: how it was executed.
        bits: the widths of its two operands, in the order of `lowbit.methods.operands.SLOTS`.
        op: the operator, for its `macs`.
        input: shape of the layer's input.
        weight: shape of its weight.
        output: shape of its output.
        part: which of the layer's products this is, if one call computes several.
    """

    source: object
    layer: str
    product: str
    kind: str
    engine: str
    bits: tuple[int, int]
    op: Op
    input: torch.Size
    weight: torch.Size
    output: torch.Size
    part: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.op.macs(self.input, self.weight, self.output)


Counter = Callable[[ProductCall], None]

observers: list[Observer] = []
"""Who sees every product, in all threads."""
counters: list[Counter] = []
"""Who counts every product, in all threads."""


class _PerThread(threading.local):
    """How deep a thread is in products of converted layers."""

    depth = 0


thread = _PerThread()
"""`inside` adds to its `depth` for a while; code in which each call counts does so directly."""


@contextmanager
def counted_by(counter: Counter) -> Iterator[None]:
    """Call `counter` with every product that runs in this context, forward and backward."""
    counters.append(counter)
    try:
        yield
    finally:
        counters.remove(counter)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Call `observer` with every product that runs in this context, forward and backward."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def is_observed() -> bool:
    """Whether an observer watches, so that measurements are worth their time. Products run alike either way."""
    return bool(observers)


def notify(run: ProductRun) -> None:
    """Show a run to every observer; those of other models ignore it."""
    for observer in tuple(observers):  # another thread may add or remove one meanwhile
        observer(run)


def count(call: ProductCall) -> None:
    """Show the shapes of a product to every counter."""
    for counter in tuple(counters):  # another thread may add or remove one meanwhile
        counter(call)


@contextmanager
def inside() -> Iterator[None]:
    """Mark operators that this thread dispatches in this context as part of a converted layer's products."""
    thread.depth += 1
    try:
        yield
    finally:
        thread.depth -= 1


def is_inside() -> bool:
    """Whether this thread computes a converted layer's product now."""
    return thread.depth > 0
