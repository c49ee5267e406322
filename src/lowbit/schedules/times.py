"""Times of a run: a step, a number of epochs, or a fraction of the run, as whole steps."""

import math
import re
from fractions import Fraction

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_type
from lowbit.schedules.checks import MOST_STEPS, check_count

# A step, or "400" steps, "10ep" epochs, "0.9" of the run.
Time = int | str


def parse_steps(given: Time, *, total_steps: int | None = None, steps_per_epoch: int | None = None) -> int:
    """A time as a number of whole steps, rounded down; units are read only here.

    Args:
        given: steps (``400`` or ``"400"``), epochs (``"10ep"``, ``"2.5ep"``) or, with a decimal point, a
            fraction of the run (``"0.9"``; ``"1.0"`` is all of it).
        total_steps: length of the run in steps; needed for fractions.
        steps_per_epoch: needed for epochs.

    Raises:
        UsageError: an unknown unit, a negative time, a fraction above 1, or a missing argument that its unit needs.
    """
    check_type("total_steps", total_steps, int | None)
    check_type("steps_per_epoch", steps_per_epoch, int | None)
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given <= MOST_STEPS:
            raise UsageError(f"time {shown(given)}: steps count from 0")
        return given
    match = re.fullmatch(r"(\d{1,18}|\d{0,18}\.\d{1,18})(ep)?", given, re.ASCII) if isinstance(given, str) else None
    if match is None:
        raise UsageError(f"time {shown(given)}: write steps as 400, epochs as '10ep', a fraction of the run as '0.9'")
    number, epochs = Fraction(match[1]), match[2]
    if epochs:
        if steps_per_epoch is None:
            raise UsageError(f"time {given!r} is in epochs: give steps_per_epoch, or steps such as 400")
        return math.floor(number * check_count("steps_per_epoch", steps_per_epoch))
    if "." not in match[1]:
        return int(number)
    if number > 1:
        raise UsageError(f"time {given!r}: a fraction of the run is at most '1.0'; epochs are written '2.5ep'")
    if total_steps is None:
        raise UsageError(f"time {given!r} is a fraction of a run without end: give steps such as 400")
    return math.floor(number * total_steps)
