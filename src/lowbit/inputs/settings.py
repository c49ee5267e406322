"""Settings from the command line: ``NAME=VALUE`` texts become the fields of a dataclass, whatever dataclass it is.

A field that is itself a dataclass has its own fields behind a dot, e.g. ``energies.dram=0.006``.
"""

import ast
import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lowbit.errors import UsageError, shown, unknown
from lowbit.inputs.checks import check_type, fits

T = TypeVar("T")

_WORDS = {"true": True, "false": False, "none": None}


def names(cls: type) -> list[str]:
    """The names of all settings of a class, those of inner dataclasses with a dot; none if it lacks fields."""
    found: list[str] = []
    for name, hint in _fields(cls).items():
        inner = _inner(hint)
        found += [name] if inner is None else [f"{name}.{each}" for each in names(inner)]
    return found


def make(cls: type[T], given: Sequence[str]) -> T:
    """An object of a class with some of its settings.

    Args:
        cls: a dataclass, or a class that is made without arguments.
        given: texts ``NAME=VALUE``. A value is written as in Python; ``true``, ``false`` and ``none`` work too, and a
            text does not need quotes.

    Raises:
        UsageError: a text of another form, an unknown name, a name that is given twice, a value that does not fit the
            field's annotation, or a missing field without a default.
    """
    known = names(cls)
    values: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"setting {shown(text)}: write NAME=VALUE with one of {_listed(cls, known)}")
        if name not in known:
            raise _unknown(cls, name, known)
        if name in values:
            raise UsageError(f"setting {name} is given twice, as {shown(values[name])} and {shown(value)}: give one")
        values[name] = value
    return _make(cls, values, "")


def _make(cls: type[T], values: Mapping[str, str], prefix: str) -> T:
    arguments: dict[str, Any] = {}
    required = _required(cls)
    for name, hint in _fields(cls).items():
        inner, path = _inner(hint), f"{prefix}{name}"
        if inner is None:
            if path in values:
                arguments[name] = _value(path, values[path], hint)
        elif name in required or any(each.startswith(f"{path}.") for each in values):
            arguments[name] = _make(inner, values, f"{path}.")
    if lacking := [f"{prefix}{name}" for name in required if name not in arguments]:
        raise UsageError(f"{cls.__name__} needs {', '.join(lacking)}: give each as NAME=VALUE")
    return cls(**arguments)


def _value(name: str, text: str, hint: Any) -> Any:
    """A text as the field's annotation reads it."""
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    value = text if fits(text, hint) and not fits(value, hint) else value
    check_type(name, value, hint)
    return value


def _fields(cls: type) -> dict[str, Any]:
    """The fields that the constructor takes, with their annotations."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _required(cls: type) -> list[str]:
    """The fields without a default."""
    if not dataclasses.is_dataclass(cls):
        return []
    none = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is none and f.default_factory is none]


def _inner(hint: Any) -> type | None:
    """The dataclass that an annotation is, or may be besides None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((each for each in options if isinstance(each, type) and dataclasses.is_dataclass(each)), None)


def _unknown(cls: type, name: str, known: Sequence[str]) -> UsageError:
    return unknown(f"setting of {cls.__name__}", name, known) if known else UsageError(_listed(cls, known))


def _listed(cls: type, known: Sequence[str]) -> str:
    if known:
        return ", ".join(known)
    return f"{cls.__name__} has no settings: make it a dataclass, and its fields are its settings"
