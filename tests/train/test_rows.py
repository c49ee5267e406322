"""The table of a run's figures."""

import errno
import os
from pathlib import Path

import pytest

from lowbit.errors import RunError
from lowbit.train import trainer
from lowbit.train.rows import Rows


def test_damaged_rows_of_the_log_are_left_out_with_a_word(
    halfway: Path, complete: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are not a table do not stop a run: its rows from before are gone, and stderr says how many."""
    path = halfway / "csv" / "metrics.csv"
    rows = path.read_bytes().splitlines(keepends=True)
    long = b'"' + 200_000 * b"1" + b"\n"  # more than the csv module takes, after a quotation mark
    path.write_bytes(b"".join([rows[0], long, *rows[1:]]) + b"\xff\0\xfe,,,\nx,y\n")

    trainer.resume(halfway)

    assert f"3 rows of {path} are damaged and left out" in capsys.readouterr().err
    assert path.read_bytes() == (complete / "csv" / "metrics.csv").read_bytes()


def test_a_table_that_gets_a_column_is_never_without_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever write a process is killed in, the rows that were saved before are in the file."""
    path = tmp_path / "csv" / "metrics.csv"
    table = Rows(path, step=0)
    table.log_metrics({"a": 0.5}, step=1)
    table.save()
    before = path.read_bytes()
    killed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(killed))
        table.log_metrics({"b": 0.25}, step=2)
        with pytest.raises(RunError, match="No space left"):
            table.save()
        with pytest.raises(RunError, match="No space left"):
            Rows(path, step=0)
    assert path.read_bytes() == before

    table.save()
    table.log_metrics({"a": 1.0}, step=3)
    table.save()
    assert path.read_bytes() == b"a,b,step\r\n0.5,,1\r\n,0.25,2\r\n1.0,,3\r\n"
    Rows(path, step=2)
    assert path.read_bytes() == b"a,b,step\r\n0.5,,1\r\n,0.25,2\r\n"
