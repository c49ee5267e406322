import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ORACLES, Vectors
from lowbit.errors import RunError, UsageError
from lowbit.schedules import (
    KINDS,
    SUITE,
    Constant,
    Cyclic,
    Deficit,
    Piecewise,
    PlateauRule,
    Profile,
    Progressive,
    RangeTest,
    RangeTested,
    Schedule,
    Shape,
    Source,
    Template,
    bit_operations,
    parse_steps,
    saving,
)
from lowbit.signatures import settings_of

VECTORS = "dynamic/cpt_bits.npz"


def _json(name: str) -> Any:
    """One file of reference data; the test is skipped, saying so, where the folder is absent."""
    path = ORACLES / "dynamic" / name
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    return json.loads(path.read_text(encoding="utf-8"))


def _sequence(schedule: Schedule) -> list[int]:
    assert schedule.total_steps is not None
    return [schedule(step) for step in range(schedule.total_steps)]


def _cpt(case: dict[str, Any], key: str) -> Cyclic:
    low, high = case[key]
    return Cyclic(low=low, high=high, cycles=case["num_cycles"], total_steps=case["total_iters"])


def test_every_recorded_case_of_cpt_is_tested() -> None:
    """The tests below go through all 17 recorded cases."""
    assert [case["id"] for case in _json("cpt_bits.json")["configs"]] == list(range(17))


@pytest.mark.parametrize("case", range(17))
@pytest.mark.parametrize(("key", "array"), [("bits", "bits"), ("grad_bits", "gbits")])
def test_the_default_is_cpts_sequence(vectors: Vectors, case: int, key: str, array: str) -> None:
    """The bits of every step equal those of the authors' code, forward and backward."""
    schedule = _cpt(_json("cpt_bits.json")["configs"][case], key)

    assert _sequence(schedule) == vectors[f"{array}_{case:02d}"].tolist()


@pytest.mark.parametrize("case", range(17))
def test_bit_operations_are_those_of_cpts_log(case: int) -> None:
    """The mean of b² + 2 b g over 3 · 32² is the ratio that the authors' code logs, gradients in cycles too."""
    config = _json("cpt_bits.json")["configs"][case]

    ratio = bit_operations(_cpt(config, "bits"), _cpt(config, "grad_bits")) / (3 * 32**2)

    assert ratio == pytest.approx(config["mean_cr"], rel=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "grad_bits", "percent"),
    [
        (3, 8, 8, 36.67),
        (3, 6, 6, 30.05),
        (3, 4, 6, 14.84),
        (4, 8, 8, 30.11),
        (4, 6, 6, 20.69),
        (4, 6, 8, 19.96),
        (5, 8, 8, 23.16),
        (5, 6, 8, 10.23),
    ],
)
def test_cpt_saves_what_its_bits_say(low: int, high: int, grad_bits: int, percent: float) -> None:
    """The settings of CPT's experiments save the bit operations that their formula gives."""
    schedule = Cyclic(low=low, high=high, cycles=32, total_steps=64_000)

    assert saving(schedule, grad_bits=grad_bits, high=high) == pytest.approx(percent, abs=0.005)


def test_half_a_bit_rounds_to_the_even_width() -> None:
    """In the middle of a cycle 3 to 8 bits is 5.5, which becomes 6, and 3 to 6 bits is 4.5, which becomes 4."""
    middles = [Cyclic(low=3, high=high, cycles=1, total_steps=2000)(1000) for high in (8, 6)]

    assert middles == [6, 4]


def test_a_leftover_cycle_ends_the_run_low() -> None:
    """1000 steps in 3 cycles leave one step, which CPT's code runs at the lowest bits."""
    assert Cyclic(low=3, high=8, cycles=3, total_steps=1000)(999) == 3


@st.composite
def _cyclic(draw: st.DrawFn) -> Cyclic:
    low = draw(st.integers(1, 32))
    shape: Shape = draw(st.sampled_from(["repeated", "triangular-vertical", "triangular-horizontal"]))
    cycles = draw(st.integers(1, 6)) * (1 if shape == "repeated" else 2)
    profile: Profile = draw(st.sampled_from(["cosine", "linear", "rex", "exponential"]))
    return Cyclic(
        low=low,
        high=draw(st.integers(low, 32)),
        cycles=cycles,
        total_steps=draw(st.integers(cycles, 200)),
        profile=profile,
        shape=shape,
        final=draw(st.sampled_from([None, "high"])),
    )


@given(_cyclic())
def test_final_high_ends_high(schedule: Cyclic) -> None:
    """The last step is at the highest bits, however the cycles divide the run."""
    schedule = dataclasses.replace(schedule, final="high")

    assert schedule(schedule.total_steps - 1) == schedule.high


@given(_cyclic())
def test_final_high_changes_only_the_end(schedule: Cyclic) -> None:
    """Before the leftover steps, or before the last step where there are none, nothing changes."""
    with_end, without = (dataclasses.replace(schedule, final=final) for final in ("high", None))
    kept = min(schedule.cycles * schedule.period, schedule.total_steps - 1)

    assert _sequence(with_end)[:kept] == _sequence(without)[:kept]


def test_final_high_replaces_the_leftover_cycle() -> None:
    """Of 100 steps in 7 cycles of 14 the last two begin another cycle, or are at the highest bits."""
    schedule = Cyclic(low=3, high=8, cycles=7, total_steps=100)

    assert _sequence(schedule)[98:] == [3, 3]
    assert _sequence(dataclasses.replace(schedule, final="high"))[98:] == [8, 8]


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("CR", 36.7),
        ("CT", 36.7),
        ("LR", 37.2),
        ("LT", 37.2),
        ("RR", 60.1),
        ("RTV", 36.3),
        ("RTH", 60.1),
        ("ER", 17.8),
        ("ETV", 36.5),
        ("ETH", 17.8),
    ],
)
def test_each_of_the_ten_saves_what_its_curve_says(name: str, percent: float) -> None:
    """From 3 to 8 bits in 8 cycles, with 8-bit gradients, each saves its share against 8 bits to 0.1 point."""
    schedule = Cyclic(low=3, high=8, cycles=8, total_steps=64_000, **SUITE[name])

    assert saving(schedule, grad_bits=8, high=8) == pytest.approx(percent, abs=0.05)


def test_the_table_has_ten_names() -> None:
    """Each of the authors' names is there, and no two mean the same arguments."""
    assert set(SUITE) == {"CR", "CT", "LR", "LT", "RR", "RTV", "RTH", "ER", "ETV", "ETH"}
    assert len({tuple(curve.values()) for curve in SUITE.values()}) == 10


_GROWTH: dict[str, Callable[[float], float]] = {
    "C": lambda u: (1 - math.cos(math.pi * u)) / 2,
    "L": lambda u: u,
    "R": lambda u: 1 - (1 - u) / (0.1 + 0.9 * (1 - u)),
    "E": lambda u: 1 - math.exp(-4 * u),
}


@pytest.mark.parametrize("name", SUITE)
@pytest.mark.parametrize(("low", "high"), [(3, 8), (4, 6), (2, 32)])
def test_each_of_the_ten_follows_its_formula(name: str, low: int, high: int) -> None:
    """Every step is within half a bit of low + span · G(u), reflected in falling cycles as the name says."""
    schedule = Cyclic(low=low, high=high, cycles=4, total_steps=4 * 97, **SUITE[name])
    growth = _GROWTH[name[0]]

    def share(step: int) -> float:
        cycle, u = step // 97, step % 97 / 97
        if name[1] == "R" or cycle % 2:
            return growth(u)
        return growth(1 - u) if name.endswith("H") else 1 - growth(u)

    errors = [abs(schedule(step) - (low + (high - low) * share(step))) for step in range(4 * 97)]

    assert 0.4 < max(errors) <= 0.5 + 1e-9


@pytest.mark.parametrize("profile", ["cosine", "linear"])
@pytest.mark.parametrize("high", [4, 6, 8, 16, 21, 30])
@pytest.mark.parametrize("period", [10, 12, 21])
def test_symmetric_profiles_have_one_triangle(profile: Profile, high: int, period: int) -> None:
    """Cosine and linear reflect alike in both directions at every step, ties included."""
    vertical, horizontal = (
        Cyclic(low=3, high=high, cycles=2, total_steps=2 * period, profile=profile, shape=shape)
        for shape in ("triangular-vertical", "triangular-horizontal")
    )

    assert _sequence(vertical) == _sequence(horizontal)


@pytest.mark.parametrize("profile", ["rex", "exponential"])
def test_other_profiles_have_two_triangles(profile: Profile) -> None:
    """Rex and exponential fall in different ways, and grow in the same."""
    vertical, horizontal = (
        _sequence(Cyclic(low=3, high=8, cycles=2, total_steps=200, profile=profile, shape=shape))
        for shape in ("triangular-vertical", "triangular-horizontal")
    )

    assert vertical[:100] != horizontal[:100]
    assert vertical[100:] == horizontal[100:]


def test_each_authors_cosine_keeps_its_last_bit() -> None:
    """Two thirds into a cycle from 4 to 6 is 5.5 and decided by the last bit: CPT's code says 5, Wolfe's 6."""
    repeated = Cyclic(low=4, high=6, cycles=2, total_steps=600)
    triangular = dataclasses.replace(repeated, shape="triangular-vertical")

    assert (repeated(500), triangular(500)) == (5, 6)


@given(_cyclic())
def test_bits_stay_between_low_and_high(schedule: Cyclic) -> None:
    """No profile, shape or length leaves the bounds, and bits are Python ints."""
    bits = _sequence(schedule)

    assert schedule.low <= min(bits) <= max(bits) <= schedule.high
    assert {type(b) for b in bits} == {int}


@given(_cyclic())
def test_a_cycle_moves_in_one_direction(schedule: Cyclic) -> None:
    """Within a cycle bits only grow, or in the first and every other triangle only fall."""
    period, bits = schedule.period, _sequence(dataclasses.replace(schedule, final=None))
    cycles = [bits[cycle * period : (cycle + 1) * period] for cycle in range(schedule.cycles)]
    falls = [schedule.shape != "repeated" and cycle % 2 == 0 for cycle in range(schedule.cycles)]

    assert cycles == [sorted(cycle, reverse=fall) for cycle, fall in zip(cycles, falls, strict=True)]


@given(_cyclic())
def test_the_highest_bits_of_a_cyclic_schedule_are_taken(schedule: Cyclic) -> None:
    """`max_bits` is the maximum over all steps, also where short cycles stop short of `high`."""
    assert schedule.max_bits == max(_sequence(schedule))


def test_a_constant_never_ends() -> None:
    """It has its bits at any step, and no total."""
    schedule = Constant(bits=5)

    assert (schedule(0), schedule(10**9), schedule.max_bits, schedule.total_steps) == (5, 5, 5, None)


def test_pieces_start_where_they_say() -> None:
    """Bits change at the start of a piece, given as a step, in epochs or as a fraction of the run."""
    schedule = Piecewise(pieces=[(0, 4), ("2ep", 6), ("0.9", 8)], total_steps=100, steps_per_epoch=20)

    assert _sequence(schedule) == [4] * 40 + [6] * 50 + [8] * 10


def test_the_highest_piece_counts() -> None:
    """`max_bits` is that of any piece, not of the last."""
    assert Piecewise(pieces=[(0, 4), (10, 8), (20, 6)], total_steps=30).max_bits == 8


def test_changing_the_list_of_pieces_later_changes_nothing() -> None:
    """A schedule reads its pieces once."""
    pieces: list[tuple[int | str, int]] = [(0, 4), (5, 8)]
    schedule = Piecewise(pieces=pieces, total_steps=10)
    pieces.clear()

    assert _sequence(schedule) == [4] * 5 + [8] * 5


@pytest.mark.parametrize(
    ("start", "length", "window"),
    [(0, 3, range(3)), ("1ep", "0.5ep", range(4, 6)), ("0.5", "0.5", range(5, 10)), (2, 0, range(0))],
)
def test_a_deficit_is_low_in_its_window_only(start: int | str, length: int | str, window: range) -> None:
    """Inside the window are its bits, outside the schedule's at the same step."""
    inner = Cyclic(low=4, high=8, cycles=1, total_steps=10)
    schedule = Deficit(schedule=inner, bits=3, start=start, length=length, steps_per_epoch=4)

    assert _sequence(schedule) == [3 if step in window else inner(step) for step in range(10)]


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


def _replay(case: dict[str, Any]) -> tuple[Progressive, list[int], list[int], list[int]]:
    """The rule after a recorded trace: bits and gradient bits of each epoch, and the epochs that ended a stage."""
    rule = Progressive(
        bits=case["bits_schedule"],
        grad_bits=case["grad_bits_schedule"],
        threshold=case["initial_threshold"],
        decay=case["decay"],
    )
    bits, grad_bits, turns = [], [], []
    for epoch, loss in enumerate(case["trace"], start=1):
        bits.append(rule.current_bits)
        grad_bits.append(rule.current_grad_bits)
        if rule.update(loss):
            turns.append(epoch)
    return rule, bits, grad_bits, turns


def test_every_recorded_case_of_pfq_is_tested() -> None:
    """The tests below go through all 41 recorded cases, in each of which an epoch is one iteration."""
    cases = _json("pfq_stages.json")["cases"]

    assert len(cases) == 41
    assert all(case["eval_every"] == case["loader_len"] == 1 for case in cases)


@pytest.mark.parametrize("case", range(41))
def test_bits_are_those_of_the_authors_run(case: int) -> None:
    """The bits of every iteration equal those of the authors' training loop, forward and backward."""
    recorded = _json("pfq_stages.json")["cases"][case]

    _, bits, grad_bits, _ = _replay(recorded)

    assert (bits, grad_bits) == (recorded["bits"], recorded["grad_bits"])


@pytest.mark.parametrize("case", range(41))
def test_stages_turn_where_the_authors_turn(case: int) -> None:
    """`update` reports a new stage in exactly the recorded epochs."""
    recorded = _json("pfq_stages.json")["cases"][case]

    assert _replay(recorded)[3] == recorded["turning_epochs"]


@pytest.mark.parametrize("case", range(41))
def test_threshold_and_scale_end_as_the_authors(case: int) -> None:
    """The last threshold and scale equal the recorded ones to the last bit."""
    recorded = _json("pfq_stages.json")["cases"][case]

    rule = _replay(recorded)[0]

    assert (rule.threshold, rule.scale) == (recorded["final_threshold"], recorded["final_scale_loss"])


def _four_stages() -> Progressive:
    return Progressive(bits=[3, 4, 6, 8], grad_bits=[6, 6, 8, 8], threshold=0.05, decay=0.3)


def test_a_flat_loss_moves_on_every_five_epochs() -> None:
    """Each of the first three stages lasts five epochs, the last one for good."""
    rule = _four_stages()
    turns = [epoch for epoch in range(1, 41) if rule.update(1.0)]

    assert turns == [5, 10, 15]
    assert (rule.current_bits, rule.current_grad_bits) == (8, 8)


def test_the_third_switch_keeps_the_threshold() -> None:
    """The threshold shrinks after the first and the second switch only."""
    rule = _four_stages()
    seen = [rule.threshold for epoch in range(20) if rule.update(1.0)]

    assert seen == [0.05 * 0.3, 0.05 * 0.3 * 0.3, 0.05 * 0.3 * 0.3]


def test_a_rising_loss_never_moves_on() -> None:
    """A loss that moves by more than the threshold in five epochs is no plateau, whatever its direction."""
    rule = _four_stages()

    assert not any(rule.update(1 + 0.1 * epoch) for epoch in range(50))


def test_a_move_of_exactly_the_threshold_is_a_plateau() -> None:
    """Only a larger move refuses; all numbers here are exact in binary."""
    rule = Progressive(bits=[3, 8], grad_bits=[8, 8], threshold=0.25, decay=0.5)
    # The mean of 5, 5, 3, 3, 4 is 4, and every move to the last is at most 1 = 0.25 * 4.
    switched = [rule.update(loss) for loss in (5.0, 5.0, 3.0, 3.0, 4.0)]

    assert switched == [False, False, False, False, True]


def test_a_move_just_beyond_the_threshold_is_not() -> None:
    """The same losses with a threshold that is one float smaller are no plateau."""
    rule = Progressive(bits=[3, 8], grad_bits=[8, 8], threshold=math.nextafter(0.25, 0), decay=0.5)

    assert not any(rule.update(loss) for loss in (5.0, 5.0, 3.0, 3.0, 4.0))


def test_losses_of_zero_are_a_plateau_and_the_smallest_move_is_not() -> None:
    """Where the first losses are all 0 nothing is divided by them."""
    flat, moved = _four_stages(), _four_stages()
    for _ in range(10):
        moved.update(0.0)

    assert [flat.update(0.0) for _ in range(5)] == [False] * 4 + [True]
    assert not any(moved.update(loss) for loss in (0.0, 0.0, 0.0, 0.0, 1e-30))


def test_evaluation_can_know_the_bits_of_the_last_stage() -> None:
    """`max_bits` is that of the last stage from the beginning."""
    assert _four_stages().max_bits == 8


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_an_error(loss: float) -> None:
    """The message names epoch and loss, and nothing is remembered of it."""
    rule = _four_stages()
    rule.update(1.0)
    before = rule.state_dict()

    with pytest.raises(RunError, match=f"the loss of epoch 2 is {loss}: training diverged"):
        rule.update(loss)
    assert rule.state_dict() == before


def test_negative_losses_are_refused() -> None:
    """The rule divides by the mean of the first losses; a negative one would call every loss a plateau."""
    with pytest.raises(UsageError, match=re.escape("mean loss of the first epochs is -1.0")):
        _four_stages().update(-1.0)


@given(
    losses=st.lists(st.sampled_from([2.0, 2.0625, 1.9375, 1.5, 3.0]), min_size=1, max_size=40),
    cut=st.integers(0, 40),
)
def test_a_saved_rule_continues_identically(losses: list[float], cut: int) -> None:
    """N epochs give what k epochs, saving as JSON, loading and N - k epochs give, in the middle of a window too."""
    whole, first, second = _four_stages(), _four_stages(), _four_stages()
    uncut = [(whole.update(loss), whole.current_bits, whole.threshold, whole.scale) for loss in losses]

    for loss in losses[:cut]:
        first.update(loss)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = [(second.update(loss), second.current_bits, second.threshold, second.scale) for loss in losses[cut:]]

    assert rest == uncut[cut:]
    assert second.state_dict() == whole.state_dict()


def test_a_saved_state_is_a_copy() -> None:
    """What was saved does not change when the rule goes on."""
    rule = _four_stages()
    rule.update(2.0)
    saved = rule.state_dict()
    rule.update(3.0)

    assert saved == {"threshold": 0.05, "stage": 0, "epochs": 1, "first_losses": 2.0, "window": [2.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 2}, "stage 2 of a rule with 2 stages"),
        ({"extra": 1}, "state of a plateau rule has the unknown entry .extra"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    """Loading names what is wrong with a state."""
    state = {**_four_stages().state_dict(), **change}

    with pytest.raises(UsageError, match=message):
        _plateau().load_state_dict(state)


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


def test_a_template_becomes_the_schedule_of_a_run() -> None:
    """The length of the run is the only thing that a template lacks."""
    template = Template(kind="cyclic", settings=(("low", 3), ("high", 8), ("cycles", 4)))

    assert template.build(total_steps=40) == Cyclic(low=3, high=8, cycles=4, total_steps=40)
    assert template.replace(low=5).build(total_steps=40).max_bits == 8
    assert str(template) == "cyclic(low=3, high=8, cycles=4)"


def test_a_template_of_pieces_reads_epochs() -> None:
    """Epochs mean the run's own."""
    template = Template(kind="piecewise", settings=(("pieces", ((0, 4), ("2ep", 8))),))

    schedule = template.build(total_steps=40, steps_per_epoch=10)

    assert [schedule(step) for step in (19, 20)] == [4, 8]


def test_each_build_of_a_rule_is_new() -> None:
    """Two runs of one recipe share no state."""
    settings = {"bits": (3, 8), "grad_bits": (6, 8), "threshold": 9.0, "decay": 1.0}
    template = Template(kind="progressive", settings=tuple(settings.items()))
    first, second = (template.build(total_steps=40) for _ in range(2))
    assert isinstance(first, Progressive)
    assert isinstance(second, Progressive)
    for _ in range(5):
        first.update(1.0)

    assert (first.stage, second.stage) == (1, 0)


def test_low_from_a_range_test_is_not_known_yet() -> None:
    """Cycles whose lowest bits are to be found begin with the first width of the test; their highest are known."""
    schedule = RangeTested(schedule=Cyclic(low=2, high=8, cycles=2, total_steps=240))

    assert (schedule.max_bits, schedule.total_steps) == (8, 240)
    assert [schedule.at(step) for step in (0, 60, 239)] == [2, 2, 2]
    with pytest.raises(UsageError, match="low='range-test': bits are whole numbers"):
        Cyclic(low="range-test", high=8, cycles=2, total_steps=240)


def test_cycles_go_on_from_the_bits_that_the_test_found() -> None:
    """Once a width has made progress every step has the bits of cycles from there, and no loss is needed."""
    test = RangeTest(low=2, high=8, steps_per_bit=4)
    schedule = RangeTested(schedule=Cyclic(low=2, high=8, cycles=2, total_steps=100), test=test)
    seen = [schedule.follows]
    for loss in (2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0):
        schedule.update(loss)
    seen.append(schedule.follows)
    found = Cyclic(low=3, high=8, cycles=2, total_steps=100)

    assert [schedule.at(step) for step in range(100)] == _sequence(found)
    assert schedule.max_bits == found.max_bits
    assert seen == ["step", None]
    assert schedule.state_dict() == test.state_dict()


def test_a_template_finds_low_where_it_is_a_word() -> None:
    """``low = "range-test"`` builds cycles behind a range test with its settings; a number builds plain cycles."""
    template = Template(kind="cyclic", settings=(("low", "range-test"), ("high", 8), ("cycles", 2)))

    built = template.replace(range_test_steps=7, profile="rex").build(total_steps=200)
    plain = template.replace(low=4).build(total_steps=200)

    assert isinstance(built, RangeTested)
    assert (built.test.low, built.test.steps_per_bit, built.test.threshold) == (2, 7, 0.01)
    assert built.schedule == Cyclic(low=2, high=8, cycles=2, total_steps=200, profile="rex")
    assert plain == Cyclic(low=4, high=8, cycles=2, total_steps=200)


def test_a_setting_of_the_range_test_goes_with_low_from_it() -> None:
    """The message names both settings and what was given."""
    template = Template(kind="cyclic", settings=(("low", 3), ("high", 8), ("cycles", 2)))

    with pytest.raises(UsageError, match="range_test_steps=7 goes with low='range-test', and low is 3"):
        template.replace(range_test_steps=7)


@pytest.mark.parametrize(
    "source",
    [
        Constant(bits=8),
        Piecewise(pieces=[(0, 8)], total_steps=9),
        Cyclic(low=3, high=8, cycles=2, total_steps=9),
        Deficit(schedule=Constant(bits=8), bits=3, start=0, length=4),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_pure_schedule_sees_no_loss(source: Source) -> None:
    """`update` changes nothing, no state is remembered, and bits are those of a call."""
    before = [source.at(step) for step in range(9)]

    assert (source.follows, source.update(0.5), source.state_dict()) == (None, False, {})
    source.load_state_dict({})
    assert [source.at(step) for step in range(9)] == before == [source(step) for step in range(9)]
    with pytest.raises(UsageError, match="unknown entry"):
        source.load_state_dict({"stage": 1})


@pytest.mark.parametrize("makers", KINDS.values(), ids=KINDS)
def test_every_setting_says_what_it_is(makers: tuple[Callable[..., Source], ...]) -> None:
    """Each argument of what makes the schedules of a kind has a type and a text, which the command line shows."""
    settings = [setting for make in makers for setting in settings_of(make).values()]

    assert [s.name for s in settings if not s.text or s.hint is Any] == []
    assert settings


@pytest.mark.parametrize(("stages", "message"), [(0, "stages=0"), (True, "stages=True")])
def test_a_plateau_rule_has_a_stage(stages: int, message: str) -> None:
    """The number of stages is a whole number."""
    with pytest.raises(UsageError, match=message):
        PlateauRule(stages=stages, threshold=0.1, decay=1)
