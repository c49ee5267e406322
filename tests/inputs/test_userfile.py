"""Classes of a user's file."""

import sys
from pathlib import Path

import pytest

from lowbit.errors import RunError, UsageError
from lowbit.inputs.userfile import blamed, load_class


def test_a_class_is_found(tmp_path: Path) -> None:
    """The class is the file's own, and two files of one name do not meet."""
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"class Mine:\n    value = {value}\n")

    classes = [load_class(f"{tmp_path / folder / 'mine.py'}:Mine") for folder in ("a", "b")]

    assert [vars(each)["value"] for each in classes] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine.py", r"'mine\.py': write FILE\.py:CLASS"),
        (":Mine", r"write FILE\.py:CLASS"),
        ("mine.py:", r"write FILE\.py:CLASS"),
        ("no/mine.py:Mine", r"there is no Python file 'no/mine\.py'"),
        ("a\0.py:Mine", r"there is no Python file"),
        ("a" * 5000 + ".py:Mine", r"there is no Python file"),
        (".:Mine", r"there is no Python file '\.'"),
    ],
)
def test_a_text_that_names_no_file_is_refused(text: str, message: str) -> None:
    """The message has the form to write."""
    with pytest.raises(UsageError, match=message):
        load_class(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\ny = x / 0\n", r"mine\.py fails when it is executed: ZeroDivisionError: division by zero \(line 2\)"),
        ("def f(:\n", r"fails when it is executed: SyntaxError: .* \(line 1\)"),
        ("raise SystemExit(3)\n", r"fails when it is executed: SystemExit: 3 \(line 1\)"),
        ("import no_such_package\n", r"ModuleNotFoundError: No module named 'no_such_package' \(line 1\)"),
        ("x = 1\n", r"defines no class, so it lacks 'Mine'"),
        ("class Other: pass\n", r"unknown class of .*mine\.py 'Mine'.*Known: Other"),
        ("Mine = 3\nclass Other: pass\n", r"unknown class of .*mine\.py 'Mine'"),
    ],
)
def test_a_file_without_the_class_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """A file that fails says where, and leaves nothing among the modules."""
    (tmp_path / "mine.py").write_text(content)
    before = set(sys.modules)

    with pytest.raises(UsageError, match=message):
        load_class(f"{tmp_path / 'mine.py'}:Mine")
    assert set(sys.modules) == before


def test_a_line_is_said_for_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of an error does not depend on how the path is written."""
    (tmp_path / "mine.py").write_text("x = 1\n\nraise KeyError(3)\n")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UsageError, match=r"^mine\.py fails when it is executed: KeyError: 3 \(line 3\)$"):
        load_class("mine.py:Mine")


def test_what_is_executed_is_what_the_file_holds_now(tmp_path: Path) -> None:
    """No compiled copy is kept: a file that changes within a second, at the same length, is read anew."""
    file = tmp_path / "mine.py"
    for value in (1, 2):
        file.write_text(f"class Mine:\n    value = {value}\n")

        assert vars(load_class(f"{file}:Mine"))["value"] == value
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_files_beside_it_cannot_be_imported(tmp_path: Path) -> None:
    """The file stands alone."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "mine.py").write_text("import beside\n")

    with pytest.raises(UsageError, match=r"No module named 'beside' \(line 1\)"):
        load_class(f"{tmp_path / 'mine.py'}:Mine")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A file beyond 1 MiB is not executed."""
    (tmp_path / "mine.py").write_text("#" * (1 << 20) + "\n")

    with pytest.raises(RunError, match=r"mine\.py is too long"):
        load_class(f"{tmp_path / 'mine.py'}:Mine")


@pytest.mark.parametrize("error", [UsageError("mine"), RunError("mine"), KeyboardInterrupt()])
def test_errors_of_lowbit_pass(error: BaseException) -> None:
    """What already is an error for a person, and Ctrl-C, stays what it is."""
    with pytest.raises(type(error)) as caught, blamed("it raises", None):
        raise error

    assert caught.value is error
