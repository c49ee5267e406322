"""Completion of commands, flags and values by the shell, as a script that shtab writes from the parsers."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.cli.flags import Parser, words_of
from lowbit.cli.parser import COMMANDS, parser_of
from lowbit.errors import UsageError, unknown

SHELLS = ("bash", "zsh", "tcsh")


def script(arguments: Sequence[str]) -> str:
    """The script for the shell that the arguments name.

    Raises:
        UsageError: they are not the name of one shell.
        ModuleNotFoundError: shtab is not installed.
    """
    if len(arguments) != 1:
        raise UsageError(f"--print-completion needs the name of a shell: {', '.join(SHELLS)}.")
    if arguments[0] not in SHELLS:
        raise unknown("shell", arguments[0], SHELLS)
    import shtab

    names = _names()
    root = argparse.ArgumentParser(prog="lowbit")
    root.add_argument("--version", action="version", help="show the version")
    root.add_argument("--print-completion", choices=SHELLS, help="print a script for completion by the shell")
    commands: Any = root.add_subparsers(parser_class=Parser)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.HELP)
        commands.choices[name] = parser = parser_of(name)
        for action in parser._actions:
            action.help = _first_line(action.help)
            if words := names.get(action.dest) or words_of(parser, action):
                action.choices = words
            elif Path in (action.type, *_members(parser, action)):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own attribute
    return str(shtab.complete(root, arguments[0]))


def _names() -> dict[str, Sequence[str]]:
    """What there is to choose from, by the name of the flag; a placeholder in a name, in capitals, is no word."""
    from lowbit.engines.choice import ENGINES
    from lowbit.methods.recipe import recipes
    from lowbit.train import bench, data, models

    known = [name for name in recipes() if name != "wXaYgZ"]
    return {
        "recipe": known,
        "recipes": known,
        "model": [name for name in models.names() if ":" not in name],
        "data": [name for name in data.names() if ":" not in name],
        "engine": ("auto", *ENGINES),
        "hardware": ("bitfusion",),
        "works": tuple(bench.WORKS),
    }


def _members(parser: Parser, action: argparse.Action) -> tuple[Any, ...]:
    setting = parser.settings.get(action.dest)
    return () if setting is None else (setting.hint, *getattr(setting.hint, "__args__", ()))


def _first_line(text: str | None) -> str | None:
    """A help in a few words, without what a shell's script would have to quote."""
    return text if text in (None, argparse.SUPPRESS) else text.split(";")[0].split(". ")[0]
