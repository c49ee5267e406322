"""How products are asked for: the recipe, bits and noise of one call, and what follows for each operand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lowbit.methods.operands import SLOTS
from lowbit.methods.recipe import Recipe
from lowbit.numerics.formats import Format, check_defined, largest_code
from lowbit.numerics.history import Histories
from lowbit.numerics.quantizer import Sharing, blocked
from lowbit.numerics.rounding import Noise
from lowbit.products.operators import Op

Layout = Literal["matrix", "activation", "weight"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """A choice of bits for each sample, the first axis of the input.

    Args:
        choice: int64 ``(B,)``, the index of each sample's choice.
        bits: for each choice the widths of all operands as in `Setting.bits`; None for a choice that no sample here
            has.
        mask: float ``(B, K)``, one-hot, whose gradient says what each choice would have changed; None if it is not
            wanted.
    """

    choice: Tensor
    bits: tuple[tuple[int, ...] | None, ...]
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the products of one call are to be computed.

    Args:
        recipe: the formats.
        noise: where noise comes from; needed where a format rounds stochastically.
        bits: the width of each operand in the order of `lowbit.methods.operands.SLOTS`; None: the recipe's own. Float
            formats keep their own width.
        input_range: lo and hi for `input` where its format keeps a running range; None: of the batch.
        histories: what operands with delayed scales take their ranges from; None: each has its own range.
        layer: name for reports and errors.
        engine: how products are executed, one of `lowbit.engines.choice.ENGINES`.
        source: what calls, for observers.
        samples: bits that differ between samples, in place of `bits`.
        skips: whether no `grad_weight` is computed.
        remake: makes the weight again for the backward, which then does not keep it; None: it is kept.
    """

    recipe: Recipe
    noise: Noise | None = None
    bits: tuple[int, ...] | None = None
    input_range: tuple[Tensor, Tensor] | None = None
    histories: Histories | None = None
    layer: str = ""
    engine: str = "reference"
    source: object = None
    samples: Samples | None = None
    skips: bool = False
    remake: Callable[[], Tensor] | None = None

    def format(self, product: str, operand: str) -> Format:
        """The format of one operand of one product."""
        fmt: Format = getattr(getattr(self.recipe, product), operand)
        return fmt

    def width(self, product: str, operand: str) -> int:
        """The width of an operand's codes in this call.

        An operand with the same format in several products has the same width in them: that of the first.
        """
        fmt = self.format(product, operand)
        if self.bits is None or not fmt.has_width:
            return fmt.bits
        return self.bits[slot_of(self.recipe, product, operand)]

    def observed(self, slot: "Slot", x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The range of an operand that is not made from its own values; None if it is."""
        if slot.keeps_range:
            return self.input_range
        if self.histories is not None and slot.format.delay is not None:
            return self.histories.observe(slot.operand, x, slot.format)
        return None

    def noise_of(self, product: str, operand: str) -> Noise:
        """The noise of an operand that rounds stochastically."""
        if self.noise is None:
            raise ValueError(
                f"{self.layer or 'a product'}: {operand} in {product} rounds stochastically and got no noise"
            )
        return self.noise


@lru_cache(maxsize=4096)
def slot_of(recipe: Recipe, product: str, operand: str) -> int:
    """The slot that has the width of an operand: the first with the same operand in the same format."""
    formats = {(p, o): fmt for p, o, fmt in recipe.operands()}
    return next(i for i, slot in enumerate(SLOTS) if slot[1] == operand and formats[slot] == formats[product, operand])


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One operand of one product, as a recipe makes it for a shape and a width.

    Args:
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        operand: ``"input"``, ``"weight"`` or ``"grad_output"``.
        format: its format.
        bits: the width of its codes.
        levels: the largest code of this width; None if the format has one width alone.
        stochastic: whether it needs noise.
        symmetric: whether real zero is the code 0.
        has_offset: whether codes count from a float offset, so that real zero may lie between two of them.
        is_blocked: whether scales lie along what is summed, or a transform does.
        sharing: what shares a scale.
        samples: the samples of whose extremes the range is a mean; None: the range rule does not look at samples.
        layout: the order of codes in memory: that of the tensor (``"matrix"``), channels last (``"activation"``) or
            (first axis, taps, second axis) (``"weight"``).
        keeps_range: whether it takes the range that its layer keeps.
    """

    product: str
    operand: str
    format: Format
    bits: int
    levels: float | None
    stochastic: bool
    symmetric: bool
    has_offset: bool
    is_blocked: bool
    sharing: Sharing
    samples: int | None
    layout: Layout
    keeps_range: bool


def slot(
    op: Op, recipe: Recipe, product: str, operand: str, shape: torch.Size, widths: Sequence[int] | None = None
) -> Slot:
    """One operand of one product.

    An operand with the same format in several products has the same width in them: that of the first.

    Args:
        op: the operator.
        recipe: the formats.
        product: which product.
        operand: which operand.
        shape: of the operand.
        widths: of all operands, in the order of `SLOTS`; None: the formats' own.

    Raises:
        UsageError: a format that is not defined, or blocks that an operand of this shape cannot have.
    """
    fmt: Format = getattr(getattr(recipe, product), operand)
    check_defined(fmt)
    bits = fmt.bits if widths is None or not fmt.has_width else widths[slot_of(recipe, product, operand)]
    fmt = fmt.at(bits)
    check_defined(fmt)
    matrix = op.geometry is None
    return Slot(
        product=product,
        operand=operand,
        format=fmt,
        bits=bits,
        levels=largest_code(fmt, bits) if fmt.has_width else None,
        stochastic=fmt.stochastic,
        symmetric=fmt.zero == "symmetric",
        has_offset=fmt.zero == "offset",
        is_blocked=fmt.is_blocked,
        samples=None if fmt.scale is None else fmt.scale.range.samples(shape),
        sharing=sharing(op, product, operand, fmt, shape),
        layout="matrix" if matrix else "weight" if operand == "weight" else "activation",
        keeps_range=operand == "input" and fmt.running is not None,
    )


def sharing(op: Op, product: str, operand: str, fmt: Format, shape: torch.Size) -> Sharing:
    """What shares a scale in one operand of one product."""
    turned = fmt.transform.along_axis
    shared: tuple[int, ...] | None = None
    if fmt.granularity == "tensor" and not turned:
        shared = tuple(range(len(shape)))
    if fmt.granularity == "sample":
        shared = tuple(range(1, len(shape))) or (0,)  # what has one axis is one sample
    if shared is not None:
        return Sharing(view=tuple(shape), dims=shared, axis=len(shape) - 1)
    if fmt.granularity == "square":
        view, axes = op.squares(operand, shape)
        axis = op.summed(product, operand, len(view))[0] if turned else len(view) - 1
        return blocked(fmt, Sharing(view=view, dims=(), axis=axis), axes)
    view = op.view(operand, shape)
    dim = len(view)
    summed = op.summed(product, operand, dim)
    dims = {
        "tensor": tuple(range(dim)),
        "row": (dim - 1,) if op.has_rows else tuple(range(dim)),
        "kept-channel": summed,
        "output-channel": tuple(d for d in range(dim) if d not in op.output_channels(dim)),
    }.get(fmt.granularity, ())
    # If nothing lies along the axis, it must not be what operands of two products differ in.
    axis = summed[0] if turned or fmt.granularity == "block" else dim - 1
    return blocked(fmt, Sharing(view=view, dims=dims, axis=axis))


def shares(a: Slot, b: Slot) -> bool:
    """Whether an operand has the same codes in two products, so that it is quantised once for both."""
    return a.format == b.format and a.sharing == b.sharing
