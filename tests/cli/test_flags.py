"""The flags of commands, made of dataclasses: words as values, files, help in groups, suggestions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lowbit.cli.flags import Parser
from lowbit.cli.values import reader
from lowbit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings.

    Args:
        name: what it is called. It may be long.
        rate: how fast. Default: 0.5 for most.
        mode: how.
        widths: which, e.g. ``[3, 4]``.
        all_of_it: whether to do all.
    """

    name: str
    rate: float | None = None
    mode: Literal["fast", "slow"] = "fast"
    widths: list[int] | int | None = None
    all_of_it: bool = False


def parser() -> Parser:
    """A parser of these settings, two of them common."""
    made = Parser(prog="lowbit try", description="Try it.", example="lowbit try --name x")
    made.add_argument("--config", action="config")
    made.add_class_arguments(Settings, {"what": ("name", "rate")}, rest="further")
    return made


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("3", float | None, 3.0),
        ("null", float | None, None),
        ("none", Literal["none", "bf16"], "none"),
        ("true", bool, True),
        ("8", list[int] | int, 8),
        ("[3, 4]", list[int] | int, [3, 4]),
        ("3,4", list[int], [3, 4]),
        ('[[0, 4], ["0.9", 8]]', list[list[int | str]], [[0, 4], ["0.9", 8]]),
        ("[3,6],[8,8]", list[list[int]], [[3, 6], [8, 8]]),
        ("10ep", int | str, "10ep"),
        ("runs/a", Path | None, Path("runs/a")),
    ],
)
def test_a_word_becomes_a_value_of_the_annotation(text: str, hint: Any, value: object) -> None:
    """Numbers, words, lists with or without brackets and paths are read as the annotation says, text last."""
    found = reader(hint)(text)

    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "hint", "words"),
    [
        ("x", int, "expected int, got x"),
        ("1.5", int | None, "expected int, got 1.5"),
        ("1_0", float, "expected float"),
        ("x", Literal["fast", "slow"] | None, "expected one of 'fast', 'slow', got x"),
        ("[3,x]", list[int], "expected a list such as [4,8], got [3,x]"),
        ("9" * 5000, int, "got 999"),
    ],
)
def test_a_word_of_another_type_is_refused(text: str, hint: Any, words: str) -> None:
    """The message says what is allowed and repeats what was given, shortened."""
    with pytest.raises(ValueError, match=r"^expected") as caught:
        reader(hint)(text)

    assert words in str(caught.value)
    assert len(str(caught.value)) < 150


def test_flags_are_written_with_dashes_or_underscores() -> None:
    """Both forms of a flag mean the same, a switch stands alone, and defaults are those of the class."""
    for flag in ("--all-of-it", "--all_of_it"):
        found = parser().read(["--name", "x", flag, "--widths=3,4"])
        assert found["all_of_it"] is True
    assert (found["name"], found["rate"], found["mode"], found["widths"]) == ("x", None, "fast", [3, 4])


def test_a_file_stands_where_its_flag_stands(tmp_path: Path) -> None:
    """What comes later wins; YAML's text for a number is a number."""
    file = tmp_path / "settings.yaml"
    file.write_text("name: of-file\nrate: 1e-3\n")

    before = parser().read(["--rate", "2", "--config", str(file)])
    after = parser().read(["--config", str(file), "--rate", "2"])

    assert (before["name"], before["rate"], after["rate"]) == ("of-file", 1e-3, 2.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "missing: --name"),
        (["--name", "x", "--rat", "3"], "unknown flag --rat. Did you mean --rate? `lowbit try --help` lists"),
        (["--name", "x", "y"], "'y' is one argument too many"),
        (["--name"], "--name: expected one argument"),
        (["--name", "x", "--mode", "fats"], "--mode: expected one of 'fast', 'slow', got fats"),
        (["--config", "/no/such"], "/no/such"),
    ],
)
def test_what_is_wrong_is_said_in_words(argv: list[str], words: str) -> None:
    """An unknown flag is answered with the nearest, a lacking one is named."""
    with pytest.raises(UsageError) as caught:
        parser().read(argv)

    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["rat: 3\n", "a: [", "- 3\n", "mode: fats\n", "\0"])
def test_a_wrong_file_is_named(text: str, tmp_path: Path) -> None:
    """An unknown setting, a wrong value and no YAML are errors that begin with the path."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)

    with pytest.raises(UsageError, match=str(file)):
        parser().read(["--config", str(file)])


def test_help_begins_with_an_example_and_hides_the_rarer_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` has the first sentence of common settings, ``--help-all`` every word of every setting."""
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parser().read([flag])
        texts.append(capsys.readouterr().out)

    brief, full = texts
    assert brief.index("lowbit try --name x") < brief.index("what:") < brief.index("--name NAME")
    assert "--mode" not in brief
    assert "It may be long" not in brief
    assert "Default: 0.5 for most" in brief
    assert "It may be long" in full
    assert "--mode" in full
    assert "(default: fast; or slow)" in full


def test_a_flag_that_was_renamed_names_its_new_name() -> None:
    """The old name is an error, with or without a value, that says the new one."""
    made = parser()
    made.rename("--speed", "--rate", "it is a rate")

    with pytest.raises(UsageError, match="--speed of lowbit try is --rate now: it is a rate"):
        made.read(["--name", "x", "--speed", "3"])
