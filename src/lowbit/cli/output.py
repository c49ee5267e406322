"""What the commands print: text, tables that fit the terminal, and the result of a run."""

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowbit.cli.fold import fold_table

if TYPE_CHECKING:  # help must not wait for torch
    from lowbit.train.config import Result
    from lowbit.train.progress import Progress


def add_progress(group: Any) -> None:
    """The flag that says how progress is shown."""
    words = ("auto", "bar", "lines", "none")
    meaning = "bar, lines every few seconds, or none (auto: a bar on a terminal, else lines); on stderr"
    group.add_argument("--progress", choices=words, default="auto", metavar="NAME", help=meaning)


def progress_of(shown: Any) -> "Progress":
    """What shows the progress of a command as its flag says."""
    from lowbit.train import progress

    return progress.progress_of(shown)


def show(result: "Result") -> None:
    """The result of a run and where its files are, as a table."""
    rows = []
    if result.test_accuracy is not None:
        rows.append(("test accuracy", f"{result.test_accuracy:.2%}"))
    if result.test_bits_per_byte is not None:
        rows.append(("test bits per byte", f"{result.test_bits_per_byte:.4f}"))
    if rows:
        rows.append(("test loss", f"{result.test_loss:.4f}"))
    else:
        rows.append(("test", "none: --evaluate never"))
    seconds = result.seconds_per_step
    rows.append(("seconds per step", "too few to say" if seconds is None else f"{seconds:.4g} (median)"))
    rows.append(("steps", f"{result.steps:,}"))
    rows.append(("recipe", f"{result.recipe}: {result.converted} of {result.layers} layers converted"))
    if result.macs:
        each = result.bit_operations / result.macs
        rows.append(("bit operations", f"{result.bit_operations:.4g} ({each:.4g} a MAC)"))
    if result.memory is not None:
        mib = f"{result.memory.total / 2**20:,.4g} MiB"
        rows.append(("memory of a step", f"{mib} at most, its parts in result.json"))
    if result.low is not None:
        rows.append(("range test", f"{result.low} bits, {result.out / 'range-test.txt'}"))
    reports = [path for path in (result.out / "conversion.txt", result.out / "proof.txt") if path.exists()]
    rows.append(("what ran", ", ".join(map(str, reports))))
    rows.append(("checkpoint", str(result.out / "last.ckpt")))
    rows.append(("logs", f"{result.out / 'csv' / 'metrics.csv'}, {result.out / 'tensorboard'}"))
    write(fitted(("result", ""), rows))


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are wrapped between words, the widest first, until it fits the terminal if it can.

    Args:
        header: column titles.
        rows: cells as text, each row as long as the header.
    """
    return fold_table(header, rows, shutil.get_terminal_size().columns)


def write(text: str) -> None:
    """Text as it is, but for what would move the cursor."""
    print("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
