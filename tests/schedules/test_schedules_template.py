"""The one interface of sources, templates of schedules, and cycles behind a range test."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers import sequence
from lowbit.errors import UsageError
from lowbit.inputs.signatures import settings_of
from lowbit.schedules import (
    KINDS,
    Constant,
    Cyclic,
    Deficit,
    Piecewise,
    Progressive,
    RangeTest,
    RangeTested,
    Source,
    Template,
)


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

    assert [schedule.at(step) for step in range(100)] == sequence(found)
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
    ("settings", "message"),
    [
        ({"low": "range"}, "low='range': give a whole number or 'range-test'"),
        ({"low": "range-test", "range_test_steps": 7.5}, "range_test_steps=7.5: give a whole number or None"),
        ({"low": "range-test", "high": "8"}, "high='8': give a whole number"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    """The types tell what makes the schedule, so a wrong one is named before anything is made."""
    template = Template(kind="cyclic", settings=(("low", 3), ("high", 8), ("cycles", 2)))

    with pytest.raises(UsageError, match=message):
        template.replace(**settings)


def test_a_setting_given_twice_is_refused() -> None:
    """Neither of two values of one setting wins in silence."""
    with pytest.raises(UsageError, match="give bits twice"):
        Template(kind="constant", settings=(("bits", 4), ("bits", 8)))


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


def test_a_class_comes_before_the_functions_in_its_place() -> None:
    """Two files make cyclic schedules, and the class is asked first, whatever the order of the files."""
    assert [make.__name__ for make in KINDS["cyclic"]] == ["Cyclic", "range_tested"]
