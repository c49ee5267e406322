from pathlib import Path

import pytest
from small_run import train

from lowbit.cli import main as cli


def test_a_folder_of_runs_becomes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs in a folder are in the page, and what is not a run is named on stderr."""
    assert train(tmp_path / "runs" / "one") == 0
    (tmp_path / "runs" / "notes").mkdir()
    capsys.readouterr()

    code = cli.main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "page.html")])
    out, err = capsys.readouterr()

    assert code == 0
    assert out.startswith(f"{tmp_path / 'page.html'}: 1 run, ")
    assert "not shown" in err
    assert "notes" in err
    assert "mlp on digits" in (tmp_path / "page.html").read_text()


def test_without_a_run_the_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without runs is a wrong request, and no page is written."""
    code = cli.main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")])

    assert code == 2
    assert "not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_the_page_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder as the output is refused with a name that would do."""
    code = cli.main(["report", str(tmp_path), "-o", str(tmp_path)])

    assert code == 2
    assert f"{tmp_path / 'report.html'}" in capsys.readouterr().err
