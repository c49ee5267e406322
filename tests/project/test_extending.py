"""The page on extending: each of its diffs is applied alone to a copy of the package, where its script then runs."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PACKAGE = Path(inspect.getfile(lowbit)).parent
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
# How many files each thing takes, as the page's table says: 1 file, and a TOML file or the row of a table beside it.
FILES = {
    "A recipe": "1",
    "An element kind": "1 + TOML",
    "A range rule": "1",
    "A schedule": "1",
    "A layer": "1 + table row",
    "An engine": "1 + table row",
    "An accelerator": "1",
}


def block(title: str, language: str) -> str:
    """The code block of a section in a language; there is one."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)
    return str(code)


def touched(title: str) -> tuple[list[str], list[str]]:
    """The files that a section's diff makes, and those that it changes."""
    pairs = re.findall(r"^--- (\S+)\n\+\+\+ b/(\S+)$", block(title, "diff"), re.MULTILINE)
    return [new for old, new in pairs if old == "/dev/null"], [new for old, new in pairs if old == f"a/{new}"]


def row(title: str) -> tuple[str, list[str], list[str]]:
    """The count, the new files and the changed ones that the page's table has for a section."""
    anchor = title.lower().replace(" ", "-")
    (cells,) = re.findall(rf"^\| \[{title.lower()}\]\(#{anchor}\) \| (.*) \| (.*?) ?\| (.*?) ?\|$", PAGE, re.MULTILINE)
    count, new, changed = cells
    return count, re.findall(r"`(.*?)`", new), re.findall(r"`(.*?)`", changed)


def copy_of_the_package(folder: Path) -> Path:
    """The package's own files in a new folder ``src``, with the native module where there is one."""
    source = folder / "src"
    shutil.copytree(PACKAGE, source / "lowbit", ignore=shutil.ignore_patterns("__pycache__", "native"))
    native = importlib.util.find_spec("lowbit.kernels._cpu")
    if native is not None and native.origin is not None:
        shutil.copy(native.origin, source / "lowbit" / "kernels")
    return source


def apply(diff: str, folder: Path) -> None:
    """Apply a diff to a folder as git does."""
    done = subprocess.run(
        ["git", "apply", "-C1", "-"],
        input=diff,
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the source has changed, make the diff of the page anew:\n{done.stderr}"


def test_every_section_is_here() -> None:
    """The page has a section for each thing that can be added, and no other."""
    assert list(SECTIONS) == list(FILES)


@pytest.mark.parametrize("title", FILES)
def test_the_table_counts_the_files_of_the_diffs(title: str) -> None:
    """A diff touches the files that the table names, as many as it says; a table's file gets no more than rows."""
    new, changed = touched(title)
    count = {"1": 1, "1 + TOML": 2, "1 + table row": 2}[FILES[title]]
    beside = [file for file in new if file.endswith(".toml")] if "TOML" in FILES[title] else changed

    assert row(title) == (FILES[title], new, changed)
    assert len(new) + len(changed) == count
    if count == 2:
        assert len(beside) == 1
    if "row" in FILES[title]:
        of_the_table = block(title, "diff").split(f"--- a/{changed[0]}\n")[1].split("\n--- ")[0]
        assert len(re.findall(r"^[+-](?![+-])", of_the_table, re.MULTILINE)) <= 3


@pytest.mark.skipif(shutil.which("git") is None, reason="git, which applies the diffs, is not here")
@pytest.mark.parametrize("title", FILES)
def test_the_diff_does_what_the_page_says(title: str, tmp_path: Path) -> None:
    """The diff applies to the present source, and the script of its section runs in the changed copy."""
    source = copy_of_the_package(tmp_path)
    apply(block(title, "diff"), tmp_path)
    which = f"import lowbit\nassert lowbit.__file__ == {str(source / 'lowbit' / '__init__.py')!r}, lowbit.__file__\n"

    # Without `site` no finder of an editable install stands before the copy; the path has all that `site` found here.
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", which + block(title, "python")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert all((tmp_path / file).is_file() for files in touched(title) for file in files)
    assert done.returncode == 0, done.stderr
