"""The names of recipes: those of stored files, families of widths, and paths of files."""

import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

ON_THE_FLY = "wXaYgZ"
_WIDTHS = re.compile(r"(?:(.+):)?w(0|[1-9][0-9]{0,2})a(0|[1-9][0-9]{0,2})g(0|[1-9][0-9]{0,2})")


def is_file_name(text: str) -> bool:
    """Whether a text that stands for a recipe is the path of a file, as it ends in ``.toml``."""
    return text.endswith(".toml")


def is_family(name: str) -> bool:
    """Whether a name ends in the widths of its operands, ``wXaYgZ``."""
    return widths_in(name) is not None


def widths_in(name: str) -> tuple[str, int, int, int] | None:
    """The recipe that a name changes, and its bits of `weight`, `input` and `grad_output`; None without widths."""
    match = _WIDTHS.fullmatch(name)
    if match is None:
        return None
    base, weight, input_, grad_output = match.groups(default="sbm8-cpt")
    return base, int(weight), int(input_), int(grad_output)


def widths_of(text: str) -> tuple[int, int, int] | None:
    """Bits of `weight`, `input` and `grad_output` of ``wXaYgZ``; None if the text is anything else."""
    match = _WIDTHS.fullmatch(text)
    if match is None or match[1] is not None:
        return None
    weight, input_, grad_output = map(int, match.groups()[1:])
    return weight, input_, grad_output


def recipes() -> tuple[str, ...]:
    """The names of all recipes; ``wXaYgZ`` stands for any widths, e.g. ``w4a4g6``."""
    return (*stored(), ON_THE_FLY)


def folder() -> Traversable:
    """The folder of stored recipes; data only."""
    return resources.files("lowbit") / "methods" / "recipes"


@cache
def stored() -> tuple[str, ...]:
    """The names of the stored recipes, sorted."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder().iterdir() if f.name.endswith(".toml")))
