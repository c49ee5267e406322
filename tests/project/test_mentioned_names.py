"""Names of lowbit that text mentions: each is there to be imported."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What text speaks of the package: the pages, and what stands in the source. The changelog names what is gone, too.
TEXT = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.*"))
    if path.suffix in {".md", ".py", ".h", ".cpp"} and path.name != "CHANGELOG.md"
)


def names_in(text: str) -> set[str]:
    """The dotted names of the package right after a backquote; TOML and shell have none there."""
    return set(re.findall(r"`(lowbit(?:\.[A-Za-z_]\w*)+)", text))


def is_there(name: str) -> bool:
    """Whether a name is a module, or what attributes lead to from one; fields of a dataclass are attributes."""
    parts = name.split(".")
    found: object = None
    for count in range(1, len(parts) + 1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:count]):  # a library that the module needs
                raise
            break
    else:
        return True
    for part in parts[count - 1 :]:
        if part in getattr(found, "__dataclass_fields__", {}):
            found = None
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            return False
    return True


@pytest.mark.parametrize("path", TEXT, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_of_the_package_is_there(path: Path) -> None:
    """What a page, a docstring or a comment quotes by its dotted name can be imported by it."""
    gone = [name for name in sorted(names_in(path.read_text(encoding="utf-8"))) if not is_there(name)]

    assert gone == []


@pytest.mark.parametrize("name", ["lowbit.recipe.SLOTS", "lowbit.quantizer", "lowbit.Recipe.no", "lowbit.nn.norm.no"])
def test_a_name_that_is_gone_is_seen(name: str) -> None:
    """The test above finds a module, an object or an attribute that is not there."""
    assert names_in(f"See `{name}` and ``{name}(x)``.") == {name}
    assert not is_there(name)


@pytest.mark.parametrize("name", ["lowbit.nn.norm", "lowbit.Recipe.from_name", "lowbit.Recipe.bias", "lowbit.__all__"])
def test_a_name_that_is_there_is_found(name: str) -> None:
    """Modules, methods, fields and dunder names are found."""
    assert is_there(name)
