"""``lowbit range-test``: the lowest precision at which a fresh model makes progress."""

from typing import Any

from lowbit.cli.output import write
from lowbit.train.config import RangeTestConfig

DESCRIPTION = "Find the lowest precision at which a fresh model makes progress, for a cyclic schedule."
HELP = "find the lowest precision that makes progress"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_class_arguments(RangeTestConfig)


def run(**settings: Any) -> None:
    """Test, and print every width's gain and the choice."""
    from lowbit.train.range_test import range_test

    write(str(range_test(RangeTestConfig(**settings))))
