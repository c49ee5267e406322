"""The settings of schedules and gates as settings of a run, read off their classes: flags, YAML and checkpoints."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from lowbit.inputs.checks import fits
from lowbit.inputs.signatures import Setting, settings_of
from lowbit.methods.recipe import Gating, Skipping
from lowbit.schedules import KINDS, Time, kind_settings

T = TypeVar("T")

STARTS = Setting(
    name="starts",
    hint=Sequence[Time],
    default=(),
    text="the first step of each phase after the first: a step, epochs such as 10ep, or a fraction of the run.",
)


def tunable() -> dict[str, Setting]:
    """The settings of all kinds of schedules and of gates by name, typed as YAML writes them; the text says whose."""
    owners = {f"{kind} schedules": kind_settings(kind) for kind in KINDS} | {"gates": settings_of(Gating)}
    owners |= {"recipes with phases": {"starts": STARTS}, "recipes that skip grad_weight": settings_of(Skipping)}
    found: dict[str, Setting] = {}
    for owner, settings in owners.items():
        for name, setting in settings.items():
            hint, text = _written(setting.hint), f"of {owner}: {setting.text}"
            if fits(None, setting.hint):
                text += " None cannot be set here."
            if name in found:
                hint, text = found[name].hint | hint, f"{found[name].text} O{text[1:]}"
            found[name] = replace(setting, hint=hint, text=text)
    return found


def with_tunable(cls: type[T]) -> type[T]:
    """Give a class, before it becomes a dataclass, a field for each of `tunable`; None is what the recipe says.

    Raises:
        TypeError: a schedule or gate has a setting of the same name as the class.
    """
    settings = tunable()
    if taken := [name for name in settings if hasattr(cls, name) or name in cls.__annotations__]:
        raise TypeError(f"{cls.__name__} has {', '.join(taken)} already: name the setting of the schedule otherwise")
    cls.__annotations__ |= {name: setting.hint | None for name, setting in settings.items()}
    for name in settings:
        setattr(cls, name, None)
    lines = [f"    {name}: {s.text} Left open, or null: the recipe's." for name, s in settings.items()]
    arguments, raises, errors = (inspect.getdoc(cls) or "").partition("\n\nRaises:")
    cls.__doc__ = "\n".join([arguments, *lines]) + raises + errors
    return cls


def _written(hint: Any) -> Any:
    """An annotation in the types of YAML: lists for all sequences; None, which leaves a setting open, is left out."""
    inner = [_written(each) for each in get_args(hint) if each not in (NoneType, Ellipsis)]
    if get_origin(hint) in (Union, UnionType):
        return reduce(or_, inner)
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Sequence):
        return list[reduce(or_, inner)]  # type: ignore[misc]  # a type that is made, not written
    return hint
