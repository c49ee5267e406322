"""Elements whose codes are whole multiples of a power of two, as frozen values with their definitions in plain torch.

Notation: as in `lowbit.numerics.element`; R the scale of one level.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields
from lowbit.numerics.element import Scaled, Step, Steps, Zero, bound
from lowbit.numerics.rounding import round_to

Ends = Literal["twos-complement", "symmetric", "closed", "open"]
Halves = Literal["even", "down"]


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """Fixed point: `integer` bits before the point, sign included, and `fraction` after it.

    ``x = q 2**-fraction`` with ``b = integer + fraction`` bits. With a scale, ``x / R`` has that form, where the scale
    R is that of one level: the largest value, or a power of two near it.

    Args:
        integer: bits before the point, sign included; fewer than 1 if the grid ends below 1/2.
        fraction: bits after it, 0 or more; 2 to 25 bits in all, whose codes float32 holds exactly.
        ends: where q ends, and values beyond it saturate. ``"twos-complement"``: ``-2**(b-1) .. 2**(b-1) - 1``;
            ``"symmetric"``: ``-(2**(b-1) - 1) .. 2**(b-1) - 1``; ``"closed"``: ``-2**(b-1) .. 2**(b-1)``, both powers
            of two; ``"open"``: nowhere, so that b bits hold only what lies inside.
        halves: where the middle of two codes goes to without noise: to the ``"even"`` one, or ``"down"``.

    Source: Gupta et al. 2015, arXiv:1502.02551, <IL, FL> with halves down; Yang et al. 2020, WAGEUBN, arXiv:1909.02384.
    """

    kind: ClassVar[str] = "fixed-point"
    has_width: ClassVar[bool] = False
    scaled: ClassVar[Scaled] = "either"

    integer: int
    fraction: int
    ends: Ends = "twos-complement"
    halves: Halves = "even"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fraction < 0 or not 2 <= self.bits <= 25:
            raise UsageError(
                f"integer={self.integer}, fraction={self.fraction}: give 0 bits or more after the point, "
                "and 2 to 25 in all"
            )

    @property
    def bits(self) -> int:
        """The bits before and after the point."""
        return self.integer + self.fraction

    @property
    def zero(self) -> Zero:
        """The code 0."""
        return "symmetric"

    @property
    def code_range(self) -> tuple[float, float]:
        """See `ends`."""
        half = 2.0 ** (self.bits - 1)
        return {
            "twos-complement": (-half, half - 1),
            "symmetric": (1 - half, half - 1),
            "closed": (-half, half),
            "open": (-float("inf"), float("inf")),
        }[self.ends]

    @property
    def margin(self) -> float:
        """Half a step."""
        return 0.5

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:  # noqa: ARG002 - its own
        """``R 2**-fraction``."""
        low, high = self.code_range
        return Steps(scale=step(torch.maximum(-lo, hi), 1.0) * 2.0**-self.fraction, low=low, high=high)

    def fixed_steps(self, x: Tensor) -> Steps:
        """``2**-fraction``."""
        low, high = self.code_range
        return Steps(scale=x.new_full([1] * x.dim(), 2.0**-self.fraction), low=low, high=high)

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """``q = clamp(round(x / S))``; nan where x is not finite."""
        assert steps is not None
        t = x / steps.scale
        q = (t - 0.5).ceil() if noise is None and self.halves == "down" else round_to(t, noise)
        return bound(q, float(steps.low), float(steps.high)).masked_fill_(~t.isfinite(), torch.nan)

    def __str__(self) -> str:
        ends = "" if self.ends == "twos-complement" else f" ({self.ends})"
        return f"fixed point {self.integer}.{self.fraction}{ends}" + (", halves down" if self.halves == "down" else "")


@dataclass(frozen=True, kw_only=True)
class Flagged:
    """Two grids and a flag bit that says which: a coarse one for large values and a fine one for small values.

    With n = ``2**(number-1)`` and R the scale of one level: ``S = R / n``; where ``|x| >= S``, whole multiples of S up
    to n - 1; elsewhere whole multiples of ``S / n``.

    Args:
        number: bits of a number, sign included, 2 to 16; a code has one bit more.

    Source: Yang et al. 2020, WAGEUBN, arXiv:1909.02384, the flag of its errors.
    """

    kind: ClassVar[str] = "flagged"
    has_width: ClassVar[bool] = False
    scaled: ClassVar[Scaled] = "always"

    number: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.number <= 16:
            raise UsageError(f"number={self.number}: a number beside its flag has 2 to 16 bits, sign included")

    @property
    def bits(self) -> int:
        """The bits of the number, and the flag."""
        return self.number + 1

    @property
    def zero(self) -> Zero:
        """The code 0."""
        return "symmetric"

    @property
    def code_range(self) -> tuple[float, float]:
        """A code is a multiple of S."""
        most = 2.0 ** (self.number - 1) - 1
        return -most, most

    @property
    def margin(self) -> float:
        """Half a coarse step."""
        return 0.5

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:  # noqa: ARG002 - its own
        """``S = R / n``."""
        low, high = self.code_range
        return Steps(scale=step(torch.maximum(-lo, hi), 1.0) * 2.0 ** (1 - self.number), low=low, high=high)

    def fixed_steps(self, x: Tensor) -> Steps:
        """There are none without a scale."""
        raise TypeError(f"{self} needs a scale, also for {tuple(x.shape)}")

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """See the class; nan where ``x / S`` is not finite."""
        assert steps is not None
        t, fine = x / steps.scale, 2.0 ** (1 - self.number)
        coarse = bound(round_to(t, noise), float(steps.low), float(steps.high))
        q = torch.where(t.abs() >= 1, coarse, round_to(t / fine, noise) * fine)
        return q.masked_fill_(~t.isfinite(), torch.nan)

    def __str__(self) -> str:
        return f"{self.number}-bit with a flag"
