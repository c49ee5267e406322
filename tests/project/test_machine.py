from collections.abc import Callable

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.kernels import native_instruction_sets
from lowbit.machine import here, paired, ratio


def test_a_machine_says_what_a_figure_depends_on() -> None:
    """Versions, instruction sets and threads stand in the line beside a figure."""
    line = str(here())

    assert f"torch {torch.__version__}" in line
    assert " ".join(native_instruction_sets() or ["no native kernels"]) in line
    assert f"{torch.get_num_threads()} thread" in line


def test_another_number_of_threads_is_another_machine() -> None:
    """Threads are part of what a figure depends on; asking twice changes nothing."""
    one, before = here(), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        more = here()
    finally:
        torch.set_num_threads(before)

    assert more != one
    assert here() == one


def _steps(names: str, order: list[str]) -> dict[str, Callable[[], object]]:
    return {name: lambda name=name: order.append(name) for name in names}


def test_rounds_run_every_step_once_in_rotating_order() -> None:
    """Each round has each step once, and each step is first in its turn."""
    order: list[str] = []

    seconds = paired(_steps("abc", order), 3, warm_up=0)

    assert "".join(order) == "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abc", 3)


def test_warm_up_runs_and_does_not_count() -> None:
    """Rounds of warm-up run every step and give no time."""
    order: list[str] = []

    seconds = paired(_steps("ab", order), 1, warm_up=2)

    assert sorted(order) == sorted("ab" * 3)
    assert [len(taken) for taken in seconds.values()] == [1, 1]


def test_no_round_is_refused() -> None:
    """Fewer than one round would have no median."""
    with pytest.raises(UsageError, match="at least 1, got 0"):
        paired({"a": int}, 0)


def test_a_ratio_is_taken_within_rounds() -> None:
    """A round that is slow for both steps changes nothing: the median of ratios, not the ratio of medians."""
    assert ratio([1.0, 90.0, 2.0], [0.5, 30.0, 1.0]) == 2.0
