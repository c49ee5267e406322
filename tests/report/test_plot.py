from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import gated, make_run
from torch import nn

import lowbit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a schedule whose table has what gates log."""
    base = tmp_path_factory.mktemp("plot")
    return gated(make_run(base / "run", "cpt", cycles=4), base / "gated")


RUNS: dict[str, Callable[[Path], Any]] = {
    "accuracy_vs_cost": lambda run: lowbit.plot.accuracy_vs_cost([run]),
    "curves": lambda run: lowbit.plot.curves([str(run)]),
    "cost_by_product": lambda run: lowbit.plot.cost_by_product([run], "MACs"),
    "bits": lambda run: lowbit.plot.bits(run, "grad_input", "weight"),
    "cost_by_layer": lowbit.plot.cost_by_layer,
    "work_by_engine": lowbit.plot.work_by_engine,
    "energy": lambda run: lowbit.plot.energy(run, lowbit.hardware.BitFusion()),
    "sqnr": lowbit.plot.sqnr,
    "angle": lowbit.plot.angle,
    "gates": lowbit.plot.gates,
    "gate_cost": lowbit.plot.gate_cost,
}


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_is_one_that_plotly_takes(run: Path, name: str) -> None:
    """Plotly checks each attribute of the chart; there is data in it, and a title."""
    figure = RUNS[name](run)

    assert sum(len(trace.y) for trace in figure.data) > 0
    assert figure.layout.title.text


def test_every_function_is_tried() -> None:
    """The test above has all functions of the module."""
    assert sorted(RUNS) == sorted(lowbit.plot.__all__)


def test_figures_take_ledgers_and_proofs() -> None:
    """Without a run folder, a plan has its bits and a verified step its errors."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, "int8")
    with lowbit.verify(model) as proof:
        model(torch.randn(2, 8)).sum().backward()
    ledger = lowbit.plan(model, torch.zeros(2, 8), steps=3)

    assert [list(row) for row in lowbit.plot.bits(ledger).data[0].z] == [[8, 8, 8]] * 2
    assert list(lowbit.plot.sqnr(proof).data[0].y) == ["0", "2"]


def test_a_single_path_is_not_a_list_of_runs(run: Path) -> None:
    """A text in place of a list would be read letter by letter, so it is refused."""
    with pytest.raises(lowbit.UsageError, match="runs"):
        lowbit.plot.curves(str(run))


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    """A figure does not leave a folder out silently."""
    with pytest.raises(lowbit.UsageError, match="not a run folder"):
        lowbit.plot.curves([tmp_path])
