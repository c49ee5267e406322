import pytest

from lowbit.errors import RunError, UsageError, unknown


def test_a_usage_error_is_a_value_error() -> None:
    """Who catches ValueError catches a UsageError, but not a RunError."""
    assert issubclass(UsageError, ValueError)
    assert not issubclass(RunError, ValueError)


def test_a_run_error_is_a_runtime_error() -> None:
    """Who catches RuntimeError catches a RunError, but not a UsageError."""
    assert issubclass(RunError, RuntimeError)
    assert not issubclass(UsageError, RuntimeError)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    """The message names what was given, the nearest legal name and all legal names in order."""
    error = unknown("colour", "gren", ["red", "green", "blue"])

    assert isinstance(error, UsageError)
    assert str(error) == "unknown colour 'gren'. Did you mean 'green'? Known: blue, green, red."


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    """Nothing is suggested where nothing is near."""
    assert str(unknown("colour", "xyz", ["red", "green"])) == "unknown colour 'xyz'. Known: green, red."


@pytest.mark.parametrize("given", [None, 3, "", ["red"]])
def test_anything_can_be_given(given: object) -> None:
    """What is no string is reported as it is written in Python."""
    assert repr(given) in str(unknown("colour", given, ["red"]))


def test_legal_names_may_come_from_an_iterator() -> None:
    """The legal names are read once."""
    assert "Did you mean 'red'? Known: blue, red." in str(unknown("colour", "rad", iter(["red", "blue"])))
