from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import lowbit
from lowbit import metrics
from lowbit.report.reading import view_of
from lowbit.report.timeline import bit_operations_so_far, bits_over_time


def _plan() -> lowbit.Ledger:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, "sbm8", rules=[("0", None)])
    pieces = lowbit.schedules.Piecewise(pieces=[(0, 4), (3, 8)], total_steps=7)
    return lowbit.plan(model, torch.zeros(2, 8), steps=7, forward=pieces, backward=8)


def test_bits_follow_the_schedule() -> None:
    """With a column for each step the table has the bits of the schedule, and only converted layers."""
    table = bits_over_time(_plan())["output", "input"]

    assert table.layers == ["2"]
    assert table.values == [[4.0, 4.0, 4.0, 8.0, 8.0, 8.0, 8.0]]
    assert list(table.steps) == list(range(7))


def test_a_column_is_the_mean_of_its_steps() -> None:
    """Seven steps in at most three columns make columns of three, three and one."""
    table = bits_over_time(_plan(), columns=3)["output", "input"]

    assert (table.width, list(table.steps)) == (3, [0, 3, 6])
    assert table.values == [[4.0, 8.0, 8.0]]


def test_the_cost_so_far_ends_at_the_metric(runs: dict[str, Path]) -> None:
    """The last of the running sums is the run's GBitOPs, and the sums rise with each step."""
    ledger = view_of(runs["cpt-0"]).ledger
    sums = bit_operations_so_far(ledger)

    assert sums[-1] == 1e9 * metrics.gbitops(ledger.totals()).total
    assert len(sums) == 20
    assert all(b > a for a, b in pairwise(sums))
