"""The same bits all the time: training at static precision, against which savings are measured."""

from dataclasses import dataclass

from lowbit.schedules.checks import check_bits, check_step
from lowbit.schedules.source import PureSchedule


@dataclass(frozen=True, kw_only=True)
class Constant(PureSchedule):
    """The same bits at every step, without end.

    Args:
        bits: of every step, 1 to 32.
    """

    bits: int

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)

    @property
    def total_steps(self) -> None:
        """None: it never ends."""
        return

    @property
    def max_bits(self) -> int:
        """Its bits."""
        return self.bits

    def at(self, step: int) -> int:
        """The bits; `step` is 0 or more."""
        check_step(step, self.total_steps)
        return self.bits


MAKES = {"constant": Constant}
