"""Checks of what comes from outside, arguments, settings and saved states, against the annotations that document it.

An annotation says what a value may be, and `fits` takes it at its word: True is not a whole number, a text is not a
list of texts, and every element of a list is checked. What an annotation cannot say (a range, what goes together) is
checked where the value is used.
"""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from lowbit.errors import UsageError, a_or_an, shown, unknown

P = ParamSpec("P")
R = TypeVar("R")

# Larger whole numbers never count anything here, and Python refuses to print those of more than 4,300 digits.
_LARGEST = 2**128

_IN_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
    nn.Module: "a torch.nn.Module",
}


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, which True is not."""
    return type(value) is int or (isinstance(value, int) and not isinstance(value, bool))


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that is neither nan nor inf, nor too large for a float."""
    return fits(value, float) and math.isfinite(value)


def is_like(value: object, other: Tensor) -> TypeGuard[Tensor]:
    """Whether a value is an ordinary tensor with values, of the shape and type of `other`."""
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (other.shape, other.dtype):
        return False
    return value.layout is torch.strided and not value.is_meta


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; iterators are not consumed, and unknown annotations allow all."""
    if (scalar := _SCALARS.get(hint)) is not None:
        return scalar(value)
    origin, inner = _parts(hint)
    if origin in _UNIONS:
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if origin is Callable:
        return callable(value)
    if origin is type:
        return isinstance(value, type)
    kind = origin or hint
    return not isinstance(kind, type) or _is_open(kind) or (isinstance(value, kind) and _fit(value, kind, inner))


_SCALARS: dict[Any, Callable[[Any], bool]] = {
    Any: lambda _: True,
    None: lambda value: value is None,
    int: lambda value: is_whole(value) and abs(value) < _LARGEST,
    float: lambda value: isinstance(value, float) or (is_whole(value) and abs(value) < _LARGEST),
}


def _fit(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    """Whether the elements of a value of that kind are what its annotation says; a text is not a list of texts."""
    if isinstance(value, str | bytes):
        return kind in (str, bytes, object)
    if isinstance(value, Tensor) and kind is Iterable:
        return value.dim() > 0
    if issubclass(kind, tuple) and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(fits, value, inner))
    if issubclass(kind, Mapping) and inner:
        return all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    return not issubclass(kind, Sequence) or not inner or all(fits(each, inner[0]) for each in value)


def _is_open(hint: Any) -> bool:
    """Whether an annotation cannot be checked at run time: a protocol that was not made for that."""
    return getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)


_UNIONS = (Union, types.UnionType)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in _UNIONS


@functools.cache  # a ledger asks for a few annotations a million times
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


def in_words(hint: Any) -> str:
    """An annotation as the end of the sentence that begins with "give"."""
    origin, inner = get_origin(hint), get_args(hint)
    if _is_union(hint):
        *others, last = dict.fromkeys(map(in_words, inner))
        return " or ".join(filter(None, [", ".join(others), last]))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if hint in _IN_WORDS:
        return _IN_WORDS[hint]
    if origin is Callable:
        return "a function"
    if origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
        return f"a tuple ({', '.join(map(in_words, inner))})"
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a dict"
    if isinstance(kind, type) and issubclass(kind, Iterable) and inner:
        each = "" if inner[0] is Any else f", each element {in_words(inner[0])}"
        return f"a {'tuple' if kind is tuple else 'list'}{each}"
    return a_or_an(getattr(kind, "__name__", str(kind)))


def check_type(what: str, value: object, hint: Any) -> None:
    """Raise a UsageError that names `what` unless a value is what an annotation says."""
    if fits(value, hint):
        return
    # Apart from None, what is allowed may be a list of names.
    named = [option for option in get_args(hint) if option is not types.NoneType] if _is_union(hint) else [hint]
    options = get_args(named[0])
    if len(named) == 1 and get_origin(named[0]) is Literal and all(isinstance(option, str) for option in options):
        raise unknown(what, value, options)
    raise UsageError(f"{what}={shown(value)}: give {in_words(hint)}")


@functools.cache
def _hints_of(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner)


def check_fields(record: Any) -> None:
    """Raise a UsageError unless every field of a dataclass is what its annotation says."""
    cls: Any = type(record)
    hints = _hints_of(cls)
    for field in dataclasses.fields(record):
        check_type(field.name, getattr(record, field.name), hints[field.name])


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise a UsageError that names an argument which is not what its annotation says."""
    parameters = inspect.signature(function)
    variadic = {p.name for p in parameters.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = parameters.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # it says better than `bind` what is missing
        hints = _hints_of(function)
        for name, value in given.items():
            if name in hints and name not in variadic:
                check_type(name, value, hints[name])
        return function(*args, **kwargs)

    return wrapper


def check_keys(what: str, given: object, expected: Iterable[str]) -> None:
    """Raise a UsageError unless `given` is a mapping with exactly these keys."""
    names = set(expected)
    if not isinstance(given, Mapping):
        raise UsageError(f"{what} is {shown(given)}: expected a dict with {', '.join(sorted(names))}")
    if missing := names - set(given):
        raise UsageError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := [shown(key) for key in given if key not in names]:
        raise UsageError(
            f"{what} has the unknown entry {', '.join(unknown[:3])}; it has exactly {', '.join(sorted(names))}"
        )


def check_whole(what: str, value: object, low: int, high: int | None = None) -> int:
    """The value itself; a UsageError unless it is a whole number from `low` to `high` (None: without limit)."""
    if not is_whole(value) or not low <= value <= (_LARGEST if high is None else high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise UsageError(f"{what}={shown(value)}: give a whole number {limit}")
    return value
