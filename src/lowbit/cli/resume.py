"""``lowbit resume``: continue a run from its last checkpoint."""

from pathlib import Path
from typing import Any

from lowbit.cli.output import add_progress, progress_of, show
from lowbit.launch import is_first

DESCRIPTION = "Continue a run from its last checkpoint, bit for bit."
HELP = "continue a run from its last checkpoint"
EXAMPLE = "lowbit resume runs/first"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--lr", type=float, help="from here on: peak learning rate; config.yaml keeps what changed")
    parser.add_argument("--weight-decay", type=float, help="from here on: weight decay")
    parser.add_argument("--epochs", type=int, help="from here on: passes over the training set, those done included")
    parser.add_argument("--threads", type=int, help="from here on: threads of torch")
    parser.add_argument("--checkpoint-every", type=int, help="from here on: steps between two checkpoints")
    parser.add_argument("--checkpoint-minutes", type=float, help="from here on: minutes between two checkpoints")
    parser.add_argument("--keep", type=int, help="from here on: how many checkpoints to keep")
    parser.add_argument("--data-changed", action="store_true", help="go on although the data set has changed")
    parser.add_argument("--drop-damaged", action="store_true", help="go on although lines of the ledger are damaged")
    add_progress(parser)


def run(run: Path, *, data_changed: bool, drop_damaged: bool, progress: str, **changes: Any) -> None:
    """Resume, and print the result."""
    from lowbit.train import trainer

    given = {name: value for name, value in changes.items() if value is not None}
    done = trainer.resume(
        run, given, data_changed=data_changed, drop_damaged=drop_damaged, progress=progress_of(progress)
    )
    if is_first():
        show(done)
