"""The commands of the command line, and the parser of each, made of what its file says."""

from collections.abc import Callable
from typing import Any, Protocol

from lowbit.cli import bench, compare, cost, export, inspect, range_test, recipes, report, resume, sweep, train
from lowbit.cli.flags import Parser


class Command(Protocol):
    """What the file of a command has. It imports where it uses: help must not wait for torch."""

    DESCRIPTION: str
    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: Any) -> None:
        """Give the command's own parser, a `Parser`, its arguments."""

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

GROUPS = {
    "look": ("recipes", "inspect", "cost", "bench"),
    "train": ("train", "resume", "sweep", "range-test"),
    "use": ("compare", "report", "export"),
}
"""The commands by what they are for; one that is in none comes last."""


def parser_of(name: str) -> Parser:
    """The parser of one command, with its arguments."""
    command = COMMANDS[name]
    parser = Parser(prog=f"lowbit {name}", description=command.DESCRIPTION, example=command.EXAMPLE)
    command.add_arguments(parser)
    return parser


def overview() -> str:
    """The help of the whole: one line for each command."""
    others = tuple(name for name in COMMANDS if not any(name in names for names in GROUPS.values()))
    lines = [
        "usage: lowbit COMMAND [FLAGS]",
        "",
        "Train neural networks in few bits.",
        "",
        "Example: lowbit train --model mlp --data digits --recipe int8",
    ]
    for title, names in {**GROUPS, "more": others}.items():
        if names:
            lines += ["", f"{title}:", *(f"  {name:<12}{COMMANDS[name].HELP}" for name in names)]
    lines += [
        "",
        "`lowbit COMMAND --help` shows its flags, `lowbit --version` the version,",
        "`lowbit --print-completion bash|zsh|tcsh` a script for completion by the shell.",
    ]
    return "\n".join(lines)
