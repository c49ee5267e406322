"""``lowbit range-test``: the lowest precision at which a fresh model makes progress."""

from typing import Any

from lowbit.cli.fold import folded
from lowbit.cli.output import add_progress, progress_of, write

DESCRIPTION = "Find the lowest precision at which a fresh model makes progress, for a cyclic schedule."
HELP = "find the lowest precision that makes progress"
EXAMPLE = "lowbit range-test --model resnet20 --data fashion-mnist"
_GROUPS = {
    "model and data": ("model", "data", "recipe", "batch_size", "subset"),
    "the test": ("low", "high", "backward", "steps_per_bit", "measure", "gain", "significance", "every"),
    "training": ("optimizer", "lr", "seed", "threads"),
}


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    from lowbit.train.config import RangeTestConfig

    add_progress(parser)
    parser.add_class_arguments(RangeTestConfig, _GROUPS, rest="further settings")


def run(*, progress: str, **settings: Any) -> None:
    """Test, and print every width's gain and the choice."""
    from lowbit.train.config import RangeTestConfig
    from lowbit.train.range_test import range_test

    write(folded(str(range_test(RangeTestConfig(**settings), progress_of(progress)))))
