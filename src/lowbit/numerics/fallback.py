"""Whole numbers of which the largest values have two codes each.

Notation: as in `lowbit.numerics.element`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_fields
from lowbit.numerics.element import Scaled, Step, Steps, Zero, bound
from lowbit.numerics.rounding import round_to


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """Whole numbers as one code, or as two where the magnitudes are largest: a code, and one of what is left of it.

    With n the largest code, ``S = max|x| / n`` and q in -n .. n. Of all that have a scale of their own, those of the
    largest magnitudes, `share` of them at most, have ``x = (2 n q + r) S / (2 n)`` with r in -n .. n too: their steps
    are 2n times finer. Which ones is found anew for each tensor; of those of equal magnitude none does so if not all
    may.

    Args:
        bits: width of a code, sign included, 2 to 8.
        share: of what has a scale of its own, the most that may have two codes, above 0 and below 1.

    Source: Zhang et al. 2025, arXiv:2503.08040 (blocks with outliers as two int8 codes).
    """

    kind: ClassVar[str] = "fallback"
    has_width: ClassVar[bool] = True
    scaled: ClassVar[Scaled] = "always"

    bits: int
    share: float
    zero: ClassVar[Zero] = "symmetric"
    margin: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits={shown(self.bits)}: a code beside which another one may stand has 2 to 8")
        if not 0 < self.share < 1:
            raise UsageError(f"share={self.share}: give the most that may have two codes, above 0 and below 1")

    @property
    def code_range(self) -> tuple[int, int]:
        """Of one code."""
        return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1

    def falls_back(self, most: Tensor) -> Tensor:
        """Which of these magnitudes have two codes: bool, in the same shape; none where they are not finite."""
        count = int(self.share * most.numel())
        if count == 0:
            return torch.zeros_like(most, dtype=torch.bool)
        return (most > most.flatten().kthvalue(most.numel() - count).values) & most.isfinite()

    def steps(self, lo: Tensor, hi: Tensor, levels: Tensor | float, step: Step) -> Steps:
        """The formulas of the class, codes being counted in the finer steps where there are two."""
        most = torch.maximum(-lo, hi)
        finer = torch.where(self.falls_back(most), 2.0 * levels, 1.0).to(most)
        high = levels * finer
        return Steps(scale=step(most, levels) / finer, low=-high, high=high)

    def fixed_steps(self, x: Tensor) -> Steps:
        """There are none without a scale."""
        raise TypeError(f"{self} needs a scale, also for {tuple(x.shape)}")

    def codes(self, x: Tensor, steps: Steps | None, noise: Tensor | None) -> Tensor:
        """``2 n q + r``, or q: ``x / S`` rounded, in the steps at hand."""
        assert steps is not None
        return bound(round_to(x / steps.scale, noise), steps.low, steps.high)

    def __str__(self) -> str:
        return f"{self.bits}-bit symmetric (two codes for up to {100 * self.share:g} %)"
