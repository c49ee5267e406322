"""Cyclic precision: CPT's recorded runs, the ten of Wolfe and Kyrillidis, and what all cycles have in common."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import Vectors, recorded, sequence
from lowbit.schedules import (
    SUITE,
    Cyclic,
    Profile,
    Shape,
    bit_operations,
    saving,
)

VECTORS = "dynamic/cpt_bits.npz"


def _cpt(case: dict[str, Any], key: str) -> Cyclic:
    low, high = case[key]
    return Cyclic(low=low, high=high, cycles=case["num_cycles"], total_steps=case["total_iters"])


def test_every_recorded_case_of_cpt_is_tested() -> None:
    """The tests below go through all 17 recorded cases."""
    assert [case["id"] for case in recorded("cpt_bits.json")["configs"]] == list(range(17))


@pytest.mark.parametrize("case", range(17))
@pytest.mark.parametrize(("key", "array"), [("bits", "bits"), ("grad_bits", "gbits")])
def test_the_default_is_cptssequence(vectors: Vectors, case: int, key: str, array: str) -> None:
    """The bits of every step equal those of the authors' code, forward and backward."""
    schedule = _cpt(recorded("cpt_bits.json")["configs"][case], key)

    assert sequence(schedule) == vectors[f"{array}_{case:02d}"].tolist()


@pytest.mark.parametrize("case", range(17))
def test_bit_operations_are_those_of_cpts_log(case: int) -> None:
    """The mean of b² + 2 b g over 3 · 32² is the ratio that the authors' code logs, gradients in cycles too."""
    config = recorded("cpt_bits.json")["configs"][case]

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

    assert sequence(with_end)[:kept] == sequence(without)[:kept]


def test_final_high_replaces_the_leftover_cycle() -> None:
    """Of 100 steps in 7 cycles of 14 the last two begin another cycle, or are at the highest bits."""
    schedule = Cyclic(low=3, high=8, cycles=7, total_steps=100)

    assert sequence(schedule)[98:] == [3, 3]
    assert sequence(dataclasses.replace(schedule, final="high"))[98:] == [8, 8]


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

    assert sequence(vertical) == sequence(horizontal)


@pytest.mark.parametrize("profile", ["rex", "exponential"])
def test_other_profiles_have_two_triangles(profile: Profile) -> None:
    """Rex and exponential fall in different ways, and grow in the same."""
    vertical, horizontal = (
        sequence(Cyclic(low=3, high=8, cycles=2, total_steps=200, profile=profile, shape=shape))
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
    bits = sequence(schedule)

    assert schedule.low <= min(bits) <= max(bits) <= schedule.high
    assert {type(b) for b in bits} == {int}


@given(_cyclic())
def test_a_cycle_moves_in_one_direction(schedule: Cyclic) -> None:
    """Within a cycle bits only grow, or in the first and every other triangle only fall."""
    period, bits = schedule.period, sequence(dataclasses.replace(schedule, final=None))
    cycles = [bits[cycle * period : (cycle + 1) * period] for cycle in range(schedule.cycles)]
    falls = [schedule.shape != "repeated" and cycle % 2 == 0 for cycle in range(schedule.cycles)]

    assert cycles == [sorted(cycle, reverse=fall) for cycle, fall in zip(cycles, falls, strict=True)]


@given(_cyclic())
def test_the_highest_bits_of_a_cyclic_schedule_are_taken(schedule: Cyclic) -> None:
    """`max_bits` is the maximum over all steps, also where short cycles stop short of `high`."""
    assert schedule.max_bits == max(sequence(schedule))
