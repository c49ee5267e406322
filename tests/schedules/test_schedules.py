"""Constant, piecewise and deficit schedules, times, costs, and what settings are refused."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from helpers import sequence
from lowbit.errors import UsageError
from lowbit.schedules import (
    Constant,
    Cyclic,
    Deficit,
    Piecewise,
    Progressive,
    RangeTest,
    RangeTested,
    Schedule,
    bit_operations,
    parse_steps,
    saving,
)


def test_a_constant_never_ends() -> None:
    """It has its bits at any step, and no total."""
    schedule = Constant(bits=5)

    assert (schedule(0), schedule(10**9), schedule.max_bits, schedule.total_steps) == (5, 5, 5, None)


def test_pieces_start_where_they_say() -> None:
    """Bits change at the start of a piece, given as a step, in epochs or as a fraction of the run."""
    schedule = Piecewise(pieces=[(0, 4), ("2ep", 6), ("0.9", 8)], total_steps=100, steps_per_epoch=20)

    assert sequence(schedule) == [4] * 40 + [6] * 50 + [8] * 10


def test_the_highest_piece_counts() -> None:
    """`max_bits` is that of any piece, not of the last."""
    assert Piecewise(pieces=[(0, 4), (10, 8), (20, 6)], total_steps=30).max_bits == 8


def test_changing_the_list_of_pieces_later_changes_nothing() -> None:
    """A schedule reads its pieces once."""
    pieces: list[tuple[int | str, int]] = [(0, 4), (5, 8)]
    schedule = Piecewise(pieces=pieces, total_steps=10)
    pieces.clear()

    assert sequence(schedule) == [4] * 5 + [8] * 5


@pytest.mark.parametrize(
    ("start", "length", "window"),
    [(0, 3, range(3)), ("1ep", "0.5ep", range(4, 6)), ("0.5", "0.5", range(5, 10)), (2, 0, range(0))],
)
def test_a_deficit_is_low_in_its_window_only(start: int | str, length: int | str, window: range) -> None:
    """Inside the window are its bits, outside the schedule's at the same step."""
    inner = Cyclic(low=4, high=8, cycles=1, total_steps=10)
    schedule = Deficit(schedule=inner, bits=3, start=start, length=length, steps_per_epoch=4)

    assert sequence(schedule) == [3 if step in window else inner(step) for step in range(10)]


def test_a_deficit_can_precede_training_without_end() -> None:
    """Around a constant the window needs no total."""
    schedule = Deficit(schedule=Constant(bits=8), bits=3, start=0, length=16_000)

    assert (schedule(15_999), schedule(16_000), schedule.total_steps, schedule.max_bits) == (3, 8, None, 8)


@pytest.mark.parametrize(("start", "length", "highest"), [(0, 5, 6), (5, 5, 8), (0, 10, 3)])
def test_a_window_may_hide_the_highest_bits(start: int, length: int, highest: int) -> None:
    """`max_bits` is the maximum over the steps that the window leaves."""
    inner = Piecewise(pieces=[(0, 8), (5, 6)], total_steps=10)

    assert Deficit(schedule=inner, bits=3, start=start, length=length).max_bits == highest


@pytest.mark.parametrize(
    "schedule",
    [
        Cyclic(low=3, high=8, cycles=2, total_steps=10),
        Piecewise(pieces=[(0, 8)], total_steps=10),
        Deficit(schedule=Piecewise(pieces=[(0, 8)], total_steps=10), bits=3, start=0, length=2),
    ],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("step", [-1, 10, 11])
def test_a_step_outside_the_run_is_an_error(schedule: Schedule, step: int) -> None:
    """The message names the step, the total and the steps that have bits."""
    with pytest.raises(UsageError, match=f"step {step} of a schedule with total_steps=10: .* from step 0 to 9"):
        schedule(step)


def test_a_constant_has_no_bits_before_the_run() -> None:
    """A negative step is an error without a total, too."""
    with pytest.raises(UsageError, match=r"step -1 .* from step 0 on"):
        Constant(bits=8)(-1)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (0, 0),
        (400, 400),
        ("400", 400),
        ("10ep", 3910),
        ("0.5ep", 195),
        ("0.9", 57_600),
        (".25", 16_000),
        ("1.0", 64_000),
    ],
)
def test_times_are_whole_steps(given: int | str, steps: int) -> None:
    """Steps, epochs and fractions of the run give whole steps, rounded down."""
    assert parse_steps(given, total_steps=64_000, steps_per_epoch=391) == steps


def test_fractions_are_exact() -> None:
    """0.29 of 100 steps is 29, although 0.29 * 100 is below 29 in floating point."""
    assert int(0.29 * 100) == 28
    assert parse_steps("0.29", total_steps=100) == 29


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (-1, "time -1: steps count from 0"),
        ("10 epochs", "write steps as 400, epochs as '10ep'"),
        ("", "time ''"),
        ("ep", "time 'ep'"),
        ("1e3", "time '1e3'"),
        ("-0.5", "time '-0.5'"),
        ("nan", "time 'nan'"),
        (0.9, "time 0.9: write .* a fraction of the run as '0.9'"),
        (True, "time True"),
        ("1.5", "at most '1.0'"),
        ("0.5", "fraction of a run without end"),
        ("3ep", "give steps_per_epoch"),
    ],
)
def test_a_bad_time_is_an_error(given: Any, message: str) -> None:
    """The message names what was given and how times are written, or what the unit needs."""
    with pytest.raises(UsageError, match=message):
        parse_steps(given)


def _cycle(**changes: Any) -> Cyclic:
    return Cyclic(**{"low": 3, "high": 8, "cycles": 4, "total_steps": 100, **changes})


def _pieces(*pieces: Any, **changes: Any) -> Piecewise:
    return Piecewise(**{"pieces": list(pieces), "total_steps": 100, **changes})


def _deficit(**changes: Any) -> Deficit:
    return Deficit(**{"schedule": _cycle(), "bits": 3, "start": 0, "length": 10, **changes})


def _plateau(**changes: Any) -> Progressive:
    return Progressive(**{"bits": [3, 8], "grad_bits": [6, 8], "threshold": 0.05, "decay": 0.3, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(bits=0), "bits=0: bits are whole numbers from 1 to 32"),
        (lambda: Constant(bits=33), "bits=33"),
        (lambda: Constant(bits=8.0), "bits=8.0"),
        (lambda: Constant(bits=True), "bits=True"),
        (lambda: _cycle(low=0), "low=0: bits are"),
        (lambda: _cycle(high=40), "high=40: bits are"),
        (lambda: _cycle(low=8, high=3), "low=8, high=3: low is at most high"),
        (lambda: _cycle(cycles=0), "cycles=0: give a whole number, 1 or more"),
        (lambda: _cycle(total_steps=99.5), "total_steps=99.5: give a whole number"),
        (lambda: _cycle(total_steps=3), "total_steps=3, cycles=4: a cycle has at least one step"),
        (lambda: _cycle(profile="cosinus"), "unknown profile 'cosinus'. Did you mean 'cosine'"),
        (lambda: _cycle(shape="triangular"), "unknown shape 'triangular'. Did you mean 'triangular-"),
        (lambda: _cycle(final="hi"), "unknown final 'hi'. Did you mean 'high'"),
        (lambda: _cycle(shape="triangular-vertical", cycles=3), "cycles=3 with shape='triangular-vertical': .* even"),
        (lambda: _cycle(shape="triangular-horizontal", cycles=1), "cycles=1 with .* even"),
        (
            lambda: RangeTested(schedule=_cycle(low=2, total_steps=40)),
            "up to 60 steps in a run of 40 .* than half",
        ),
        (
            lambda: RangeTested(schedule=_cycle(low=2), test=RangeTest(low=3, high=8)),
            "range test from 3 to 8 bits in cycles from 2 to 8: give both the same",
        ),
        (_pieces, "give at least one"),
        (lambda: _pieces((0, 8), (50, 4), (20, 6)), r"\[0, 50, 20\]: give them in order of time"),
        (lambda: _pieces((0, 8), ("0.0", 4)), r"\[0, 0\]: .* each start once"),
        (lambda: _pieces((10, 8)), "first piece starts at step 10: start it at 0"),
        (lambda: _pieces((0, 8), (100, 4)), "starts at step 100, after the last of total_steps=100"),
        (lambda: _pieces((0, 0)), "bits of a piece=0"),
        (lambda: _pieces((0, 8), ("5ep", 4)), "'5ep' is in epochs: give steps_per_epoch"),
        (lambda: _pieces((0, 8), ("5ep", 4), steps_per_epoch=0), "steps_per_epoch=0"),
        (lambda: _pieces((0, 8), total_steps=0), "total_steps=0"),
        (lambda: _deficit(schedule=8), "schedule=8: give a schedule"),
        (lambda: _deficit(bits=9), "bits=9 in the window of a schedule that goes up to 8"),
        (lambda: _deficit(bits=0), "bits=0"),
        (lambda: _deficit(start=91), "window ends at step 101, after the last of total_steps=100"),
        (lambda: _deficit(length="10x"), "time '10x'"),
        (lambda: _deficit(schedule=Constant(bits=8), length="0.5"), "fraction of a run without end"),
        (lambda: _plateau(bits=[3, 4, 8]), r"bits=\[3, 4, 8\], grad_bits=\[6, 8\]: give one of each for every stage"),
        (lambda: _plateau(bits=[], grad_bits=[]), "at least one stage"),
        (lambda: _plateau(bits=[8, 3]), r"bits=\[8, 3\]: precision never goes down"),
        (lambda: _plateau(grad_bits=[6, 33]), "grad_bits=33"),
        (lambda: _plateau(threshold=-0.1), "threshold=-0.1"),
        (lambda: _plateau(threshold=math.nan), "threshold=nan"),
        (lambda: _plateau(decay=1.5), "decay=1.5: give a number from 0 to 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(make: Callable[[], object], message: str) -> None:
    """The message names what was given and what is allowed."""
    with pytest.raises(UsageError, match=message):
        make()


def test_static_training_saves_nothing() -> None:
    """8 bits against 8 bits is a saving of 0, and fewer bits cost b² + 2 b g."""
    assert saving(Constant(bits=8)) == 0
    assert saving(Constant(bits=4)) == pytest.approx(100 * (1 - (16 + 64) / (64 + 128)))


def test_cost_is_counted_step_by_step() -> None:
    """The mean of squares counts, not the square of the mean: 4 and 8 bits by halves are not 6."""
    schedule = Piecewise(pieces=[(0, 4), ("0.5", 8)], total_steps=10)

    assert bit_operations(schedule, 8) == ((16 + 64) + (64 + 128)) / 2
    assert bit_operations(schedule, 8) != bit_operations(Constant(bits=6), 8)


def test_schedules_of_different_lengths_have_no_common_cost() -> None:
    """The message names both lengths."""
    forward, backward = (Piecewise(pieces=[(0, 8)], total_steps=n) for n in (10, 20))

    with pytest.raises(UsageError, match=re.escape("schedules of [10, 20] steps")):
        bit_operations(forward, backward)
