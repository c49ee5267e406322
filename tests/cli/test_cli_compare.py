import json
import shutil
from pathlib import Path

import pytest
from small_run import train

from lowbit.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run and a folder that is none."""
    base = tmp_path_factory.mktemp("runs")
    assert train(base / "one") == 0
    (base / "notes").mkdir()
    return base


def test_the_table_fits_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is searched, its other contents are named, and no line of the table is wider than 80 columns."""
    code = cli.main(["compare", str(folder)])
    out, err = capsys.readouterr()

    assert code == 0
    assert "not compared" in err
    assert "notes" in err
    assert "mlp on digits" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_all_that_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What goes to stdout is JSON alone, so that another program can read it."""
    assert cli.main(["compare", str(folder), "--json"]) == 0

    assert len(json.loads(capsys.readouterr().out)["groups"]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "--csv"], "--json and --csv do not go together"),
        (["--equal", "0.3"], "these runs have 1"),
        (["--baseline", "sbm9"], "sbm9"),
    ],
)
def test_wrong_requests_are_refused(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 2, and the message says what does not fit."""
    code = cli.main(["compare", str(folder), *flags])

    assert code == 2
    assert message in capsys.readouterr().err


def test_names_from_outside_cannot_move_the_cursor(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder with an escape sequence in its recipe prints no escape character."""
    shutil.copytree(folder / "one", tmp_path / "two")
    config = tmp_path / "two" / "config.yaml"
    recipe = next(line for line in config.read_text().splitlines() if line.startswith("recipe:"))
    config.write_text(config.read_text().replace(recipe, 'recipe: "\\e[2Jred"'))
    cli.main(["compare", str(tmp_path / "two")])
    out, err = capsys.readouterr()

    assert "\x1b" not in out + err
