"""CPT's precision range test as a rule: train at 2 bits, then 3, ... until a width makes training progress.

Source: Fu et al. 2021, CPT, arXiv:2101.09868, section 3.3.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

from lowbit.errors import RunError, UsageError, check_choice, shown
from lowbit.inputs.checks import check_keys, check_type, is_finite
from lowbit.schedules.checks import as_measure, check_bits, check_count, load_record
from lowbit.schedules.source import Follows, Rule

Better = Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a range test saw at one width.

    Args:
        bits: the width.
        steps: training steps at it.
        first: mean of the measure over the first half of them.
        last: mean over the last half.
        gain: how much the measure got better, see `RangeTest`.
        error: standard error of the gain, from the variances of the two halves; None if a half is one step.
        progress: whether the gain counts as progress.
    """

    bits: int
    steps: int
    first: float
    last: float
    gain: float
    error: float | None
    progress: bool


@dataclass(frozen=True, kw_only=True)
class _Ladder:
    """What a range test remembers, as plain numbers: the measures at the present width and the widths done."""

    measures: list[float] = field(default_factory=list)
    tried: list[tuple[int, int, float, float, float, float | None]] = field(default_factory=list)
    chosen: int | None = None


class RangeTest(Rule):
    """CPT's precision range test: train at 2 bits, then 3, ... until a width makes training progress.

    Each width b trains for n steps. With m_1 and m_2 the means of the measure over the first and the last n // 2 of
    them, the gain is ``m_2 - m_1`` if the measure should rise (an accuracy), and ``(m_1 - m_2) / |m_1|`` if it should
    fall (a loss, whose unit is free). The first width whose gain exceeds `threshold` and `significance` standard
    errors is chosen, or `high` if none does. With s_1 and s_2 the standard deviations in the halves, the standard error
    is ``sqrt((s_1^2 + s_2^2) / (n // 2))``, divided by |m_1| if the gain is.

    It is a small state machine: `update` is its only transition, and `state_dict` is all that it remembers.

    Args:
        low: the first width.
        high: the last width, at least `low`; without `every` it is not trained, since nothing is left to choose.
        steps_per_bit: n, 4 or more; without `significance` 2 or more.
        threshold: the gain that counts as progress.
        better: whether the measure should get ``"higher"`` or ``"lower"``.
        significance: how many standard errors a gain must also exceed; this needs `steps_per_bit` of 4 or more. None:
            the threshold decides alone, and noise that passes it counts as progress.
        every: whether to train at each width up to `high`, for the table; the choice is the same.

    Raises:
        UsageError: a value outside the above.

    Source: Fu et al. 2021, CPT, arXiv:2101.09868, section 3.3, which states neither window nor threshold; the
    authors' code lacks a range test.
    """

    def __init__(
        self,
        *,
        low: int = 2,
        high: int = 8,
        steps_per_bit: int = 100,
        threshold: float = 0.01,
        better: Better = "lower",
        significance: float | None = 3.0,
        every: bool = False,
    ) -> None:
        check_bits("low", low)
        check_bits("high", high)
        if low > high:
            raise UsageError(f"low={low}, high={high}: low is at most high")
        if check_count("steps_per_bit", steps_per_bit) < 2:
            raise UsageError(f"steps_per_bit={steps_per_bit}: a gain needs two steps or more at each width")
        check_type("every", every, bool)
        if not is_finite(threshold):
            raise UsageError(f"threshold={shown(threshold)}: give a finite number, e.g. 0.01")
        check_choice("better", better, Better)
        if significance is not None:
            if not is_finite(significance) or significance <= 0:
                raise UsageError(f"significance={shown(significance)}: give a finite number above 0, e.g. 3.0, or None")
            if steps_per_bit < 4:
                raise UsageError(
                    f"steps_per_bit={steps_per_bit} with significance={significance:g}: a half of one step has no "
                    "variance; give 4 steps or more, or significance=None"
                )
        self.low, self.high, self.steps_per_bit = low, high, steps_per_bit
        self.threshold, self.better, self.every = float(threshold), better, every
        self.significance = None if significance is None else float(significance)
        self._state = _Ladder()
        self._close()

    def __repr__(self) -> str:
        now = f"at {self.current_bits} bits" if self.chosen is None else f"chose {self.chosen} bits"
        return f"RangeTest(low={self.low}, high={self.high}, steps_per_bit={self.steps_per_bit}, {now})"

    @property
    def tried(self) -> tuple[Tried, ...]:
        """A row for each width that is done."""
        return tuple(
            Tried(
                bits=bits,
                steps=steps,
                first=first,
                last=last,
                gain=gain,
                error=error,
                progress=self._is_progress(gain, error),
            )
            for bits, steps, first, last, gain, error in self._state.tried
        )

    @property
    def chosen(self) -> int | None:
        """The lowest width that makes progress; None as long as no width has."""
        return self._state.chosen

    @property
    def done(self) -> bool:
        """Whether no width is left to train at."""
        return len(self._state.tried) == self.most_steps // self.steps_per_bit or (
            self.chosen is not None and not self.every
        )

    @property
    def most_steps(self) -> int:
        """Training steps that the whole test may take."""
        return (self.high - self.low + self.every) * self.steps_per_bit

    @property
    def current_bits(self) -> int:
        """The width to train the next step at: the chosen one once the test is over."""
        return self.chosen if self.done and self.chosen else self.low + len(self._state.tried)

    @property
    def follows(self) -> Follows | None:
        """The measure of each step, as long as a width is left to train at."""
        return None if self.done else "step"

    @property
    def max_bits(self) -> int:
        """The highest width of the test."""
        return self.high

    def widths(self) -> list[int]:
        """Every width from the first to the last."""
        return list(range(self.low, self.high + 1))

    def update(self, measure: float | Tensor) -> bool:
        """Take the measure of the step that just ended.

        Returns:
            Whether the width changes, or the test is over.

        Raises:
            RunError: the measure is inf or nan; nothing changes.
            UsageError: the test is over.
        """
        value = as_measure("measure", measure)
        if self.done:
            raise UsageError(f"this range test is over: it chose {self.chosen} bits")
        if not math.isfinite(value):
            raise RunError(
                f"the measure of the range test is {value} at {self.current_bits} bits: training diverged; begin the "
                "test at more bits, or with a smaller learning rate"
            )
        measures = [*self._state.measures, value]
        if len(measures) < self.steps_per_bit:
            self._state = replace(self._state, measures=measures)
            return False
        half = self.steps_per_bit // 2
        first, last = math.fsum(measures[:half]) / half, math.fsum(measures[-half:]) / half
        unit = abs(first) if self.better == "lower" and first else 1.0
        gain = (first - last if self.better == "lower" else last - first) / unit
        error = None
        if half > 1:
            variances = statistics.variance(measures[:half]) + statistics.variance(measures[-half:])
            error = math.sqrt(variances / half) / unit
        bits = self.current_bits
        chosen = bits if self.chosen is None and self._is_progress(gain, error) else self.chosen
        row = (bits, self.steps_per_bit, first, last, gain, error)
        self._state = _Ladder(tried=[*self._state.tried, row], chosen=chosen)
        self._close()
        return True

    def _is_progress(self, gain: float, error: float | None) -> bool:
        """Whether a gain with this standard error counts as progress."""
        return gain > max(self.threshold, (self.significance or 0.0) * (error or 0.0))

    def _close(self) -> None:
        """Choose `high` if no lower width is left."""
        if self.done and self.chosen is None:
            self._state = replace(self._state, chosen=self.high)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` depends on besides the arguments, as plain numbers and lists of them."""
        return {**asdict(self._state), "tried": [list(row) for row in self._state.tried]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError if it is not the state of such a test."""
        check_keys("state of a range test", state, (f.name for f in fields(_Ladder)))
        rows = state["tried"]
        rows = [tuple(row) if isinstance(row, list) else row for row in rows] if isinstance(rows, list) else rows
        loaded: _Ladder = load_record("a range test", {**state, "tried": rows}, _Ladder)
        tried = loaded.tried
        widths = [row[0] for row in tried]
        fits = len(tried) * self.steps_per_bit <= self.most_steps and len(state["measures"]) < self.steps_per_bit
        if not fits or widths != [*range(self.low, self.low + len(widths))]:
            raise UsageError(
                f"state of a range test that tried {widths} bits: this one goes from {self.low} to {self.high} with "
                f"{self.steps_per_bit} steps at each; give the arguments that it was saved with"
            )
        if any(row[1] != self.steps_per_bit or (row[5] is None) != (self.steps_per_bit < 4) for row in tried):
            raise UsageError(
                f"state of a range test with {shown(tried)}: each width has {self.steps_per_bit} steps, and a standard "
                "error from 4 on"
            )
        over = len(tried) == self.most_steps // self.steps_per_bit
        progress = (row[0] for row in tried if self._is_progress(*row[4:]))
        if loaded.chosen != next(progress, self.high if over else None):
            raise UsageError(f"state of a range test that chose {loaded.chosen} bits: its gains do not lead to that")
        self._state = replace(loaded, measures=list(loaded.measures))
