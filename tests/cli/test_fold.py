"""Every command's text fits 80 columns where the terminal has as many, and stays as it is in a pipe."""

import re
from pathlib import Path

import pytest
from small_run import train

from lowbit.cli import main as cli
from lowbit.cli.fold import fold_table, folded

TABLE = "a layer  product      SQNR dB  remark\n-------  -----------  -------  ------\n"
TABLE += (
    "first    grad_weight     48.1  one two\nsecond   output           3.2  three\nnote: a sentence that is long enough"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, in a folder of its own."""
    out = tmp_path_factory.mktemp("runs") / "first"
    train(out, "--recipe", "int8", "--progress", "none")
    return out


@pytest.mark.parametrize(
    "argv",
    [
        ["recipes"],
        ["recipes", "sbm8"],
        ["recipes", "dfq"],
        ["inspect", "--model", "resnet20"],
        ["inspect", "--probe", "--model", "mlp", "--data", "digits", "--batches", "1", "--budget", "0.5"],
        ["cost", "RUN"],
        ["cost", "RUN", "--hardware", "bitfusion"],
        ["cost", "--model", "resnet20", "--recipe", "cpt", "--steps", "64"],
        ["compare", "RUN"],
        ["range-test", "--model", "mlp", "--data", "digits", "--steps-per-bit", "4", "--threads", "1"],
    ],
    ids=" ".join,
)
def test_no_line_is_wider_than_the_terminal(
    argv: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns every line fits, and every figure and name of the wide text is there, whole."""
    argv = [str(run) if word == "RUN" else word for word in argv]
    monkeypatch.setenv("COLUMNS", "1000")
    cli.main(argv)
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")

    assert cli.main(argv) == 0

    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    figures = ({word.strip(",") for word in text.split() if re.search(r"\d", word)} for text in (wide, narrow))
    assert set.difference(*figures) == set()


def test_a_pipe_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal and without COLUMNS a text is not touched."""
    monkeypatch.delenv("COLUMNS", raising=False)

    assert folded(TABLE) == TABLE


def test_cells_are_folded_and_sentences_below_are_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest cells fold first; what follows the table is a sentence."""
    monkeypatch.setenv("COLUMNS", "35")

    lines = folded(TABLE).splitlines()

    assert max(map(len, lines)) <= 35
    assert [line.split() for line in lines[:2]] == [["a", "product", "SQNR", "remark"], ["layer", "dB"]]
    assert lines[-2:] == ["note: a sentence that is long", "enough"]


def test_a_table_of_words_that_are_too_long_becomes_records() -> None:
    """Each row is its first cell, and below it what the other columns say; empty cells are left out."""
    text = fold_table(("layer", "kind", "bits"), [("groups.0.body", "conv2d", "8"), ("head", "linear", "-")], 20)

    assert text == "groups.0.body\n  kind conv2d, bits\n  8\nhead\n  kind linear"
