"""The parser of the command line, made of what the file of each command says."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Protocol

from lowbit.cli import bench, compare, cost, export, inspect, range_test, recipes, report, resume, sweep, train


class Command(Protocol):
    """What the file of a command has. It imports libraries where it uses them: help must not wait for Lightning."""

    DESCRIPTION: str
    HELP: str

    def add_arguments(self, parser: Any) -> None:
        """Give the command's own parser its arguments."""

    @property
    def run(self) -> Callable[..., None]:
        """Run the command with its arguments by name."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "resume": resume,
    "sweep": sweep,
    "range-test": range_test,
    "inspect": inspect,
    "cost": cost,
    "compare": compare,
    "report": report,
    "export": export,
    "bench": bench,
    "recipes": recipes,
}
"""The file of each command, in the order of the help."""


def make_parser() -> Any:
    """The parser of all commands; the arguments of each are in a namespace of its name."""
    from jsonargparse import ArgumentParser

    def parser(**names: Any) -> ArgumentParser:
        return ArgumentParser(**names, exit_on_error=False, allow_abbrev=False, default_env=False)

    whole = parser(prog="lowbit", description="Train neural networks in few bits.", version=version("lowbit"))
    commands = whole.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = parser(description=command.DESCRIPTION)
        command.add_arguments(own)
        commands.add_subcommand(name, own, help=command.HELP)
    return whole
