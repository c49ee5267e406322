"""Number formats as frozen values: which grid a tensor is put on, and what shares a scale.

Notation: x real value, q integer code, S scale, z integer zero point, b bits. A format says nothing about
how it is executed.
"""

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lowbit.checks import check_fields, is_finite, is_whole
from lowbit.errors import UsageError, shown

Zero = Literal["symmetric", "integer", "offset"]
Granularity = Literal["tensor", "sample", "row", "kept-channel", "output-channel", "block"]
RangeRule = Literal["minmax", "sample-mean"]
RunningStart = Literal["first", "zero"]
Rounding = Literal["nearest", "stochastic"]
FloatName = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Float:
    """A floating-point grid without a scale of its own.

    Args:
        name: ``"fp32"`` leaves values as they are given (float64 input stays float64); ``"bf16"`` rounds to
            8 significant bits, ties to even (float64 input through float32).
    """

    name: FloatName

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def bits(self) -> int:
        """Width of one value in bits."""
        return {"fp32": 32, "bf16": 16}[self.name]

    @property
    def stochastic(self) -> bool:
        """Whether rounding needs noise: never."""
        return False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Integer:
    """Integer codes with a scale.

    The grid, by `zero`:

    - ``"symmetric"``: ``x = q S``, q in ``-(2**(b-1)-1) .. 2**(b-1)-1``, ``S = max|x| / (2**(b-1)-1)``;
    - ``"integer"``: ``x = (q - z) S``, q and z in ``0 .. 2**b-1``: real zero is on the grid (a "true zero").
      ``S = (hi-lo)/(2**b-1)`` with lo and hi widened to contain 0, ``z = round(-lo/S)``;
    - ``"offset"``: ``x = q S + lo``, q in ``0 .. 2**b-1``: lo is a float and zero is in general not on the grid.

    Rounding to nearest takes halves to even. Stochastic rounding has the mean of its input inside the grid; with
    ``"integer"`` the rounded z can put the grid's end up to S/2 inside lo or hi, where values are clipped. Ranges
    wider than the largest float give nan, and tensors so small that S is denormal lose precision.

    Args:
        bits: width of a code, sign included: 2 to 16, for ``"offset"`` 1 to 32.
        zero: where real zero lies, as above.
        granularity: what shares a scale. ``"tensor"``: everything. ``"sample"``: one index of the first axis.
            ``"row"``: one row of a linear layer's operand (all axes but the last); a convolution has no
            rows and shares one scale. ``"kept-channel"``: one channel that the product does not sum over.
            ``"output-channel"``: one output channel of a weight, in every product. ``"block"``: `block`
            neighbours along the axis that the product sums over.
        block: length of a block, only with granularity ``"block"``; the last one may be shorter.
        range: lo and hi: ``"minmax"`` of what shares the scale, or ``"sample-mean"``: the mean over samples of
            each sample's extremes, so that the largest outliers are clipped (per tensor only).
        fewest: only with ``"sample-mean"``: a sample of fewer values has no extremes worth a mean, and lo and hi are
            those of the whole tensor; None: samples of any size, as in the authors' codes.
        running: weight of the old value in the running range that evaluation uses, in [0, 1); None:
            evaluation takes the range of its own batch. Per tensor only.
        running_start: ``"first"``: the running range starts as the first batch's; ``"zero"``: it starts at 0
            and is not corrected for that, as in the authors' codes.
        rounding: ``"nearest"`` or ``"stochastic"``.
        floor: the smallest scale. 0 replaces only a zero scale (by 1); the authors' codes use 1e-8.

    Raises:
        UsageError: a value or combination outside the above.
    """

    bits: int
    zero: Zero
    granularity: Granularity = "tensor"
    block: int | None = None
    range: RangeRule = "minmax"
    fewest: int | None = None
    running: float | None = None
    running_start: RunningStart = "first"
    rounding: Rounding = "nearest"
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_bits(self.bits, self.zero)
        check_fields(self)
        if (self.block is None) == (self.granularity == "block"):
            raise UsageError(
                f"block={self.block} with granularity={self.granularity!r}: a block length goes with granularity "
                "'block', and only with it"
            )
        if self.block is not None and self.block < 1:
            raise UsageError(f"block={self.block}: a block has at least one element")
        if self.fewest is not None and (self.range != "sample-mean" or self.fewest < 1):
            raise UsageError(
                f"fewest={self.fewest} with range={self.range!r}: the fewest values of a sample, 1 or more, go with "
                "range 'sample-mean', and only with it"
            )
        if self.granularity != "tensor" and (self.range == "sample-mean" or self.running is not None):
            raise UsageError(
                f"range={self.range!r}, running={self.running} with granularity={self.granularity!r}: the mean of "
                "per-sample extremes and running ranges exist per tensor only"
            )
        if self.running is not None and not 0 <= self.running < 1:
            raise UsageError(f"running={self.running}: the weight of the old range is in [0, 1)")
        if not 0 <= self.floor < float("inf"):
            raise UsageError(f"floor={self.floor}: the smallest scale is finite and not negative")

    @property
    def stochastic(self) -> bool:
        """Whether rounding needs noise."""
        return self.rounding == "stochastic"

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if self.zero == "symmetric":
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def of_samples(self, size: int) -> "Integer":
        """The same format as it works on samples of so many values: fewer than `fewest` have the batch's extremes."""
        small = self.fewest is not None and size < self.fewest
        return dataclasses.replace(self, range="minmax", fewest=None) if small else self

    def __str__(self) -> str:
        shared = f"block {self.block}" if self.block else self.granularity
        parts = [f"{self.bits}-bit {self.zero}", shared]
        if self.range == "sample-mean":
            parts.append("sample-mean" if self.fewest is None else f"sample-mean from {self.fewest} values")
        parts += ["stochastic"] * self.stochastic
        return ", ".join(parts)


Format = Float | Integer


class _Numbers(Container[object]):
    """Every finite number."""

    def __contains__(self, value: object) -> bool:
        return is_finite(value)


class _NumbersOrNone(_Numbers):
    """Every finite number, and None."""

    def __contains__(self, value: object) -> bool:
        return value is None or super().__contains__(value)


NUMBERS, NUMBERS_OR_NONE = _Numbers(), _NumbersOrNone()

# Which formats something executes: the classes by their exact types, and of each class the fields with their values.
# Whatever executes formats writes its own list out, however alike they are: with a shared one, what one of them learns
# to compute would be taken by all.
Listed = Mapping[type, Mapping[str, Container[object]]]


def unlisted(fmt: object, listed: Listed) -> str:
    """What of a format is not listed, in words; empty where all of it is.

    A list is closed: a class that it does not name is not listed, also a subclass of one that it names. A field that it
    does not name has its default and no other value, since a field that is added later has a default that changes
    nothing.

    Args:
        fmt: a format.
        listed: what is taken.
    """
    known = listed.get(type(fmt))
    if known is None:
        return f"{fmt} is a {type(fmt).__name__}, which is not listed"
    for field in dataclasses.fields(fmt):  # type: ignore[arg-type]  # every listed class is a dataclass
        value = getattr(fmt, field.name)
        allowed: Container[object] = known.get(field.name, (field.default,))
        if value not in allowed:
            return f"{field.name}={shown(value)} is not listed"
    return ""


# The definition, in `lowbit.quantizer` and `lowbit.ranges`.
_DEFINED: Listed = {
    Float: {"name": ("fp32", "bf16")},
    Integer: {
        "bits": range(1, 33),
        "zero": ("symmetric", "integer", "offset"),
        "granularity": ("tensor", "sample", "row", "kept-channel", "output-channel", "block"),
        "block": NUMBERS_OR_NONE,
        "range": ("minmax", "sample-mean"),
        "fewest": NUMBERS_OR_NONE,
        "running": NUMBERS_OR_NONE,
        "running_start": ("first", "zero"),
        "rounding": ("nearest", "stochastic"),
        "floor": NUMBERS,
    },
}


@lru_cache(maxsize=4096)
def check_defined(fmt: Format) -> None:
    """Raise a UsageError for a format whose values are defined nowhere."""
    if why := unlisted(fmt, _DEFINED):
        raise UsageError(
            f"a format that the reference engine does not define: {why}. Use one of lowbit.formats as it is, or define "
            "the new part in lowbit.quantizer and list it in lowbit.formats"
        )


FP32 = Float(name="fp32")
BF16 = Float(name="bf16")


def check_bits(bits: int, zero: Zero) -> None:
    """Raise a UsageError unless integer codes of this width exist: 2 to 16 bits, with a float offset 1 to 32."""
    low, high = (1, 32) if zero == "offset" else (2, 16)
    if not is_whole(bits) or not low <= bits <= high:
        raise UsageError(f"bits={shown(bits)} for zero={zero!r}: allowed are whole numbers from {low} to {high}")


def check_width(bits: int, fmt: Format) -> None:
    """Raise a UsageError unless codes of a format can have this width; a float format has its own alone."""
    if isinstance(fmt, Integer):
        check_bits(bits, fmt.zero)
    elif bits != fmt.bits:
        raise UsageError(f"bits={bits!r} of {fmt}: it has {fmt.bits}")
