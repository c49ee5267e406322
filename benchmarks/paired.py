"""Paired rounds: variants of one step timed in turn in one process, so that a slow moment meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def seconds(steps: Mapping[str, Callable[[], None]], rounds: int, *, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each step in each round; a round runs every step once, in an order that rotates.

    Args:
        steps: what to run, by name.
        rounds: rounds that count.
        warm_up: rounds before them that do not.
    """
    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warm_up, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            steps[name]()
            if i >= 0:
                taken[name].append(time.perf_counter() - began)
    return taken


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median over rounds of one step's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
