"""The kinds of elements, as frozen values with their definitions in plain torch, on any device.

Notation: as in `lowbit.numerics.element`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit.errors import UsageError, check_choice, shown
from lowbit.inputs.checks import check_fields, is_whole
from lowbit.numerics.element import Element, Scaled, Step, Steps, Zero, bound
from lowbit.numerics.fallback import Fallback
from lowbit.numerics.fixed import FixedPoint, Flagged
from lowbit.numerics.rounding import round_nearest, round_to, round_to_float

Top = Literal["ieee", "nan", "finite"]
Overflow = Literal["saturate", "infinite"]


@dataclass(frozen=True, kw_only=True)
class Real:
    """The value as it is, float32 or float64."""

    kind: ClassVar[str] = "real"
    has_width: ClassVar[bool] = False
    scaled: ClassVar[Scaled] = "never"

    bits: ClassVar[int] = 32
    zero: ClassVar[Zero] = "symmetric"
    margin: ClassVar[float] = 0.0

    @property
    def code_range(self) -> tuple[float, float]:
        """Every number."""
        return -float("inf"), float("inf")

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:  # noqa: ARG002 - none
        """It raises, as there is no scale."""
        raise TypeError(f"{self} has no scale")

    def fixed_steps(self, x: Tensor) -> None:  # noqa: ARG002 - it has none, whatever x is
        """None."""
        return

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:  # noqa: ARG002 - nothing rounds
        """`x` itself."""
        return x

    def __str__(self) -> str:
        return "fp32"


@dataclass(frozen=True, kw_only=True)
class Integer:
    """Whole numbers.

    - ``"symmetric"``: ``x = q S``, q in ``-(2**(b-1)-1) .. 2**(b-1)-1``, ``S = max|x| / (2**(b-1)-1)``;
    - ``"integer"``: ``x = (q - z) S``, q and z in ``0 .. 2**b-1``: real zero is on the grid (a "true zero").
      ``S = (hi-lo)/(2**b-1)`` with lo and hi widened to contain 0, ``z = round(-lo/S)``;
    - ``"offset"``: ``x = q S + lo``, q in ``0 .. 2**b-1``: lo is a float and zero is in general not on the grid.

    With ``"integer"`` the rounded z can put the grid's end up to S/2 inside lo or hi, and values beyond it are clipped.
    Ranges wider than the largest float give nan, and tensors so small that S is denormal lose precision.

    Args:
        bits: width of a code, sign included: 2 to 16, for ``"offset"`` 1 to 32.
        zero: where real zero lies, as above.
    """

    kind: ClassVar[str] = "integer"
    has_width: ClassVar[bool] = True
    scaled: ClassVar[Scaled] = "always"

    bits: int
    zero: Zero

    def __post_init__(self) -> None:
        check_choice("zero", self.zero, Zero)
        low, high = (1, 32) if self.zero == "offset" else (2, 16)
        if not is_whole(self.bits) or not low <= self.bits <= high:
            raise UsageError(
                f"bits={shown(self.bits)} for zero={self.zero!r}: allowed are whole numbers from {low} to {high}"
            )

    @property
    def code_range(self) -> tuple[int, int]:
        """``-n .. n`` if symmetric, else ``0 .. n``."""
        if self.zero == "symmetric":
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def margin(self) -> float:
        """Half a step."""
        return 0.5

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:
        """The formulas of the class."""
        if self.zero == "symmetric":
            return Steps(scale=step(torch.maximum(-lo, hi), levels), low=-levels, high=levels)
        if self.zero == "integer":
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            scale = step(hi - lo, levels)
            return Steps(scale=scale, zero=bound(round_nearest(-lo / scale), 0.0, levels), low=0.0, high=levels)
        return Steps(scale=step(hi - lo, levels), offset=lo, low=0.0, high=levels)

    def fixed_steps(self, x: Tensor) -> Steps:
        """There are none without a scale."""
        raise TypeError(f"{self} needs a scale, also for {tuple(x.shape)}")

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """``q = clamp(round(x / S) + z)``: z is added after rounding, so real zero stays exact.

        With a float offset ``q = round(clamp((x - lo) / S))``.
        """
        assert steps is not None
        if steps.offset is not None:
            return round_to(bound((x - steps.offset) / steps.scale, steps.low, steps.high), noise)
        q = round_to(x / steps.scale, noise)
        return bound(q if steps.zero is None else q.add_(steps.zero), steps.low, steps.high)

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.zero}"


@dataclass(frozen=True, kw_only=True)
class Minifloat:
    """Floating-point numbers of few bits: a sign, `exponent` bits with the bias ``2**(e-1) - 1``, `mantissa` bits.

    Numbers below the smallest normal one are subnormal. With a scale, the largest number lies at the largest value.
    bfloat16 is (8, 7), E4M3 is (4, 3, top="nan"), E5M2 is (5, 2), E2M1 is (2, 1, top="finite").

    Args:
        exponent: bits of the exponent, 2 to 8.
        mantissa: bits after the leading one, 0 to 23.
        top: what the largest exponent holds: ``"ieee"``: inf and nan; ``"nan"``: numbers, and one nan;
            ``"finite"``: only numbers.
        overflow: what larger values become: the largest number, or inf (nan if the format lacks inf). An inf never
            becomes a number.

    Source: OCP 8-bit Floating Point Specification 1.0 and Microscaling Formats 1.0.
    """

    kind: ClassVar[str] = "minifloat"
    has_width: ClassVar[bool] = False
    scaled: ClassVar[Scaled] = "either"

    exponent: int
    mantissa: int
    top: Top = "ieee"
    overflow: Overflow = "saturate"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.exponent <= 8 or not 0 <= self.mantissa <= 23:
            raise UsageError(
                f"exponent={self.exponent}, mantissa={self.mantissa}: a minifloat has 2 to 8 bits of exponent and 0 to "
                "23 of mantissa"
            )
        if self.exponent == 8 and self.top != "ieee":
            raise UsageError(f"top={self.top!r} with exponent=8: float32 lacks its largest numbers. Give top='ieee'")
        if self.top != "finite" and self.mantissa == 0:
            raise UsageError(
                f"top={self.top!r} with mantissa=0: the largest exponent has one number, which cannot be "
                f"{'inf and nan' if self.top == 'ieee' else 'a number and nan'} at once. Give top='finite'"
            )

    @property
    def bits(self) -> int:
        """The width of a code: one bit of sign, and those of exponent and mantissa."""
        return 1 + self.exponent + self.mantissa

    @property
    def zero(self) -> Zero:
        """The code 0."""
        return "symmetric"

    @property
    def highest(self) -> int:
        """The exponent of the largest number."""
        return int(2 ** (self.exponent - 1)) - (self.top == "ieee")

    @property
    def largest(self) -> float:
        """The largest number."""
        lacking = 2 if self.top == "nan" else 1
        return (2.0 - lacking * 2.0**-self.mantissa) * 2.0**self.highest

    @property
    def code_range(self) -> tuple[float, float]:
        """A code is the number itself."""
        return -self.largest, self.largest

    @property
    def margin(self) -> float:
        """Half of the last step."""
        return 2.0 ** (self.highest - self.mantissa - 1)

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:
        """``S = max|x| / largest``."""
        return Steps(scale=step(torch.maximum(-lo, hi), levels), low=-levels, high=levels)

    def fixed_steps(self, x: Tensor) -> Steps | None:
        """A scale of 1; None if nothing is clipped."""
        if self.overflow == "infinite":
            return None
        low, high = self.code_range
        return Steps(scale=x.new_ones([1] * x.dim()), low=low, high=high)

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """``x / S`` rounded, float64 via float32; nan where x is not finite, unless overflow becomes inf."""
        t = (x if steps is None else x / steps.scale).float().double()
        if self.overflow == "saturate":  # a float64 beyond float32 is finite: it becomes the largest number, not nan
            t = t.clamp(-self.largest, self.largest).where(x.isfinite(), torch.nan)
        rounded = round_to_float(t, self.mantissa, 2 - 2 ** (self.exponent - 1), noise)
        if self.overflow == "infinite":
            beyond = rounded.sign() * torch.inf if self.top == "ieee" else rounded * torch.nan
            rounded = rounded.where(rounded.abs() <= self.largest, beyond)
        return rounded.to(x.dtype)

    def __str__(self) -> str:
        beyond = {"saturate": "", "infinite": ", inf beyond" if self.top == "ieee" else ", nan beyond"}[self.overflow]
        known = {(8, 7): "bf16", (5, 10): "fp16"} if self.top == "ieee" and beyond else {}
        name = f"e{self.exponent}m{self.mantissa} (max {self.largest:g}{beyond})"
        return known.get((self.exponent, self.mantissa), name)


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo:
    """0 and the powers of two ``S 2**-k``, k from 0 to ``2**(b-1) - 2``, with a sign.

    The middle between two powers goes to the larger one, and that between 0 and the smallest power goes to 0.

    Args:
        bits: width of a code, sign included, 2 to 8.
    """

    kind: ClassVar[str] = "power-of-two"
    has_width: ClassVar[bool] = False
    scaled: ClassVar[Scaled] = "always"

    bits: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits}: a power of two has 2 to 8, sign included")

    @property
    def zero(self) -> Zero:
        """The code 0."""
        return "symmetric"

    @property
    def code_range(self) -> tuple[float, float]:
        """A code is the number itself."""
        return -1.0, 1.0

    @property
    def margin(self) -> float:
        """Half of the distance to the next power."""
        return 0.5

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:
        """``S = max|x|``."""
        return Steps(scale=step(torch.maximum(-lo, hi), levels), low=-levels, high=levels)

    def fixed_steps(self, x: Tensor) -> Steps:
        """There are none without a scale."""
        raise TypeError(f"{self} needs a scale, also for {tuple(x.shape)}")

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """The nearest power, or with noise one of the two neighbours; nan where ``x / S`` is not finite."""
        assert steps is not None
        t = (x / steps.scale).double()
        rounded = round_to_float(t, 0, 2 - 2 ** (self.bits - 1), noise)
        return rounded.clamp(-1.0, 1.0).where(t.isfinite(), torch.nan).to(x.dtype)

    def __str__(self) -> str:
        return f"{self.bits}-bit power of two"


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One bit: S where x is 0 or more, -S where it is less; zeros whose S is 0 stay zeros.

    Source: Zhou et al. 2016, DoReFa-Net, arXiv:1606.06160, 1-bit weights, with the range ``"mean-magnitude"``.
    """

    kind: ClassVar[str] = "sign"
    has_width: ClassVar[bool] = False
    scaled: ClassVar[Scaled] = "always"

    bits: ClassVar[int] = 1
    zero: ClassVar[Zero] = "symmetric"
    code_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    # However large a value is, its sign is what is kept of it.
    margin: ClassVar[float] = float("inf")

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:
        """``S = max|x|``; where that is 0, the one code that zeros have stands for 0."""
        most = torch.maximum(-lo, hi)
        return Steps(scale=step(most, levels), zero=(most == 0).to(most), low=-levels, high=levels)

    def fixed_steps(self, x: Tensor) -> Steps:
        """There are none without a scale."""
        raise TypeError(f"{self} needs a scale, also for {tuple(x.shape)}")

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """1 or -1; by noise 1 with the chance ``(x / S + 1) / 2``; nan where ``x / S`` is not finite."""
        assert steps is not None
        assert isinstance(steps.zero, Tensor)
        t = x / steps.scale
        up = t >= 0 if noise is None else (noise < (t + 1) / 2) | (steps.zero > 0)
        return torch.where(up, 1.0, -1.0).to(x.dtype).where(t.isfinite(), torch.nan)

    def __str__(self) -> str:
        return "sign"


ELEMENTS: tuple[type[Element], ...] = (Real, Integer, Minifloat, FixedPoint, Flagged, PowerOfTwo, Sign, Fallback)
