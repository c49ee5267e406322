"""Fields of dataclasses from texts."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lowbit.errors import UsageError
from lowbit.inputs import settings


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Settings inside others."""

    low: float = 1.0
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A field of each kind."""

    count: int = 1
    rate: float = 0.5
    on: bool = False
    name: str = "a"
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = dataclasses.field(default_factory=Inner)
    hidden: int = dataclasses.field(default=7, init=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=3", Outer(count=3)),
        ("count=-3", Outer(count=-3)),
        ("rate=5e8", Outer(rate=5e8)),
        ("rate=2", Outer(rate=2)),
        ("on=true", Outer(on=True)),
        ("on=True", Outer(on=True)),
        ("name=b=c", Outer(name="b=c")),
        ("name=8", Outer(name="8")),
        ("name=", Outer(name="")),
        ("mode=slow", Outer(mode="slow")),
        ("sizes=(3, 4)", Outer(sizes=(3, 4))),
        ("inner.low=2.5", Outer(inner=Inner(low=2.5))),
        ("inner.high=none", Outer(inner=Inner(high=None))),
    ],
)
def test_a_text_becomes_a_field(text: str, expected: Outer) -> None:
    """A value is read as the field's annotation says."""
    assert settings.make(Outer, [text]) == expected


def test_every_field_that_can_be_given_is_a_setting() -> None:
    """The names follow from the class, inner fields with a dot."""
    names = ["count", "rate", "on", "name", "mode", "sizes", "inner.low", "inner.high"]

    assert settings.names(Outer) == names
    assert settings.names(int) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["counts=3"], r"unknown setting of Outer 'counts'\. Did you mean 'count'\? Known: .*inner\.low"),
        (["hidden=3"], r"unknown setting of Outer 'hidden'"),
        (["inner=3"], r"unknown setting of Outer 'inner'"),
        (["count"], r"setting 'count': write NAME=VALUE with one of count, rate"),
        (["count=x"], r"count='x': give a whole number"),
        (["count=1.5"], r"count=1.5: give a whole number"),
        (["count=true"], r"count=True: give a whole number"),
        (["on=1"], r"on=1: give True or False"),
        (["mode=quick"], r"unknown mode 'quick'.*fast, slow"),
        (["inner.low=nothing"], r"inner\.low='nothing': give a number"),
        (["count=" + "9" * 5000], r"count=.*give a whole number"),
        (["count=" + "(" * 500], r"count=.*give a whole number"),
        (["count=3", "count=4"], r"count is given twice, as '3' and '4'"),
    ],
)
def test_a_wrong_setting_is_named(given: list[str], message: str) -> None:
    """The message has the name, what was given and what is allowed."""
    with pytest.raises(UsageError, match=message):
        settings.make(Outer, given)


def test_a_field_without_default_must_be_given() -> None:
    """A missing setting is named by its whole path, and given it makes the object."""
    needs = dataclasses.make_dataclass("Needs", [("rows", int)])
    around: Any = dataclasses.make_dataclass("Around", [("inner", needs), ("x", int, 1)])

    with pytest.raises(UsageError, match=r"Needs needs inner\.rows: give each"):
        settings.make(around, [])
    assert settings.make(around, ["inner.rows=2"]) == around(needs(2))


def test_an_inner_object_is_made_where_it_is_required() -> None:
    """A required dataclass of which nothing is given has all its defaults."""
    around: Any = dataclasses.make_dataclass("Around", [("inner", Inner)])

    assert settings.make(around, []) == around(Inner())


def test_a_tuple_of_dataclasses_is_not_an_inner_one() -> None:
    """Only a field that is a dataclass itself, or may be one, has settings behind a dot."""
    several = dataclasses.make_dataclass("Several", [("all", tuple[Inner, ...], ()), ("maybe", Inner | None, None)])

    assert settings.names(several) == ["all", "maybe.low", "maybe.high"]
