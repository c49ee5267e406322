import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FOLDERS = ("src", "tests", "docs", "examples", "benchmarks")
TEXT = sorted(
    path
    for path in (*ROOT.glob("*.*"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.*")))
    if path.suffix in {".py", ".md", ".toml", ".cpp", ".txt", ".yaml"}
)


def test_the_package_needs_torch_only() -> None:
    """Whoever installs the package gets torch and the NumPy that it warns without; the rest are extras."""
    dependencies = tomllib.loads(PROJECT)["project"]["dependencies"]

    assert [re.split(r"[<>=~ ]", d)[0] for d in dependencies] == ["numpy", "torch"]


def test_classifiers_name_the_pythons_that_wheels_are_built_for() -> None:
    """The Pythons of the classifiers, of cibuildwheel and of `make test-wheel` are the same."""
    project = tomllib.loads(PROJECT)
    named = re.findall(r":: (3\.\d+)\b", "\n".join(project["project"]["classifiers"]))
    built = [f"3.{build[3:5]}" for build in project["tool"]["cibuildwheel"]["build"]]
    tried = re.search(r"^PYTHONS \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

    assert tried is not None
    assert named == built == tried[1].split()
    assert project["project"]["requires-python"] == f">={named[0]}"
    assert "Typing :: Typed" in project["project"]["classifiers"]


def test_every_rule_that_is_switched_off_has_its_reason() -> None:
    """Each line of ruff's ignore lists has a comment."""
    lines = re.findall(r'^ +"[A-Z]+\d+",.*$', PROJECT, flags=re.MULTILINE)

    assert len(lines) > 3
    assert [line for line in lines if not re.search(r"# .{10}", line)] == []


def test_warnings_are_errors() -> None:
    """A warning in a test fails the test."""
    assert tomllib.loads(PROJECT)["tool"]["pytest"]["ini_options"]["filterwarnings"][0] == "error"


@pytest.mark.parametrize("path", TEXT, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_names_a_folder_of_one_machine(path: Path) -> None:
    """Absolute paths of home and working folders have no place in the project."""
    places = re.compile(r"/(?:" + "|".join(("home", "root", "work", "Users")) + r")/\w")

    assert places.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [p for p in TEXT if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_random_state_is_never_set_for_everybody(path: Path) -> None:
    """Only the tests and runs of whole programs seed torch's global generator."""
    allowed = path.relative_to(ROOT).parts[0] != "src" or "train" in path.parts or "cli" in path.parts

    assert allowed or "manual_seed" not in path.read_text(encoding="utf-8")


def test_every_test_file_has_a_name_of_its_own() -> None:
    """Pytest imports test files by their names alone, so two of one name stop a run of the whole suite."""
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("*.py") if path.name != "conftest.py")

    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []
