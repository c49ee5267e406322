"""Scales: what shares one, the range that it is made from, and the format of the scale itself.

Notation: x real value, lo and hi its range, S scale, n the largest code, M the largest scale of a tensor.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.parts import LARGEST, SMALLEST, check_interval, check_part
from lowbit.numerics.rounding import exponent_of, power_of_two, round_to_float, unit_of
from lowbit.numerics.unbiased import UnbiasedE4M3

Granularity = Literal["tensor", "sample", "row", "kept-channel", "output-channel", "block", "square"]
RunningStart = Literal["first", "zero"]
Direction = Literal["up", "floor", "nearest"]
Choice = Literal["max", "most-recent"]


class RangeRule(Protocol):
    """How lo and hi are measured."""

    kind: ClassVar[str]
    # Whether lo and hi are always those of a whole tensor.
    per_tensor: ClassVar[bool]

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The lo and hi of what shares a scale.

        Args:
            x: float, any shape that is not empty.
            dims: the dims that share one scale, not negative; at least one, and all of them for a `per_tensor` rule.

        Returns:
            lo and hi with `dims` kept as 1, in the dtype of `x` or float32; nan where a nan is.
        """

    def of_ends(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `extremes`, from the smallest and the largest value of what shares a scale; None if these do not say it.

        Both are nan where a nan is.
        """

    def samples(self, shape: torch.Size) -> int | None:
        """The number of samples whose extremes are averaged; 1: the extremes of everything; None: neither."""

    def applied(self, size: int) -> "RangeRule":
        """The rule as it works on samples of that many values."""

    def __str__(self) -> str:
        """Its name in reports; empty if it goes without saying."""


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """The smallest and the largest value of what shares the scale."""

    kind: ClassVar[str] = "minmax"
    per_tensor: ClassVar[bool] = False

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """See the class."""
        return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)

    def of_ends(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """These."""
        return lo, hi

    def samples(self, shape: torch.Size) -> int:  # noqa: ARG002 - whatever the shape
        """1."""
        return 1

    def applied(self, size: int) -> "MinMax":  # noqa: ARG002 - whatever the size
        """The same."""
        return self

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class SampleMean:
    """The mean over samples, the first axis, of each sample's extremes, so that the largest outliers are clipped.

    Args:
        fewest: if samples have fewer values, lo and hi are those of the whole tensor, since means of such extremes are
            too small; None: samples of any size, as in the authors' codes.

    Source: Banner et al. 2018's protection against outliers, as in the authors' code.
    """

    kind: ClassVar[str] = "sample-mean"
    per_tensor: ClassVar[bool] = True

    fewest: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fewest is not None and self.fewest < 1:
            raise UsageError(f"fewest={self.fewest}: the fewest values of a sample are 1 or more")

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """See the class; the mean is summed in float64."""
        if self.samples(x.shape) == 1:
            return MINMAX.extremes(x, dims)
        shape = [1] * x.dim()
        lo, hi = x.flatten(1).amin(1), x.flatten(1).amax(1)
        return mean(lo).reshape(shape), mean(hi).reshape(shape)

    def of_ends(self, lo: Tensor, hi: Tensor) -> None:  # noqa: ARG002 - whatever they are
        """None: each sample counts."""
        return

    def samples(self, shape: torch.Size) -> int:
        """The length of the first axis if samples have enough values, else 1."""
        return shape[0] if len(shape) > 1 and math.prod(shape[1:]) >= (self.fewest or 1) else 1

    def applied(self, size: int) -> RangeRule:
        """The extremes of the tensor if samples have too few values."""
        return MINMAX if self.fewest is not None and size < self.fewest else self

    def __str__(self) -> str:
        return "sample-mean" if self.fewest is None else f"sample-mean from {self.fewest} values"


def mean(v: Tensor) -> Tensor:
    """The mean in float64, so that the order of the sum does not show; rounded to float32 unless `v` is float64."""
    wide = torch.float32 if v.device.type == "mps" else torch.float64  # mps lacks float64
    return v.mean(dtype=wide).to(torch.promote_types(v.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A range that does not depend on the values; what lies outside is clipped.

    Args:
        low: lo.
        high: hi, more than lo.
    """

    kind: ClassVar[str] = "constant"
    per_tensor: ClassVar[bool] = False

    low: float
    high: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_interval(self.low, self.high)

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The same for all; nan where a value that is not finite shares the scale."""
        finite = x.isfinite().all(dims, keepdim=True) if dims else x.isfinite()
        bad = x.new_zeros(finite.shape).masked_fill_(~finite, torch.nan)
        return bad + self.low, bad + self.high

    def of_ends(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """See `extremes`."""
        bad = torch.zeros_like(lo).masked_fill_(~(lo.isfinite() & hi.isfinite()), torch.nan)
        return bad + self.low, bad + self.high

    def samples(self, shape: torch.Size) -> None:  # noqa: ARG002 - whatever the shape
        """None: it does not look at values."""
        return

    def applied(self, size: int) -> "Constant":  # noqa: ARG002 - whatever the size
        """The same."""
        return self

    def __str__(self) -> str:
        return f"range {self.low:g} to {self.high:g}"


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """From ``-m`` to ``m``, the largest magnitude of what shares the scale."""

    kind: ClassVar[str] = "magnitude"
    per_tensor: ClassVar[bool] = False

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """See the class."""
        m = x.abs().amax(dims, keepdim=True)
        return -m, m

    def of_ends(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        m = torch.maximum(-lo, hi)
        return -m, m

    def samples(self, shape: torch.Size) -> None:  # noqa: ARG002 - whatever the shape
        """None: no extremes are averaged."""
        return

    def applied(self, size: int) -> "Magnitude":  # noqa: ARG002 - whatever the size
        """The same."""
        return self

    def __str__(self) -> str:
        return "largest magnitude"


@dataclass(frozen=True, kw_only=True)
class Delayed:
    """From ``-2**margin m`` to ``2**margin m``, m the largest magnitude of earlier steps, which a layer remembers.

    Outside a layer, which has no steps, m is the largest magnitude of the tensor itself. See `lowbit.numerics.history`.

    Args:
        history: the number of steps that are remembered, this one included.
        choice: which of them is m: the largest one (``"max"``) or that of the last step (``"most-recent"``).
        margin: binades that are left free, 0 or more.

    Source: TransformerEngine at d0067d0da, delayed scaling.
    """

    kind: ClassVar[str] = "delayed"
    per_tensor: ClassVar[bool] = True

    history: int = 1024
    choice: Choice = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.history <= 2**20:
            raise UsageError(f"history={self.history}: a history has 1 to 2**20 steps")
        if not 0 <= self.margin <= 16:
            raise UsageError(f"margin={self.margin}: give the binades that are left free, 0 to 16")

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Those of the tensor itself."""
        m = x.abs().amax(dims, keepdim=True) * 2.0**self.margin
        return -m, m

    def of_ends(self, lo: Tensor, hi: Tensor) -> None:  # noqa: ARG002 - whatever they are
        """None: other values count too."""
        return

    def samples(self, shape: torch.Size) -> None:  # noqa: ARG002 - whatever the shape
        """None: no extremes are averaged."""
        return

    def applied(self, size: int) -> "Delayed":  # noqa: ARG002 - whatever the size
        """The same."""
        return self

    def __str__(self) -> str:
        seen = f"largest of {self.history} steps" if self.choice == "max" else "largest magnitude of the last step"
        return seen + (f", margin {self.margin}" if self.margin else "")


@dataclass(frozen=True, kw_only=True)
class MeanMagnitude:
    """From ``-m`` to ``m``, the mean of the magnitudes of what shares the scale; summed in float64."""

    kind: ClassVar[str] = "mean-magnitude"
    per_tensor: ClassVar[bool] = False

    def extremes(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """See the class; nan for what has a value that is not finite."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64
        m = x.abs().mean(dims, keepdim=True, dtype=wide).to(x.dtype) if dims else x.abs()
        m = m.masked_fill(m.isinf(), torch.nan)
        return -m, m

    def of_ends(self, lo: Tensor, hi: Tensor) -> None:  # noqa: ARG002 - whatever they are
        """None: other values count too."""
        return

    def samples(self, shape: torch.Size) -> None:  # noqa: ARG002 - whatever the shape
        """None: no extremes are averaged."""
        return

    def applied(self, size: int) -> "MeanMagnitude":  # noqa: ARG002 - whatever the size
        """The same."""
        return self

    def __str__(self) -> str:
        return "mean magnitude"


class ScaleFormat(Protocol):
    """The format of the scales of a tensor."""

    kind: ClassVar[str]

    def rounded(self, scale: Tensor, span: Tensor, levels: Tensor | float) -> Tensor:
        """The scales of this format for ``scale = span / levels``."""

    def reach(self, levels: Tensor | float) -> Tensor | float:
        """The largest ``span / scale`` that rounding of the scale alone can lead to."""

    def __str__(self) -> str:
        """Its name in reports; empty if it goes without saying."""


@dataclass(frozen=True, kw_only=True)
class Float32:
    """Scales in the dtype of the values, float32 or float64."""

    kind: ClassVar[str] = "float32"

    def rounded(self, scale: Tensor, span: Tensor, levels: Tensor | float) -> Tensor:  # noqa: ARG002 - as it is
        """As they are."""
        return scale

    def reach(self, levels: Tensor | float) -> Tensor | float:
        """See `ScaleFormat`."""
        return levels

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class PowerOfTwoScale:
    """Powers of two.

    Args:
        direction: ``"up"``: the smallest that clips nothing; ``"floor"``: ``2**(floor(log2 max|x|) - floor(log2 n))``,
            as in the Microscaling formats, where the largest values of a block may be clipped. As in their E8M0, it is
            ``2**-127`` at least, and nan beyond ``2**127``, which float64 alone reaches. ``"nearest"``:
            ``2**round(log2(max|x| / n))``, where the largest values may be clipped too.

    Source: OCP Microscaling Formats 1.0 (``"floor"``); Yang et al. 2020, WAGEUBN, arXiv:1909.02384 (``"nearest"``).
    """

    kind: ClassVar[str] = "power-of-two"

    direction: Direction = "up"

    def __post_init__(self) -> None:
        check_fields(self)

    def rounded(self, scale: Tensor, span: Tensor, levels: Tensor | float) -> Tensor:
        """Powers of two by their exponents, exact at each of them; nan and 0 stay."""
        wide = scale.double()
        if self.direction == "up":
            power = power_of_two(exponent_of(wide))
            found = torch.where(power < wide, 2 * power, power)
        elif self.direction == "nearest":
            power = power_of_two(exponent_of(wide))
            # The middle of two exponents is the square root of 2, and the square of 24 bits is exact in float64.
            found = torch.where((wide / power) ** 2 > 2, 2 * power, power)
        else:
            n = torch.as_tensor(levels, dtype=torch.float64, device=scale.device)
            exponent = exponent_of(span.double()) - exponent_of(n)
            found = power_of_two(exponent.clamp(min=-127)).masked_fill(exponent > 127, torch.nan)
        return torch.where(scale.isfinite() & (scale > 0), found, wide).to(scale.dtype)

    def reach(self, levels: Tensor | float) -> Tensor | float:
        """See `ScaleFormat`."""
        if self.direction == "floor":
            n = levels if isinstance(levels, Tensor) else torch.tensor(levels, dtype=torch.float64, device="cpu")
            reach = 2 * power_of_two(exponent_of(n.double()))
            return reach.to(levels) if isinstance(levels, Tensor) else reach.item()
        return levels if self.direction == "up" else 2**0.5 * levels

    def __str__(self) -> str:
        how = {"up": "", "floor": " rounded down", "nearest": " rounded to nearest"}[self.direction]
        return f"power-of-two scale{how}"


@dataclass(frozen=True, kw_only=True)
class E4M3:
    """8-bit floats under one scale of the tensor: ``M / 448`` times the nearest E4M3 of ``448 S / M``.

    Source: NVFP4, as in TransformerEngine.
    """

    kind: ClassVar[str] = "e4m3"

    def rounded(self, scale: Tensor, span: Tensor, levels: Tensor | float) -> Tensor:  # noqa: ARG002 - S says it
        """See the class; scales that round to 0 become the smallest E4M3 number."""
        unit = unit_of(scale, 448.0)
        found = round_to_float((scale / unit).double(), 3, -6, None).clamp(2.0**-9, 448.0)
        return torch.where(scale == 0, scale, found.to(scale.dtype) * unit)

    def reach(self, levels: Tensor | float) -> Tensor | float:
        """See `ScaleFormat`; the smallest numbers lie furthest apart, and a scale of 1.5 of them becomes one."""
        return levels * 1.5

    def __str__(self) -> str:
        return "e4m3 scale"


@dataclass(frozen=True, kw_only=True)
class IntegerScale:
    """Whole multiples of ``M / (2**bits - 1)``, rounded up so that nothing is clipped.

    Args:
        bits: of the multiple, 2 to 16.
    """

    kind: ClassVar[str] = "integer"

    bits: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.bits <= 16:
            raise UsageError(f"bits={self.bits}: a scale of whole multiples has 2 to 16")

    def rounded(self, scale: Tensor, span: Tensor, levels: Tensor | float) -> Tensor:  # noqa: ARG002 - S says it
        """See the class."""
        most = 2.0**self.bits - 1
        unit = unit_of(scale, most)
        return torch.where(scale == 0, scale, (scale / unit).ceil().clamp(1.0, most) * unit)

    def reach(self, levels: Tensor | float) -> Tensor | float:
        """See `ScaleFormat`; they are rounded up."""
        return levels

    def __str__(self) -> str:
        return f"{self.bits}-bit scale"


MINMAX, FLOAT32 = MinMax(), Float32()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What shares a scale, and how it is made.

    Args:
        granularity: what shares a scale. ``"tensor"``: everything. ``"sample"``: one index of the first axis.
            ``"row"``: one row of a linear layer's operand (all axes but the last); a convolution lacks rows and shares
            one scale. ``"kept-channel"``: one channel that the product does not sum over. ``"output-channel"``: one
            output channel of a weight, in every product. ``"block"``: `block` neighbours along the axis that the
            product sums over. ``"square"``: `block` by `block` numbers of the last two axes of a matrix, or in a
            convolution of channels and places of a sample, and of a weight's channels at one tap.
        block: length of a block, only with granularity ``"block"`` and ``"square"``; the last ones may be shorter.
        range: how lo and hi are measured.
        running: weight of the old value in the running range that evaluation uses, in [0, 1); None: evaluation takes
            the range of its own batch. It exists per tensor only.
        running_start: ``"first"``: the running range starts as the first batch's; ``"zero"``: it starts at 0 and is not
            corrected for that, as in the authors' codes.
        format: the format of the scale itself.
        floor: the smallest scale, with format float32 only. 0 only replaces a zero scale (by 1); the authors' codes use
            1e-8.

    Raises:
        UsageError: a value or combination outside the above.
    """

    granularity: Granularity = "tensor"
    block: int | None = None
    range: RangeRule = MINMAX
    running: float | None = None
    running_start: RunningStart = "first"
    format: ScaleFormat = FLOAT32
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_part("range", self.range, "extremes")
        check_part("format", self.format, "rounded")
        if (self.block is None) == (self.granularity in ("block", "square")):
            raise UsageError(
                f"block={self.block} with granularity={self.granularity!r}: a block length goes with granularity "
                "'block' or 'square', and only with them"
            )
        if self.block is not None and self.block < 1:
            raise UsageError(f"block={self.block}: a block has at least one element")
        if self.granularity != "tensor" and (self.range.per_tensor or self.running is not None):
            raise UsageError(
                f"range={self.range.kind!r}, running={self.running} with granularity={self.granularity!r}: the mean of "
                "per-sample extremes and running ranges exist per tensor only"
            )
        if self.running is not None and not 0 <= self.running < 1:
            raise UsageError(f"running={self.running}: the weight of the old range is in [0, 1)")
        if not 0 <= self.floor <= LARGEST:
            raise UsageError(f"floor={self.floor}: the smallest scale is finite and not negative")
        if 0 < self.floor < SMALLEST:
            raise UsageError(f"floor={self.floor}: float32 lacks such a scale: give 0, or {SMALLEST:g} or more")
        if self.floor and not isinstance(self.format, Float32):
            raise UsageError(
                f"floor={self.floor} with format={self.format.kind!r}: scales of this format need not have the floor "
                "among them. Leave the floor out, or give format='float32'"
            )

    def step(self, span: Tensor, levels: Tensor | float) -> Tensor:
        """``S = max(span / levels, floor)`` in its format; a zero scale becomes 1, so that nothing divides by it.

        Args:
            span: float, the width that `levels` steps must cover; 0 or more.
            levels: number of steps, a number or scalar tensor.
        """
        # On the tensor's device: CUDA divides by a number of the host by multiplying with its rounded reciprocal.
        count = levels.to(span) if isinstance(levels, Tensor) else span.new_full((), levels)
        scale = self.format.rounded(span / count, span, levels)
        if self.floor:
            return scale.clamp(min=self.floor)
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def __str__(self) -> str:
        shared = {"block": f"block {self.block}", "square": f"blocks of {self.block} x {self.block}"}
        return ", ".join(
            filter(None, (shared.get(self.granularity, self.granularity), str(self.range), str(self.format)))
        )


RANGE_RULES: tuple[type[RangeRule], ...] = (MinMax, SampleMean, Constant, Magnitude, MeanMagnitude, Delayed)
SCALE_FORMATS: tuple[type[ScaleFormat], ...] = (Float32, PowerOfTwoScale, E4M3, UnbiasedE4M3, IntegerScale)
