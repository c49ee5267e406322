"""Checks that schedules and rules share: bits, steps, counts, what a run measured, and saved states."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_fields, check_keys, check_type, is_whole

MOST_STEPS = 2**63 - 1


def check_bits(what: str, bits: int) -> None:
    """Raise a UsageError unless `bits` is a whole number from 1 to 32."""
    if not is_whole(bits) or not 1 <= bits <= 32:
        raise UsageError(f"{what}={shown(bits)}: bits are whole numbers from 1 to 32")


def check_step(step: int, total_steps: int | None) -> None:
    """Raise a UsageError unless a schedule of that length covers `step`."""
    if not is_whole(step) or not 0 <= step < (MOST_STEPS if total_steps is None else total_steps):
        last = "on" if total_steps is None else f"to {total_steps - 1}"
        raise UsageError(
            f"step {shown(step)} of a schedule with total_steps={total_steps}: it has bits from step 0 {last}; "
            "give it as many total_steps as the run has"
        )


def check_count(what: str, given: int) -> int:
    """`given` itself; a UsageError unless it is a whole number, 1 or more."""
    if not is_whole(given) or not 1 <= given <= MOST_STEPS:
        raise UsageError(f"{what}={shown(given)}: give a whole number, 1 or more")
    return given


def as_measure(what: str, given: Any) -> float:
    """One number that the run measured, possibly a tensor; a UsageError if it is not one number."""
    if not (isinstance(given, Tensor) and given.numel() == 1 and not given.is_meta and not given.is_complex()):
        check_type(what, given, float)
    return float(given)


def load_record(what: str, state: object, expected: type[Any]) -> Any:
    """A saved state as the class that remembers it; a UsageError unless each field is of its type and finite."""
    check_keys(f"state of {what}", state, (f.name for f in fields(expected)))
    assert isinstance(state, Mapping)
    result = expected(**state)
    try:
        check_fields(result)
    except UsageError as error:
        raise UsageError(f"state of {what}: {error}") from error
    if bad := [name for name, value in state.items() if not _all_finite(value)]:
        raise UsageError(f"state of {what}: {bad[0]}={shown(state[bad[0]])} is not finite")
    return result


def _all_finite(value: object) -> bool:
    """Whether a number, or every number in a list, is neither inf nor nan."""
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
