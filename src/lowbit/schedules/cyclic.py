"""Cyclic precision training: bits that swing between a low and a high bound in cycles.

Notation: t step, T period of a cycle in steps, u = (t mod T)/T the part of a cycle that is done, span = high - low.

Source: Fu et al. 2021, CPT, arXiv:2101.09868; the other profiles and shapes: Wolfe and Kyrillidis 2024,
arXiv:2403.02243.
"""

import math
from dataclasses import dataclass
from typing import Literal

from lowbit.errors import UsageError, check_choice
from lowbit.schedules.checks import check_bits, check_count, check_step
from lowbit.schedules.source import PureSchedule

Profile = Literal["cosine", "linear", "rex", "exponential"]
Shape = Literal["repeated", "triangular-vertical", "triangular-horizontal"]
Final = Literal["high"]


@dataclass(frozen=True, kw_only=True)
class Cyclic(PureSchedule):
    """Bits that swing between `low` and `high` in cycles of ``T = total_steps // cycles`` steps.

    ``b = round(low + span G(u))``, ties to even, with the growth profile G

    - ``"cosine"``: ``(1 - cos(pi u))/2``;
    - ``"linear"``: ``u``;
    - ``"rex"``: ``1 - (1-u)/(0.1 + 0.9 (1-u))``: stays low and rises late;
    - ``"exponential"``: ``1 - exp(-4 u)``: rises early and ends 1.8 % of the span below `high` before rounding.

    ``"repeated"`` cycles all grow and jump back to `low`. Of ``"triangular-..."`` cycles, those with numbers 0, 2,
    4, ... fall and the others grow. A fall is growth reflected vertically, ``1 - G(u)``, or horizontally,
    ``G(1 - u)``. The defaults are CPT's schedule, bit for bit.

    Args:
        low: the lowest bits, 1 to `high`.
        high: the highest bits, up to 32. Short cycles may stop short of it: cycles of 3 steps from 3 to 8 end at 7.
        cycles: how many cycles; even for triangular shapes, so that the last one grows.
        total_steps: length of the run in steps, at least `cycles`.
        profile: how bits grow in a cycle, the profile G.
        shape: whether every cycle grows, or cycles fall and grow by turns.
        final: ``"high"``: the ``total_steps % cycles`` steps after the last cycle are at `high`; if none are left over,
            the last step of the run is. None: they begin another cycle, which in CPT's code ends the run at `low`.

    Raises:
        UsageError: a value outside the above.

    Source: Fu et al. 2021, CPT, arXiv:2101.09868; profiles and shapes: Wolfe and Kyrillidis 2024, arXiv:2403.02243.
    """

    low: int
    high: int
    cycles: int
    total_steps: int
    profile: Profile = "cosine"
    shape: Shape = "repeated"
    final: Final | None = None

    def __post_init__(self) -> None:
        for name in ("high", "low"):
            check_bits(name, getattr(self, name))
        if self.low > self.high:
            raise UsageError(f"low={self.low}, high={self.high}: low is at most high")
        check_count("cycles", self.cycles)
        check_count("total_steps", self.total_steps)
        if self.total_steps < self.cycles:
            raise UsageError(
                f"total_steps={self.total_steps}, cycles={self.cycles}: a cycle has at least one step; "
                "give more steps or fewer cycles"
            )
        check_choice("profile", self.profile, Profile)
        check_choice("shape", self.shape, Shape)
        if self.final is not None:
            check_choice("final", self.final, Final)
        if self.shape != "repeated" and self.cycles % 2:
            raise UsageError(
                f"cycles={self.cycles} with shape={self.shape!r}: give an even number; cycles fall and grow by turns "
                "and the last one grows"
            )

    @property
    def period(self) -> int:
        """Steps of one cycle, T."""
        return self.total_steps // self.cycles

    @property
    def max_bits(self) -> int:
        """The highest bits it ever takes; fewer than `high` if all cycles are too short to reach it."""
        # A growing cycle is highest at its end, a falling one at its start.
        return max(map(self.at, (0, self.period - 1, self.total_steps - 1)))

    def at(self, step: int) -> int:
        """Bits of batch `step`."""
        check_step(step, self.total_steps)
        if self.final == "high" and step >= min(self.cycles * self.period, self.total_steps - 1):
            return self.high
        cycle, position = divmod(step, self.period)
        done, left = position / self.period, (self.period - position) / self.period
        if self.shape == "repeated" or cycle % 2:
            return round(self._between(self.low, self.high, done, left))
        # Cosine and linear are their own mirror image: if both are computed in one way, ties cannot differ either.
        if self.shape == "triangular-vertical" or self.profile in ("cosine", "linear"):
            return round(self._between(self.high, self.low, done, left))
        return round(self._between(self.low, self.high, 1 - done, 1 - left))

    def _between(self, start: int, end: int, done: float, left: float) -> float:
        """The unrounded value after the part `done` of a cycle from `start` to `end`.

        Do not simplify: each line has the order of operations of the authors' code, since the last bit decides ties
        such as 3.5. CPT's code and Wolfe's write the cosine in different ways.
        """
        span = end - start
        match self.profile:
            case "linear":
                return start + span * done
            case "rex":
                return end - span * (left / (1 - 0.9 + 0.9 * left))
            case "exponential":
                return end - span * math.exp(-4 * done)
            case "cosine" if self.shape == "repeated":
                return start + 0.5 * span * (1 + math.cos(math.pi * done + math.pi))
            case "cosine":
                return start + 0.5 * span * (1 - math.cos(math.pi * done))


MAKES = {"cyclic": Cyclic}
