"""The errors that a user sees, the end by a signal, and how messages show a value or an unknown name."""

import difflib
from collections.abc import Iterable
from types import NoneType
from typing import get_args


class UsageError(ValueError):
    """What was asked for does not exist or does not fit together; the command line exits with 2."""


class RunError(RuntimeError):
    """A correct request failed while it ran; the command line exits with 1."""


class ElsewhereError(RunError):
    """Another process of the run failed, and says why itself; the command line exits with 1 and is silent."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the command line exits with 128 plus its number.

    Args:
        message: what ended, and how to go on.
        number: the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


_LONGEST = 80  # characters of a value in a message
_PLAIN = (bool, int, float, str, bytes, list, tuple, dict, set, frozenset, NoneType)


def shown(value: object) -> str:
    """A value in one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split()) if isinstance(value, _PLAIN) else a_or_an(type(value).__name__)
    except Exception:  # e.g. a whole number of thousands of digits, or an element whose repr is broken
        text = a_or_an(type(value).__name__)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def a_or_an(name: str) -> str:
    """A noun with its article."""
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def unknown(what: str, given: object, allowed: Iterable[str]) -> UsageError:
    """An error that names what was given, all that is allowed, and the nearest allowed name.

    Args:
        what: the kind of thing, e.g. ``"recipe"``.
        given: the unknown name.
        allowed: every legal name.
    """
    names = sorted(allowed)
    lower = {name.lower(): name for name in reversed(names)}
    nearest = difflib.get_close_matches(shown(given).strip("'").lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[nearest[0]]!r}?" if nearest else ""
    return UsageError(f"unknown {what} {shown(given)}.{hint} Known: {', '.join(names)}.")


def check_choice(what: str, value: object, allowed: object) -> None:
    """Raise a UsageError unless `value` is one of the strings of the Literal `allowed`."""
    if not isinstance(value, str) or value not in get_args(allowed):
        raise unknown(what, value, get_args(allowed))
