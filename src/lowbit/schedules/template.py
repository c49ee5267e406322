"""Schedules before the length of the run is known, as recipes hold them, and the table of their kinds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import isfunction
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from lowbit.errors import UsageError, shown, unknown
from lowbit.inputs.checks import check_type, checked, fits, in_words
from lowbit.inputs.signatures import Setting, settings_of
from lowbit.schedules.layerwise import Layerwise
from lowbit.schedules.source import PureSchedule, Rule

Make = Callable[..., PureSchedule | Rule | Layerwise]


def _kinds() -> dict[str, tuple[Make, ...]]:
    """What the files of this folder make, by kind; the class of a kind comes before its function."""
    kinds: dict[str, tuple[Make, ...]] = {}
    for file in iter_modules([str(Path(__file__).parent)]):
        if file.name != Path(__file__).stem:
            module = import_module(f"{__package__}.{file.name}")
            for kind, make in getattr(module, "MAKES", {}).items():
                kinds[kind] = tuple(sorted((*kinds.get(kind, ()), make), key=isfunction))
    return kinds


KINDS = _kinds()
"""What makes the schedules of each kind: every file of this folder lists its own in ``MAKES``. The command line and
recipes read their settings off these.

A kind has a class. It may also have a function, for settings that are words instead of numbers. Of these, the first
whose annotations the settings fit is called. A function takes the settings of the class too.
"""

OF_THE_RUN = ("total_steps", "steps_per_epoch")
"""The arguments that the run gives; they are not settings."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A schedule before the length of the run is known, as recipes hold it.

    Args:
        kind: one of `KINDS`, e.g. ``"cyclic"``.
        settings: the arguments of that kind, without `total_steps` and `steps_per_epoch`.

    Raises:
        UsageError: an unknown kind or argument, or a value that no run could have.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        known = kind_settings(self.kind)
        check_type("settings", self.settings, tuple[tuple[str, Any], ...])
        names = [name for name, _ in self.settings]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"settings of a {self.kind} schedule give {twice[0]} twice: give each once")
        for name, value in self.settings:
            if name not in known:
                raise unknown(f"setting of a {self.kind} schedule", name, known)
            if len(KINDS[self.kind]) > 1:  # the types choose what makes the schedule
                check_type(name, value, known[name].hint)
        taken = self._taken
        if misplaced := [name for name in names if name not in taken]:
            raise self._misplaced(misplaced[0])
        needed = [s.name for s in taken.values() if s.is_needed and s.name not in OF_THE_RUN]
        if absent := [name for name in needed if name not in dict(self.settings)]:
            raise UsageError(f"a {self.kind} schedule lacks {', '.join(absent)}")
        # A run long enough for any setting: what fails here fails in every run.
        self.build(total_steps=10**9, steps_per_epoch=10**6)

    @property
    def of_the_class(self) -> tuple[tuple[str, Any], ...]:
        """The settings that the class of the kind has, without those that only its function has."""
        return tuple(pair for pair in self.settings if pair[0] in settings_of(KINDS[self.kind][0]))

    @property
    def values(self) -> dict[str, Any]:
        """Every setting that this kind may have, with its value, defaults included."""
        given = dict(self.settings)
        return {s.name: given.get(s.name, s.default) for s in kind_settings(self.kind).values()}

    @property
    def _make(self) -> Make:
        """What makes a schedule of these settings: the first of the kind whose annotations they fit."""
        first, *others = KINDS[self.kind]
        return next((make for make in (first, *others) if not _unfit(make, dict(self.settings))), first)

    @property
    def _taken(self) -> dict[str, Setting]:
        """The arguments of what makes the schedule, including those of the run."""
        return settings_of(KINDS[self.kind][0]) | settings_of(self._make)

    def _misplaced(self, name: str) -> UsageError:
        """The error for a setting that requires another value of some other setting."""
        given = dict(self.settings)
        other = next(make for make in KINDS[self.kind] if name in settings_of(make))
        cause = _unfit(other, given)[0]
        return UsageError(
            f"{name}={shown(given[name])} goes with {cause.name}={in_words(cause.hint)}, and {cause.name} is "
            f"{shown(given[cause.name])}"
        )

    def replace(self, **settings: Any) -> "Template":
        """The same template with some settings changed, e.g. ``template.replace(cycles=8)``."""
        return replace(self, settings=tuple({**dict(self.settings), **settings}.items()))

    @checked
    def build(self, *, total_steps: int, steps_per_epoch: int | None = None) -> PureSchedule | Rule | Layerwise:
        """The schedule of a run of that length.

        Raises:
            UsageError: the settings do not fit the run, e.g. more cycles than steps.
        """
        run = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        of_the_run = {name: value for name, value in run.items() if name in self._taken}
        return self._make(**dict(self.settings), **of_the_run)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in self.settings)})"


def kind_settings(kind: str) -> dict[str, Setting]:
    """The settings that schedules of a kind may have, without the arguments that the run gives.

    Raises:
        UsageError: an unknown kind.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown("kind of schedule", kind, KINDS)
    every: dict[str, Setting] = {}
    for make in KINDS[kind]:
        for name, setting in settings_of(make).items():
            every[name] = every[name].merged(setting) if name in every else setting
    return {name: setting for name, setting in every.items() if name not in OF_THE_RUN}


def _unfit(make: Make, given: dict[str, Any]) -> list[Setting]:
    """The settings whose given values are not what the annotations say."""
    return [s for s in settings_of(make).values() if s.name in given and not fits(given[s.name], s.hint)]
