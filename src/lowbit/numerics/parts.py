"""The parts of a number format as data: how they are written in TOML, and how to list which of them are computed.

A part is a small final dataclass with a `kind`. Whatever executes formats lists the classes, fields and values that it
computes, and refuses the rest.
"""

import dataclasses
from collections.abc import Container, Iterable, Mapping
from typing import Any, ClassVar, Protocol

from lowbit.errors import UsageError, a_or_an, shown, unknown
from lowbit.inputs.checks import is_finite


class Part(Protocol):
    """One part of a format."""

    kind: ClassVar[str]


# The smallest normal number of float32 and the largest one.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def check_interval(low: float, high: float) -> None:
    """Raise a UsageError unless two numbers are the ends of an interval of float32."""
    if not -LARGEST <= low < high <= LARGEST:
        raise UsageError(f"low={low}, high={high}: give two finite ends in float32, the lower one first")


class _Numbers(Container[object]):
    """Every finite number."""

    def __contains__(self, value: object) -> bool:
        return is_finite(value)


class _NumbersOrNone(_Numbers):
    """Every finite number, and None."""

    def __contains__(self, value: object) -> bool:
        return value is None or super().__contains__(value)


class _Anything(Container[object]):
    """Every value."""

    def __contains__(self, value: object) -> bool:
        return True


NUMBERS, NUMBERS_OR_NONE, ANYTHING = _Numbers(), _NumbersOrNone(), _Anything()

# Which formats something executes: the exact classes of their parts, and for each class the fields with their values.
# Whatever executes formats has its own list, however alike the lists are: with a shared one, all would take what one of
# them learns to compute.
Listed = Mapping[type, Mapping[str, Container[object]]]


def unlisted(part: object, listed: Listed) -> str:
    """Says which part of a format is not listed; empty if everything is.

    A list is closed: a class that it does not name is not listed, even if it is a subclass of one that it names. A
    field that it does not name may only have its default, since the default of a field that is added later changes
    nothing. A field that holds a part is checked in turn.

    Args:
        part: a format or a part.
        listed: what is taken.
    """
    known = listed.get(type(part))
    if known is None:
        return f"{part} is a {type(part).__name__}, which is not listed"
    for field in dataclasses.fields(part):  # type: ignore[arg-type]  # every listed class is a dataclass
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            if why := unlisted(value, listed):
                return why
            continue
        allowed: Container[object] = known.get(field.name, (field.default,))
        if value not in allowed:
            return f"{field.name}={shown(value)} is not listed"
    return ""


def check_part(what: str, value: object, method: str) -> None:
    """Raise a UsageError unless a value is a part of its sort: a dataclass with a kind and this method."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value) or not hasattr(value, "kind"):
        raise UsageError(f"{what}={shown(value)}: give a part of a format, one of lowbit.numerics that has `{method}`")
    if not hasattr(value, method):
        raise UsageError(f"{what} is {a_or_an(type(value).__name__)}, which lacks `{method}`: give a part that has it")


def check_again(part: object) -> None:
    """Run the checks of a format and of all its parts again, whatever was done to them since they were made."""
    for field in dataclasses.fields(part):  # type: ignore[arg-type]  # parts are dataclasses
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            check_again(value)
    dataclasses.replace(part)  # type: ignore[type-var]


def by_kind(what: str, classes: Iterable[type[Any]], given: object, where: str) -> Any:
    """The part that a text or a table of TOML describes: its `kind`, or a table with `kind` and the fields.

    Args:
        what: what the part is, for messages, e.g. ``"element"``.
        classes: the known classes.
        given: the text or table, or a part, which is returned.
        where: where it was read, for messages.

    Raises:
        UsageError: an unknown kind, an unknown field, or a missing one.
    """
    kinds = {cls.kind: cls for cls in classes}
    if type(given) in kinds.values():
        return given
    fields = {"kind": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping) or "kind" not in fields:
        raise UsageError(f"{where}: {what}={shown(given)}: give a kind of {what}, or a table with kind and its fields")
    kind, fields = fields["kind"], {key: value for key, value in fields.items() if key != "kind"}
    if not isinstance(kind, str) or kind not in kinds:
        raise UsageError(f"{where}: {unknown(what, kind, kinds)}")
    return construct(kinds[kind], f"{where}: {what} {kind!r}", fields)


def construct(cls: type[Any], where: str, fields: Mapping[str, Any]) -> Any:
    """A dataclass from its fields.

    Raises:
        UsageError: an unknown field, a missing one, or a value that it refuses.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise unknown(f"field of {where}", key, known)
    needed = {
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := needed - set(fields):
        raise UsageError(f"{where} lacks {', '.join(sorted(missing))}")
    try:
        return cls(**fields)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
