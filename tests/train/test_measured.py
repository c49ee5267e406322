"""Seconds and joules beside the ledger."""

import json
from pathlib import Path

import pytest

from lowbit.cli import main as cli
from lowbit.train import trainer


def test_a_torn_line_of_measurements_is_not_written(halfway: Path) -> None:
    """The file of measurements is whole after each start."""
    trainer.resume(halfway)

    lines = (halfway / "measured.jsonl").read_text().splitlines()
    assert [json.loads(line)["to_step"] for line in lines] == [7, 15]


def test_damaged_measurements_stay_and_stop_nothing(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8, without an end of line, stay as they are; the run ends, and `cost` names the file."""
    path = halfway / "measured.jsonl"
    path.write_bytes(b"\xb5{")

    assert trainer.resume(halfway).steps == 15

    damaged, start = path.read_bytes().splitlines()
    assert damaged == b"\xb5{"
    assert json.loads(start)["to_step"] == 15
    assert cli.main(["cost", str(halfway)]) == 1
    assert f"{path} is damaged" in capsys.readouterr().err
