"""Constant bits on each of several pieces of the run, as learning rates often fall in steps at stated times."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_type
from lowbit.schedules.checks import check_bits, check_count, check_step
from lowbit.schedules.source import PureSchedule
from lowbit.schedules.times import Time, parse_steps


@dataclass(frozen=True, kw_only=True)
class Piecewise(PureSchedule):
    """Constant bits on each of several pieces: b(t) is that of the last piece that starts at or before t.

    Args:
        pieces: pairs (start, bits) in order of time; the first starts at 0. A start is a step, ``"10ep"``, or
            ``"0.9"`` of the run (see `parse_steps`), e.g. ``[[0, 4], ["0.9", 8]]``.
        total_steps: length of the run in steps; every piece starts before it.
        steps_per_epoch: needed if a start is in epochs.

    Raises:
        UsageError: a value outside the above.
    """

    pieces: Sequence[tuple[Time, int]]
    total_steps: int
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check_count("total_steps", self.total_steps)
        if not isinstance(self.pieces, list | tuple) or not self.pieces:
            raise UsageError(f"pieces={shown(self.pieces)}: give at least one, e.g. [(0, 8)]")
        for piece in self.pieces:
            if not isinstance(piece, list | tuple) or len(piece) != 2:
                raise UsageError(f"pieces={shown(self.pieces)}: each is a pair (start, bits), e.g. (0, 8)")
        for _, bits in self.pieces:
            check_bits("bits of a piece", bits)
        check_type("steps_per_epoch", self.steps_per_epoch, int | None)
        starts = [start for start, _ in self._steps]
        if starts[0] != 0:
            raise UsageError(f"the first piece starts at step {starts[0]}: start it at 0, so that every step has bits")
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise UsageError(f"pieces start at steps {starts}: give them in order of time, each start once")
        if starts[-1] >= self.total_steps:
            raise UsageError(
                f"a piece starts at step {starts[-1]}, after the last of total_steps={self.total_steps}: "
                "leave it out, or give more total_steps"
            )

    @cached_property
    def _steps(self) -> tuple[tuple[int, int], ...]:
        """The pieces with their starts in steps."""
        return tuple(
            (parse_steps(start, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch), bits)
            for start, bits in self.pieces
        )

    @property
    def max_bits(self) -> int:
        """The bits of the highest piece."""
        return max(bits for _, bits in self._steps)

    def at(self, step: int) -> int:
        """Bits of the piece that `step` lies in."""
        check_step(step, self.total_steps)
        return next(bits for start, bits in reversed(self._steps) if start <= step)


MAKES = {"piecewise": Piecewise}
