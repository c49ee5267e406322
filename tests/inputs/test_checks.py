"""Checks against annotations: what fits, and what a message says."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lowbit import UsageError
from lowbit.errors import shown
from lowbit.inputs.checks import check_fields, check_keys, check_type, check_whole, checked, fits, in_words, is_finite
from lowbit.schedules import Constant, Schedule


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3, 2**64], [True, 1.0, "1", None, 10**5000, [1], torch.tensor(1)]),
        (float, [0, 1.5, math.inf, math.nan], [True, "1", None, 1j, 10**5000, torch.tensor(1.0)]),
        (bool, [True, False], [0, 1, None, "yes"]),
        (str, ["", "x"], [b"x", 3, None, ["x"]]),
        (None, [None], [0, "", False]),
        (int | None, [None, 3], [True, "x"]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0, None, [], torch.zeros(2)]),
        (tuple[int, int], [(1, 2)], [(1,), [1, 2], (1, "x"), (True, 2)]),
        (tuple[int, ...], [(), (1, 2, 3)], [[1], (1, None)]),
        (Sequence[str], [[], ["x"], ("x", "y")], ["xy", [3], {"x"}, None]),
        (Iterable[int], [[], iter([1]), {1}], [3, None]),
        (Mapping[str, int], [{}, {"x": 1}], [{"x": True}, {1: 1}, [], None]),
        (Callable[[int], int], [abs, nn.Linear, lambda x: x], [3, None, "abs"]),
        (nn.Module, [nn.ReLU()], [nn.ReLU, None, "x"]),
        (type[nn.Module], [nn.Linear], [nn.ReLU(), None]),
        (Tensor, [torch.zeros(2)], [[0.0], 3, None]),
        (Path | str, ["x", Path("x")], [3, None]),
        (re.Pattern[str], [re.compile("x")], ["x", None]),
        (Schedule, [Constant(bits=4)], [4, None]),
        (Any, [None, 3, object()], []),
    ],
    ids=lambda given: "" if isinstance(given, list) else str(given),
)
def test_what_fits_an_annotation(hint: Any, good: list[Any], bad: list[Any]) -> None:
    """Each value that an annotation allows fits, each that it does not is a UsageError that names the argument."""
    assert [value for value in good if not fits(value, hint)] == []
    assert [type(value) for value in bad if fits(value, hint)] == []
    for value in bad:
        with pytest.raises(UsageError, match=r"^width="):
            check_type("width", value, hint)


def test_a_generator_is_not_consumed() -> None:
    """What can be read once is left to who reads it."""
    values = iter([1, 2])

    assert fits(values, Iterable[int])
    assert list(values) == [1, 2]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number or None"),
        (Literal["a", "b"], "'a' or 'b'"),
        (Sequence[float], "a list, each element a number"),
        (tuple[int, int], "a tuple (a whole number, a whole number)"),
        (dict[str, Any], "a dict"),
        (Callable[[], None], "a function"),
        (nn.Module, "a torch.nn.Module"),
        (Iterable[Any], "a list"),
    ],
    ids=lambda given: "" if isinstance(given, list) else str(given),
)
def test_an_annotation_in_words(hint: Any, words: str) -> None:
    """A message says in English what is allowed."""
    assert in_words(hint) == words


def test_a_value_is_shown_in_one_short_line() -> None:
    """However long, broken or tall a value is, a message stays readable."""

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    values = ["x" * 999, [1] * 999, "a\nb", torch.zeros(99, 99), 10**5000, [10**5000], Broken(), [Broken()]]

    assert all(len(shown(value)) <= 80 and "\n" not in shown(value) for value in values)
    assert shown(3) == "3"
    assert shown(torch.zeros(2)) == "a Tensor"


@dataclass(frozen=True)
class Record:
    """A record that checks itself."""

    width: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


def test_a_dataclass_checks_its_fields() -> None:
    """The field that is wrong is named, and a right one passes."""
    assert Record(3, ("x",)).width == 3
    with pytest.raises(UsageError, match="names=3: give a tuple, each element a text"):
        Record(3, 3)  # a wrong type on purpose


def test_a_function_checks_its_arguments() -> None:
    """Arguments by place, by name and left out; a missing one is Python's own TypeError."""

    @checked
    def area(width: int, height: float = 1.0, *rest: int, unit: str | None = None) -> float:
        """A docstring."""
        return width * height + sum(rest) + len(unit or "m") - 1

    assert area(3) == 3
    assert area(3, 2.0, 1, unit="m") == 7
    assert area.__doc__ == "A docstring."
    with pytest.raises(UsageError, match="height='2': give a number"):
        area(3, "2")
    with pytest.raises(UsageError, match="unit=3: give a text or None"):
        area(3, unit=3)
    with pytest.raises(TypeError, match=r"area\(\) missing .*'width'"):
        area()


def test_keys_are_all_there_and_no_others() -> None:
    """What is missing and what is unknown is named, and what is no mapping too."""
    check_keys("it", {"a": 1, "b": 2}, ["a", "b"])
    for given, said in (({"a": 1}, "it lacks b"), ({"a": 1, "b": 2, 3: 4}, "unknown entry 3"), ([], r"it is \[\]")):
        with pytest.raises(UsageError, match=said):
            check_keys("it", given, ["a", "b"])


def test_a_whole_number_in_its_range() -> None:
    """Both ends count."""
    assert [check_whole("n", n, 0, 3) for n in (0, 3)] == [0, 3]
    for n in (-1, 4, True, 1.0, None):
        with pytest.raises(UsageError, match=r"n=.*: give a whole number from 0 to 3"):
            check_whole("n", n, 0, 3)


def test_a_finite_number() -> None:
    """Neither nan nor inf, True or a number too large for a float."""
    assert all(map(is_finite, (0, -1.5, 3)))
    assert not any(map(is_finite, (math.nan, math.inf, True, None, 10**5000)))
