"""The help of the commands: an example first, on at most two screens, and without torch for the whole."""

import contextlib
import shlex

import pytest

from lowbit.cli import main as cli
from lowbit.cli.parser import COMMANDS, GROUPS, parser_of

TWO_SCREENS = 64  # lines


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At 80 columns no line is longer, the example comes before the flags, and what is rare is left out."""
    monkeypatch.setenv("COLUMNS", "80")

    assert cli.main([name, "--help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= TWO_SCREENS
    assert max(map(len, lines)) <= 80
    assert lines.index("Example:") < 8


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_is_understood(name: str) -> None:
    """The parser takes the command line that the help shows first."""
    program, command, *argv = shlex.split(COMMANDS[name].EXAMPLE)

    with contextlib.suppress(SystemExit):
        parser_of(command).read(argv)
    assert (program, command) == ("lowbit", name)


@pytest.mark.parametrize(
    ("name", "usage"), [("cost", "cost [RUN]"), ("recipes", "recipes [NAME]"), ("resume", "resume RUN")]
)
def test_usage_says_what_may_be_left_out(name: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What need not be given stands in brackets."""
    cli.main([name, "--help"])

    assert f"usage: lowbit {usage} [FLAGS]\n" in capsys.readouterr().out


def test_every_command_has_a_group() -> None:
    """The overview lists each command once, under what it is for."""
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "hint"), [(["trian"], "'train'"), (["--halp"], "'--help'"), (["train", "--epoch", "3"], "--epochs")]
)
def test_what_is_unknown_is_answered_with_the_nearest(
    argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands and flags have a "did you mean"."""
    assert cli.main(argv) == 2

    assert f"Did you mean {hint}?" in capsys.readouterr().err
