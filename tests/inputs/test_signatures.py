"""Settings read off a class: names, types, defaults and texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lowbit.inputs.signatures import Setting, settings_of


@dataclass(frozen=True, kw_only=True)
class Stairs:
    """Stairs.

    Args:
        tread: depth of a step,
            in metres: not 0.
        rails: how many.

    Raises:
        ValueError: never: this line is not a setting.
    """

    tread: float
    rails: int | None = None


class Ladder:
    """A ladder.

    Args:
        rungs: heights of its rungs.
    """

    def __init__(self, *, rungs: Sequence[int], **rest: Any) -> None:
        self.rungs, self.rest = rungs, rest


def climb(*, tread: float, speed: int = 2) -> float:
    """Climb; it says nothing of its arguments."""
    return tread * speed


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            Stairs,
            [("tread", float, True, "depth of a step, in metres: not 0."), ("rails", int | None, False, "how many.")],
        ),
        (Ladder, [("rungs", Sequence[int], True, "heights of its rungs.")]),
        (climb, [("tread", float, True, ""), ("speed", int, False, "")]),
    ],
)
def test_settings_are_those_of_the_signature(make: Callable[..., Any], expected: list[Any]) -> None:
    """A dataclass, a class and a function give name, type, whether it is needed, and the docstring's text, in order."""
    assert [(s.name, s.hint, s.is_needed, s.text) for s in settings_of(make).values()] == expected


def test_a_setting_that_two_classes_have_allows_what_either_does() -> None:
    """Types and texts are joined; the default is that of the first."""
    first = Setting(name="low", hint=int, default=3, text="a number.")
    second = Setting(name="low", hint=str, default="x", text="a word.")

    assert first.merged(second) == Setting(name="low", hint=int | str, default=3, text="a number. a word.")
    assert first.merged(first) == first
