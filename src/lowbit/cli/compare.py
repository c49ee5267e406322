"""``lowbit compare``: run folders side by side."""

import sys
from pathlib import Path
from typing import Any

from lowbit.cli.fold import folded
from lowbit.cli.report import run_folders
from lowbit.errors import UsageError

DESCRIPTION = (
    "Compare runs: scores over seeds with intervals, bit operations, seconds, memory and energy against a baseline. "
    "Runs whose settings differ in the seed alone are one row."
)
HELP = "compare runs in one table, or test whether two settings are equal"
EXAMPLE = "lowbit compare runs"
FORMATS = ("json", "csv", "markdown")


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders that hold them")
    parser.add_argument("--baseline", type=str, help="setting or recipe to relate others to (fp32, or the first)")
    parser.add_argument("--equal", type=float, help="test whether two settings are equal within so many points")
    parser.add_argument("--force", action="store_true", help="compare runs of several models or data sets")
    for name in FORMATS:
        parser.add_argument(f"--{name}", action="store_true", help=f"write {name} instead of a table")


def run(*, runs: list[Path], baseline: str | None, equal: float | None, force: bool, **formats: bool) -> None:
    """Print the comparison, and name the folders that are not in it."""
    from lowbit.report.compare import compare, equality
    from lowbit.report.reading import views_of

    asked = [name for name in FORMATS if formats[name]]
    if len(asked) > 1 or (asked and equal is not None):
        words = " and ".join(f"--{name}" for name in [*asked, *(["equal"] if equal is not None else [])])
        raise UsageError(f"{words} do not go together: give one of them")
    views, skipped = views_of([folder for given in runs for folder in run_folders(given)])
    for folder, reason in skipped.items():
        print(f"lowbit: not compared: {folder}: {reason}", file=sys.stderr)
    found = compare(views, baseline=baseline, force=force)
    if asked:
        print({"json": found.to_json, "csv": found.to_csv, "markdown": found.to_markdown}[asked[0]]().rstrip("\n"))
        return
    print(folded(str(found)))
    if equal is not None:
        print(folded(f"\n{equality(views, equal)}"))
