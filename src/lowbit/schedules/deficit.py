"""A window of few bits inside another schedule: the probe of critical learning periods.

Source: Wolfe and Kyrillidis 2024, arXiv:2403.02243.
"""

from dataclasses import dataclass
from functools import cached_property

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_fields
from lowbit.schedules.checks import check_bits
from lowbit.schedules.piecewise import Piecewise
from lowbit.schedules.source import PureSchedule, Schedule
from lowbit.schedules.times import Time, parse_steps


@dataclass(frozen=True, kw_only=True)
class Deficit(PureSchedule):
    """A window of few bits inside another schedule: ``b = bits`` for ``start <= t < start + length``.

    Args:
        schedule: what runs outside the window; its own steps go on during the window.
        bits: bits inside the window, 1 to the highest of `schedule`.
        start: first step of the window; a step, ``"10ep"``, or ``"0.5"`` of the schedule's total steps.
        length: steps in the window, in the same units; 0 is an empty window. The window ends within the schedule.
        steps_per_epoch: needed if `start` or `length` is in epochs.

    Raises:
        UsageError: a value outside the above.

    Source: Wolfe and Kyrillidis 2024, arXiv:2403.02243, critical learning periods.
    """

    schedule: Schedule
    bits: int
    start: Time
    length: Time
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise UsageError(f"schedule={shown(self.schedule)}: give a schedule, e.g. Constant(bits=8)")
        check_bits("bits", self.bits)
        check_fields(self)
        if self.bits > self.schedule.max_bits:
            raise UsageError(
                f"bits={self.bits} in the window of a schedule that goes up to {self.schedule.max_bits}: "
                "a deficit has at most as many"
            )
        end = self._window.stop
        if self.total_steps is not None and end > self.total_steps:
            raise UsageError(
                f"the window ends at step {end}, after the last of total_steps={self.total_steps}: "
                "start it earlier or make it shorter"
            )

    @cached_property
    def _window(self) -> range:
        """The steps in the window."""
        start, length = (
            parse_steps(time, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)
            for time in (self.start, self.length)
        )
        return range(start, start + length)

    @property
    def total_steps(self) -> int | None:
        """That of the schedule around the window."""
        return self.schedule.total_steps

    @property
    def max_bits(self) -> int:
        """The highest bits of the schedule, which the window may hide."""
        highest = self.schedule.max_bits
        if self.total_steps is None or any(self(step) == highest for step in range(self.total_steps)):
            return highest
        return max(map(self, range(self.total_steps)))

    def at(self, step: int) -> int:
        """Few bits inside the window, and the schedule's bits outside."""
        return self.bits if step in self._window else self.schedule(step)


def deficit(
    *, bits: int, low: int, start: Time, length: Time, total_steps: int, steps_per_epoch: int | None = None
) -> Deficit:
    """A deficit in training at constant bits, as recipes and the command line write it.

    Args:
        bits: bits outside the window.
        low: bits inside the window, at most `bits`.
        start: first step of the window; a step, ``"10ep"``, or ``"0.5"`` of the run.
        length: steps in the window, in the same units.
        total_steps: length of the run in steps.
        steps_per_epoch: needed if `start` or `length` is in epochs.
    """
    return Deficit(
        schedule=Piecewise(pieces=((0, bits),), total_steps=total_steps),
        bits=low,
        start=start,
        length=length,
        steps_per_epoch=steps_per_epoch,
    )


MAKES = {"deficit": deficit}
