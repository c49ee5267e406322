"""Cyclic precision whose lowest bits a range test finds in the first cycle, as CPT trains in its paper.

Source: Fu et al. 2021, CPT, arXiv:2101.09868, section 3.3.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_type
from lowbit.schedules.cyclic import Cyclic
from lowbit.schedules.range_test import RangeTest
from lowbit.schedules.source import Follows, Rule

# The fewest steps that a range test in the first cycle trains at each width.
_LEAST_STEPS = 10


class RangeTested(Rule):
    """A range test, followed by the cycles of a schedule with the lowest bits that the test found.

    Args:
        schedule: the cycles; the test begins at their `low`, and the bits that it finds take its place.
        test: the range test, from `low` to `high` of the schedule; None: the widths share the first cycle, with 10
            steps or more each, and progress is a fall of the loss by more than 1 %.

    Attributes:
        schedule: as given.
        test: the range test, done or not.

    Raises:
        UsageError: a test of other widths than the schedule's, or that may take more than half of its steps.
    """

    def __init__(self, *, schedule: Cyclic, test: RangeTest | None = None) -> None:
        check_type("schedule", schedule, Cyclic)
        check_type("test", test, RangeTest | None)
        self.schedule, self.test = schedule, test or _in_first_cycle(schedule)
        if (self.test.low, self.test.high) != (schedule.low, schedule.high):
            raise UsageError(
                f"a range test from {self.test.low} to {self.test.high} bits in cycles from {schedule.low} to "
                f"{schedule.high}: give both the same low and high"
            )
        if self.test.most_steps > schedule.total_steps // 2:
            raise UsageError(
                f"a range test of up to {self.test.most_steps} steps in a run of {schedule.total_steps} takes more "
                f"than half of it: {self.test.steps_per_bit} steps at each width; train longer, take fewer, or give "
                "`low` a number"
            )

    def __repr__(self) -> str:
        return f"RangeTested(schedule={self.schedule!r}, test={self.test!r})"

    @property
    def total_steps(self) -> int:
        """The length of the schedule."""
        return self.schedule.total_steps

    @property
    def max_bits(self) -> int:
        """The highest width of the test, or, once it is over, the highest of the cycles."""
        return self._found().max_bits if self.test.done else self.test.max_bits

    @property
    def follows(self) -> Follows | None:
        """The loss of each step, as long as the test goes on."""
        return self.test.follows

    @property
    def current_bits(self) -> int:
        """The width of the test, or, once it is over, the lowest bits of the cycles."""
        return self.test.current_bits

    def _found(self) -> Cyclic:
        """The cycles with the bits that the test chose."""
        return replace(self.schedule, low=self.test.current_bits)

    def at(self, step: int) -> int:
        """Bits of batch `step`: those of the test, or, once it is over, those of the cycles."""
        return self._found().at(step) if self.test.done else self.test.at(step)

    def widths(self) -> list[int]:
        """The widths of the test, from which the cycles take theirs."""
        return self.test.widths()

    @property
    def title(self) -> str:
        """The name of the schedule."""
        return self.schedule.title

    def update(self, loss: float | Tensor) -> bool:
        """Take the loss of the step that just ended, as `RangeTest.update`."""
        return self.test.update(loss)

    def state_dict(self) -> dict[str, Any]:
        """The state of the test."""
        return self.test.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave; a UsageError if it is not the state of such a test."""
        self.test.load_state_dict(state)


def range_tested(
    *,
    low: Literal["range-test"],  # noqa: ARG001 - it marks these settings
    high: int,
    range_test_steps: int | None = None,
    range_test_threshold: float | None = None,
    **cycles: Any,
) -> RangeTested:
    """`RangeTested` from settings: the test begins at 2 bits.

    Args:
        low: ``range-test`` finds them in the first cycle.
        high: the highest bits of the cycles, and the last width of the test.
        range_test_steps: with low ``range-test``: steps at each width, 4 or more. None: the widths share the first
            cycle, 10 steps or more each.
        range_test_threshold: with low ``range-test``: the relative fall of the loss that is progress. None: 0.01.
        cycles: the other settings of `Cyclic`.
    """
    schedule = Cyclic(low=min(2, high), high=high, **cycles)
    given = {"steps_per_bit": range_test_steps, "threshold": range_test_threshold}
    changes = {name: value for name, value in given.items() if value is not None}
    return RangeTested(schedule=schedule, test=_in_first_cycle(schedule, **changes))


def _in_first_cycle(schedule: Cyclic, **changes: Any) -> RangeTest:
    """The test whose widths share the first cycle, with 10 steps or more each; `changes` replace its arguments."""
    steps = max(schedule.period // max(schedule.high - schedule.low, 1), _LEAST_STEPS)
    return RangeTest(**{"low": schedule.low, "high": schedule.high, "steps_per_bit": steps, **changes})


MAKES = {"cyclic": range_tested}
