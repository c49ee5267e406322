"""``lowbit report``: run folders as one HTML page."""

import sys
from pathlib import Path
from typing import Any

from lowbit.errors import UsageError

DESCRIPTION = (
    "Write one HTML page of run folders: accuracy against cost, curves, bits, errors, proofs. It opens offline."
)
HELP = "write a page of charts and tables of runs"
EXAMPLE = "lowbit report runs -o report.html"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders that hold them")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument(
        "--hardware", type=str, help="also estimate energy and cycles on it: bitfusion, or FILE.py:CLASS, which is run"
    )


def run(*, runs: list[Path], output: Path, hardware: str | None) -> None:
    """Write the page, and name the folders that are not in it."""
    from lowbit.hardware import accelerator
    from lowbit.report.page import write_report

    if output.is_dir():
        raise UsageError(f"--output {output} is a folder: give the name of a file, e.g. {output / 'report.html'}.")
    folders = [folder for given in runs for folder in run_folders(given)]
    estimated_on = None if hardware is None else accelerator(hardware, ())
    skipped = write_report(folders, output, hardware=estimated_on)
    for folder, reason in skipped.items():
        print(f"lowbit: not shown: {folder}: {reason}", file=sys.stderr)
    count = len(dict.fromkeys(folders)) - len(skipped)
    print(f"{output}: {count} run{'' if count == 1 else 's'}, {output.stat().st_size / 1e6:.1f} MB")


def run_folders(given: Path) -> list[Path]:
    """The folder itself, or all folders in it where it is not a run but holds some."""
    if given.is_dir() and not (given / "config.yaml").exists() and any(given.glob("*/config.yaml")):
        return sorted(path for path in given.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [given]
