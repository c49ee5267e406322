"""Numbers and shapes as they are written on the command line."""

import math
import re
from typing import Any

from lowbit.errors import UsageError

MOST_NUMBERS = 2**40  # in one batch that is planned, or one sample of a model that is shown


def whole(text: str) -> int:
    """A whole number of at most nine digits; 0 where a text is not one."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def task_of(shape: str, classes: int | None, flag: str) -> Any:
    """What a model maps for C,H,W of an image or T of a text; `flag` is where the shape was given."""
    from lowbit.train.data import Task

    sizes = tuple(map(whole, shape.split(",")))
    if len(sizes) not in {1, 3} or 0 in sizes:
        raise UsageError(f"{flag} must be C,H,W for images or T for text, e.g. 3,32,32, got {shape!r}.")
    if classes is not None and classes < 1:
        raise UsageError(f"--classes must be at least 1, got {classes}.")
    if math.prod(sizes) * (classes or 1) > MOST_NUMBERS:
        raise UsageError(f"{flag} and --classes are too large: {shape} and {classes or 'none'}.")
    if len(sizes) == 1:
        return Task(kind="text", shape=sizes, classes=classes or 256)
    return Task(kind="image", shape=sizes, classes=classes or 10)
