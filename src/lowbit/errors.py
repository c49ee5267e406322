"""The two errors a person sees, what a signal leaves, and how an unknown name is reported."""

import difflib
from collections.abc import Iterable
from typing import get_args


class UsageError(ValueError):
    """What was asked for does not exist or does not fit together; the command line exits with 2."""


class RunError(RuntimeError):
    """A correct request failed while it ran; the command line exits with 1."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the command line exits with 128 plus its number.

    Args:
        message: what ended, and how to go on.
        number: the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def unknown(what: str, given: object, allowed: Iterable[str]) -> UsageError:
    """An error that names what was given, all that is allowed, and the nearest allowed name.

    Args:
        what: the kind of thing, e.g. ``"recipe"``.
        given: the name nobody knows.
        allowed: every legal name.
    """
    names = sorted(allowed)
    lower = {name.lower(): name for name in reversed(names)}
    nearest = difflib.get_close_matches(str(given).lower(), lower, n=1, cutoff=0.5)
    hint = f" Did you mean {lower[nearest[0]]!r}?" if nearest else ""
    return UsageError(f"unknown {what} {given!r}.{hint} Known: {', '.join(names)}.")


def check_choice(what: str, value: object, allowed: object) -> None:
    """Raise a UsageError unless `value` is one of the strings of the Literal `allowed`."""
    if value not in get_args(allowed):
        raise unknown(what, value, get_args(allowed))
