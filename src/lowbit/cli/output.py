"""What the commands print: text, tables and the result of a run."""

from typing import Any

from lowbit.train.config import Result


def show(result: Result) -> None:
    """The result of a run and where its files are, as a table."""
    table = table_of("result", "")
    if result.test_accuracy is not None:
        table.add_row("test accuracy", f"{result.test_accuracy:.2%}")
    if result.test_bits_per_byte is not None:
        table.add_row("test bits per byte", f"{result.test_bits_per_byte:.4f}")
    table.add_row("test loss", f"{result.test_loss:.4f}")
    seconds = result.seconds_per_step
    table.add_row("seconds per step", "too few to say" if seconds is None else f"{seconds:.4g} (median)")
    table.add_row("steps", f"{result.steps:,}")
    table.add_row("recipe", f"{result.recipe}: {result.converted} of {result.layers} layers converted")
    if result.macs:
        table.add_row(
            "bit operations", f"{result.bit_operations:.4g} ({result.bit_operations / result.macs:.4g} a MAC)"
        )
    if result.memory is not None:
        table.add_row("memory of a step", f"{result.memory.total / 2**20:,.4g} MiB at most, its parts in result.json")
    if result.low is not None:
        table.add_row("range test", f"{result.low} bits, {result.out / 'range-test.txt'}")
    table.add_row("what ran", f"{result.out / 'conversion.txt'}, {result.out / 'proof.txt'}")
    table.add_row("checkpoint", str(result.out / "last.ckpt"))
    table.add_row("logs", f"{result.out / 'csv' / 'metrics.csv'}, {result.out / 'tensorboard'}")
    write(table)


def table_of(*columns: str) -> Any:
    """An empty table with these columns."""
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, header_style="bold")


def write(what: Any) -> None:
    """Text or a table, in the width of the terminal."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(what)
