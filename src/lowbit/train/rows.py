"""The figures of a run as a table, ``csv/metrics.csv``, that loses no row to a killed process."""

import csv
import io
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lowbit.inputs import files

_AT_ONCE = 10  # rows that may wait for the next checkpoint


class Rows(Logger):
    """A row for each call of `log_metrics`; columns are sorted by name, and come as they are needed.

    Lightning's own logger deletes the file at each start, and writes it in place where a column is new.

    Args:
        path: the file; its folder is made.
        step: rows of later steps are dropped from a file that is there.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        super().__init__()
        self.path = path
        path.parent.mkdir(exist_ok=True)
        self._rows = _up_to(path, step)
        self._written = 0
        self._columns: list[str] = []
        if path.exists() or path.is_symlink():
            self.save()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """There is one table."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """``config.yaml`` has the settings."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row of figures after `step` steps."""
        assert step is not None
        self._rows.append({**metrics, "step": step})
        if len(self._rows) - self._written >= _AT_ONCE:
            self.save()

    def save(self) -> None:
        """Write the rows that are not in the file."""
        columns = sorted({"step"}.union(*self._rows))
        if columns != self._columns:
            files.write_text(self.path, _text(columns, self._rows, header=True))
        elif self._written < len(self._rows):
            number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(number, "ab") as file:
                file.write(_text(columns, self._rows[self._written :], header=False).encode())
                file.flush()
                os.fsync(number)
        self._columns, self._written = columns, len(self._rows)

    def finalize(self, status: str) -> None:  # noqa: ARG002 - Lightning's name
        """Write what is left at the end of the run."""
        self.save()


def _text(columns: list[str], rows: list[dict[str, float]], *, header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _up_to(path: Path, step: int) -> list[dict[str, float]]:
    """The rows of a table that are not of later steps; those that are damaged are left out with a word on stderr."""
    if not path.is_file():
        return []
    text = files.read_whole(path).decode(errors="replace")
    lines = text.split("\n")[:-1]  # a killed process may have left half a line
    rows: list[dict[str, float]] = []
    damaged = 0
    for line in lines[1:]:
        try:
            # Line by line: a stray quotation mark would take in the lines after it.
            columns, row = csv.reader([lines[0], line])
            values = {key: float(value) for key, value in zip(columns, row, strict=True) if value}
            number = values["step"] = int(values["step"])
        except (ValueError, KeyError, OverflowError, csv.Error):
            damaged += 1
            continue
        if number <= step:
            rows.append(values)
    if damaged:
        print(f"lowbit: {damaged} rows of {path} are damaged and left out", file=sys.stderr)
    return rows
