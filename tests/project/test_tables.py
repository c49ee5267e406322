import json
import math

import pytest

from lowbit.tables import json_line, json_text, text_table


def test_words_stand_left_and_numbers_right() -> None:
    """A table looks like this."""
    table = text_table(["layer", "MACs"], [["stem", "1,024"], ["a.longer.name", "7"]])

    assert table.split("\n") == [
        "layer           MACs",
        "-------------  -----",
        "stem           1,024",
        "a.longer.name      7",
    ]


@pytest.mark.parametrize("number", ["-3.5", "1e-05", "inf", "nan", "×2", "93.1%", "∞"])
def test_these_are_numbers(number: str) -> None:
    """Signs, exponents, infinities and percentages stand to the right."""
    line = text_table(["a wide title"], [[number]]).split("\n")[-1]

    assert line == number.rjust(len("a wide title"))


def test_one_word_makes_a_column_of_words() -> None:
    """A column with one cell that is no number stands to the left throughout."""
    lines = text_table(["value"], [["1"], ["skipped"]]).split("\n")

    assert lines[2:] == ["1", "skipped"]


def test_a_table_without_rows_is_its_header() -> None:
    """No rows give the titles and the line under them."""
    assert text_table(["name", "n"], []) == "name  n\n----  -"


def test_no_line_ends_in_blanks() -> None:
    """The last column is not padded."""
    table = text_table(["a", "title"], [["1", "x"], ["2", ""]])

    assert all(line == line.rstrip() for line in table.split("\n"))


def test_a_row_that_is_too_long_is_an_error() -> None:
    """A cell without a title is not dropped in silence."""
    with pytest.raises(ValueError, match="zip"):
        text_table(["a"], [["1", "2"]])


def test_json_has_null_for_what_is_not_finite() -> None:
    """Strict JSON: an inf or nan at any depth becomes null, and everything else comes back as it was."""
    data = {"a": math.inf, "b": [1, -math.inf, {"c": math.nan}], "d": (True, "nan", None, 0.1)}

    read = json.loads(json_text(data), parse_constant=pytest.fail)

    assert read == {"a": None, "b": [1, None, {"c": None}], "d": [True, "nan", None, 0.1]}


def test_a_line_of_json_is_short_and_strict() -> None:
    """A record of a file of lines has no blanks, keeps its order, and null for what is not a number."""
    assert json_line({"b": math.nan, "a": (1, 2.5)}) == '{"b":null,"a":[1,2.5]}'
