"""The names of recipes: those of stored files, families of widths, and paths of files."""

import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

ON_THE_FLY = "wXaYgZ"
_WIDTHS = re.compile(r"(?:(.+):)?w(0|[1-9][0-9]{0,2})a(0|[1-9][0-9]{0,2})g(0|[1-9][0-9]{0,2})")


def is_file_name(text: str) -> bool:
    """Whether a text that stands for a recipe is the path of a file: it ends in ``.toml``."""
    return text.endswith(".toml")


def is_family(name: str) -> bool:
    """Whether a name ends in the widths of its operands, ``wXaYgZ``."""
    return _WIDTHS.fullmatch(name) is not None


def recipes() -> tuple[str, ...]:
    """The names of all recipes; ``wXaYgZ`` stands for any widths, e.g. ``w4a4g6``."""
    return (*_stored(), ON_THE_FLY)


def _folder() -> Traversable:
    """The folder of stored recipes; data only."""
    return resources.files("lowbit") / "methods" / "recipes"


@cache
def _stored() -> tuple[str, ...]:
    return tuple(sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml")))
