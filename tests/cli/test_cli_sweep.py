"""`lowbit sweep` and `lowbit train --seeds`: one command from a file to a table and a page."""

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import train

from lowbit.cli import main as cli

PAGE = Path(__file__).parents[2] / "docs" / "sweeps.md"
STUDY = Path(__file__).parents[2] / "examples" / "study.yaml"


class Data(HTMLParser):
    """The data of a report page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.within, self.text = False, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where the data begins."""
        self.within = tag == "script" and ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        """Keep the data."""
        self.text += data if self.within else ""


def results(out: Path) -> dict[str, dict[str, Any]]:
    """The results in a sweep's folder by run."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))}


def test_the_study_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five recipes, three seeds: one line as each run starts and ends, and a table and a page with their numbers."""
    out = tmp_path / "study"

    code = cli.main(["sweep", str(STUDY), "--out", str(out)])

    lines = capsys.readouterr().out.splitlines()
    found = results(out)
    assert code == 0
    assert len(found) == 15
    assert len({result["recipe"] for result in found.values()}) == 5
    assert {result["seed"] for result in found.values()} == {0, 1, 2}
    assert [sum(line.startswith(word) for line in lines) for word in ("started  ", "done     ")] == [15, 15]
    page = (out / "report.html").read_text()
    (task,) = json.loads(Data(page).text)["tasks"]
    shown = {run["name"]: dict(run["facts"])["test accuracy"] for run in task["runs"]}
    assert shown == {name: f"{100 * result['test_accuracy']:.2f} %" for name, result in found.items()}
    for recipe in {result["recipe"] for result in found.values()}:
        mean = statistics.fmean(100 * r["test_accuracy"] for r in found.values() if r["recipe"] == recipe)
        (row,) = [line for line in lines if re.match(rf"{recipe}( \*)?  +3  ", line)]
        assert f"{mean:.2f}" in row.split()
        assert f"<strong>{mean:.2f}</strong>" in page
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100


def test_the_same_command_again_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows the table and writes the page of what is there; `--jobs` may differ."""
    path = tmp_path / "small.yaml"
    values = {"out": str(tmp_path / "runs"), "train": {"model": "mlp", "data": "digits", "max_steps": 5, "threads": 1}}
    path.write_text(yaml.safe_dump(values | {"grid": {"recipe": ["fp32", "int8"]}}))
    cli.main(["sweep", str(path)])
    first = capsys.readouterr().out

    code = cli.main(["sweep", str(path), "--jobs", "2"])

    again = capsys.readouterr().out
    assert code == 0
    assert "started" not in again
    assert again.startswith("2 of 2 runs are complete already\n")
    assert first.partition("\n\n")[2].partition("* no setting")[0] in again


def test_several_seeds_are_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each seed has its own folder with its own weights, and the table has one row with their spread."""
    out = tmp_path / "seeds"

    code = train(out, "--seeds", "0,3")

    found = results(out)
    assert code == 0
    assert list(found) == ["seed0", "seed3"]
    assert [result["seed"] for result in found.values()] == [0, 3]
    assert found["seed0"]["test_loss"] != found["seed3"]["test_loss"]
    assert re.search(r"^sbm8 \*? +2 ", capsys.readouterr().out, re.MULTILINE)
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seeds", "0,x"], "give whole numbers with commas, e.g. 0,1,2"),
        (["--seeds", "1,1"], "a seed is there twice"),
        (["--seeds", "0,1", "--jobs", "0"], "jobs=0: give a whole number from 1 to 1024"),
        (["--jobs", "2"], "--jobs goes with --seeds"),
        (["--seeds", "0,-1"], "seed must be a whole number of at least 0"),
    ],
)
def test_seeds_that_are_none_are_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what would be right, and nothing is written."""
    assert train(tmp_path / "run", *flags) == 2

    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_failed_runs_end_the_command_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are in the table, and the last line names the failed run with its reason."""
    path = tmp_path / "half.yaml"
    values = {"out": str(tmp_path / "runs"), "train": {"data": "digits", "max_steps": 5, "threads": 1}}
    path.write_text(yaml.safe_dump(values | {"grid": {"model": ["mlp", "nonet"]}}))

    code = cli.main(["sweep", str(path)])

    said = capsys.readouterr()
    assert code == 1
    assert "sbm8" in said.out
    assert "1 run failed, and the same command tries again: nonet: unknown model 'nonet'" in said.err
    assert "\n" not in said.err.rstrip("\n")


def test_a_wrong_key_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code says that the request was wrong, and the line has the keys that there are."""
    path = tmp_path / "wrong.yaml"
    path.write_text("train: {model: mlp, data: digits}\ngird: {seed: [0]}\n")

    assert cli.main(["sweep", str(path)]) == 2

    assert "unknown key of a sweep 'gird'. Did you mean 'grid'" in capsys.readouterr().err


BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_shows_the_example() -> None:
    """The first file of docs/sweeps.md is examples/study.yaml, which a test above runs."""
    assert BLOCKS[0] == STUDY.read_text(encoding="utf-8")


def test_the_search_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second file is a search; two of its trials run as it says, and end in a table of the best."""
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    text = BLOCKS[1]
    Path("search.yaml").write_text(text.replace("trials: 12", "trials: 2"))

    code = cli.main(["sweep", "search.yaml"])

    said = capsys.readouterr().out
    assert code == 0
    assert "trials: 12" in text
    assert re.search(r"^trial +recipe +lr +accuracy % +GBitOPs$", said, re.MULTILINE)
    assert len(results(Path("runs", "search"))) == 2
    assert Path("runs", "search", "report.html").exists()
    assert max(map(len, said.splitlines())) <= 80
