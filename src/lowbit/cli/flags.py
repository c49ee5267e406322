"""The flags of a command: what argparse lacks.

Flags are made of the fields of a dataclass, so that name, type, default and meaning are written once. Help comes in
groups, with an example first, and the rarer groups under ``--help-all``. What is wrong is a `UsageError` with the
nearest flag.
"""

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.cli.values import choices, from_yaml, is_switch, reader
from lowbit.errors import RunError, UsageError, shown, unknown
from lowbit.inputs.signatures import Setting, settings_of

_WIDEST = 100  # columns of help
_COLUMN = 28  # where the text of a flag begins, at most
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


class Parser(argparse.ArgumentParser):
    """The parser of one command; a flag may be written ``--batch-size`` or ``--batch_size``.

    Args:
        prog: how the command is called.
        description: what it does, in a sentence.
        example: a command line that works, or "".
    """

    def __init__(self, *, prog: str, description: str = "", example: str = "") -> None:
        super().__init__(prog=prog, description=description, add_help=False, allow_abbrev=False)
        self.example = example
        self.settings: dict[str, Setting] = {}
        self.rare: set[str] = set()  # groups that only --help-all shows
        self.brief: dict[str, str] = {}  # what --help says of a flag, where --help-all says more
        for hint in (int, float, Path):
            self.register("type", hint, _reading(hint))
        self.register("action", "config", _ReadConfig)
        self.add_argument("-h", "--help", action=_Help, nargs=0, default=argparse.SUPPRESS, help="show this help")

    def add_class_arguments(self, cls: type, groups: Mapping[str, Sequence[str]], rest: str) -> None:
        """A flag for each field of a dataclass, as its annotation and docstring say.

        Args:
            cls: the dataclass.
            groups: the common settings by the title of their group, in the order of the help.
            rest: title of the group of all others, which only ``--help-all`` shows.
        """
        settings = settings_of(cls)
        common = [name for names in groups.values() for name in names]
        assert set(common) <= set(settings), f"not of {cls.__name__}: {set(common) - set(settings)}"
        self.settings |= settings
        others = [name for name in settings if name not in common]
        for title, names in [*groups.items(), *([(rest, others)] if others else [])]:
            group = self.add_argument_group(title)
            for name in names:
                self._add_setting(group, settings[name])
        if others:
            self.rare.add(rest)
        if others and "--help-all" not in self._option_string_actions:
            self.add_argument(
                "--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show the rarer flags too"
            )

    def _add_setting(self, group: Any, setting: Setting) -> None:
        """A flag for one field; a field without default must be given, here or in a file."""
        hint, default = setting.hint, None if setting.is_needed else setting.default
        text, brief = _plain(setting.text), _first(_plain(setting.text))
        words = ", ".join(word for word in choices(hint) if word != default)
        if not (default is None or default is False or "Default:" in text):
            text, brief = (f"{each} (default: {default}{f'; or {words}' if words else ''})" for each in (text, brief))
        elif not all(word in brief for word in choices(hint)):
            brief = f"{brief} ({words})"
        self.brief[setting.name] = brief
        group.add_argument(
            f"--{setting.name.replace('_', '-')}",
            dest=setting.name,
            type=_reading(hint),
            default=default,
            help=text,
            metavar="BOOL"
            if is_switch(hint)
            else next((_METAVARS[each] for each in _METAVARS if each in (hint, *_members(hint))), "NAME"),
            **({"nargs": "?", "const": True} if is_switch(hint) else {}),
        )

    def rename(self, old: str, new: str, why: str) -> None:
        """Refuse a flag of earlier versions, and name what it is called now."""
        self.add_argument(
            old, action=_Renamed, const=(new, why), nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments by name.

        Raises:
            UsageError: a flag is unknown or lacks its value, or a value is of another type.
            SystemExit: help was asked for and shown.
        """
        given, rest = self.parse_known_intermixed_args([_dashed(word) for word in argv])
        if rest:
            raise self._unknown(rest)
        values = vars(given)
        needed = [name for name, setting in self.settings.items() if setting.is_needed and values[name] is None]
        if needed:
            raise UsageError(f"missing: {', '.join(f'--{name}' for name in needed)}")
        return values

    def _unknown(self, rest: Sequence[str]) -> UsageError:
        flag = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
        if flag is None:
            return UsageError(f"{shown(rest[0])} is one argument too many; `{self.prog} --help` says what there is.")
        known = [option for option in self._option_string_actions if option.startswith("--")]
        nearest = difflib.get_close_matches(flag, known, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        return UsageError(f"unknown flag {_short(flag)}.{hint} `{self.prog} --help` lists the flags.")

    def error(self, message: str) -> Any:
        """Say it in the words of this library."""
        message = message.removeprefix("argument ")
        lacking = re.fullmatch(r"the following arguments are required: (.+)", message)
        raise UsageError(f"missing: {lacking[1]}" if lacking else message)

    def format_help(self, *, everything: bool = False) -> str:
        """The help: what the command does, an example, and its flags by groups."""
        width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
        formatter = argparse.HelpFormatter(self.prog, max_help_position=_COLUMN, width=width)
        positional = [a for a in self._positionals._group_actions if a.help is not argparse.SUPPRESS]
        parts = [f"usage: {' '.join([self.prog, *map(_placeholder, positional), '[FLAGS]'])}"]
        parts += [textwrap.fill(self.description or "", width), f"Example:\n  {self.example}" if self.example else ""]
        own = (self._positionals, self._optionals)
        for group in (self._positionals, *(g for g in self._action_groups if g not in own), self._optionals):
            if everything or group.title not in self.rare:
                formatter.start_section(
                    {"positional arguments": "arguments", "options": "help"}.get(str(group.title), group.title)
                )
                formatter.add_arguments([self._said(action, everything=everything) for action in group._group_actions])
                formatter.end_section()
        return "\n\n".join(filter(None, [*parts, formatter.format_help()]))

    def _said(self, action: argparse.Action, *, everything: bool) -> argparse.Action:
        """An action as the help shows it."""
        if everything or action.dest not in self.brief:
            return action
        said = argparse.Action(action.option_strings, action.dest, nargs=action.nargs, metavar=action.metavar)
        said.help = self.brief[action.dest]
        return said


class _Help(argparse.Action):
    """Show the common flags, and leave."""

    everything = False

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_help(everything=self.everything).rstrip("\n"))
        raise SystemExit(0)


class _HelpAll(_Help):
    """Show all flags, and leave."""

    everything = True


class _Renamed(argparse.Action):
    """A flag that is called otherwise now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        new, why = self.const
        raise UsageError(f"{self.option_strings[0]} of {parser.prog} is {new} now: {why}")


class _ReadConfig(argparse.Action):
    """Take the settings of a YAML file, as flags that stand here."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, path: Any, *_: Any) -> None:
        assert isinstance(parser, Parser)
        setattr(namespace, self.dest, path)
        for name, value in _yaml(Path(path)).items():
            if name not in parser.settings:
                raise UsageError(f"{path}: {unknown('setting', name, parser.settings)}")
            try:
                setattr(namespace, name, from_yaml(value, parser.settings[name].hint))
            except ValueError as error:
                raise UsageError(f"{path}: {name}: {error}") from error


def words_of(parser: Parser, action: argparse.Action) -> Sequence[str]:
    """The words that a flag takes where its annotation names them; none where others are allowed too."""
    setting = parser.settings.get(action.dest)
    if setting is not None:
        return ("true", "false") if is_switch(setting.hint) else choices(setting.hint)
    return tuple(action.choices or ())


def _yaml(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

    from lowbit.inputs import files

    try:
        values = yaml.safe_load(files.read(path, limit=1 << 20, hint="It holds no settings.").decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from error
    except RunError as error:
        raise UsageError(str(error)) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"{path} is not a list of settings: write NAME: VALUE in each line.")
    return values


def _reading(hint: Any) -> Any:
    """A `reader` whose errors argparse shows."""
    read = reader(hint)

    def typed(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).replace("%", "%%")) from error

    return typed


def _dashed(word: str) -> str:
    """``--batch_size`` means ``--batch-size``."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _members(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", ())


def _placeholder(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest).upper()
    nargs = getattr(action, "save_nargs", action.nargs)  # argparse hides it while it reads flags
    return {"?": f"[{name}]", "+": f"{name}..."}.get(str(nargs), name)


def _plain(text: str) -> str:
    """A docstring's text without its marks, for argparse, which takes % for its own."""
    return text.replace("`", "").replace("%", "%%").removesuffix(".")


def _first(text: str) -> str:
    """The first sentence, and what a setting that is left open becomes."""
    first = re.split(r"(?<!e\.g)\. (?=\S)|; ", text)[0]
    default = re.search(r"Default: [^.]*(?:\.\d[^.]*)*", text)
    return first if default is None or default[0] in first else f"{first}. {default[0]}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]} ..."
