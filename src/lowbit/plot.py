"""Figures of runs, ledgers and proofs for notebooks; the report page draws the same charts.

Each function returns a plotly figure, which a notebook shows and which `write_html` saves. A run is its folder. Install
with ``pip install 'lowbit[report]'``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.proof import Proof
from lowbit.hardware import Accelerator
from lowbit.inputs.checks import checked
from lowbit.report import charts, run_charts
from lowbit.report.cost import Cost
from lowbit.report.reading import errors_of, views_of
from lowbit.report.views import View

Folder: TypeAlias = Path | str
Figure: TypeAlias = Any
"""A ``plotly.graph_objects.Figure``."""

__all__ = [
    "accuracy_vs_cost",
    "angle",
    "bits",
    "cost_by_layer",
    "cost_by_product",
    "curves",
    "energy",
    "gate_cost",
    "gates",
    "sqnr",
    "work_by_engine",
]


@checked
def accuracy_vs_cost(runs: Sequence[Folder], metric: str = "GBitOPs") -> Figure:
    """The score of runs against their cost: single runs, means over seeds with their spread, and the Pareto front.

    Args:
        runs: run folders of one model on one data set.
        metric: name of a cost metric, see `lowbit.metrics.METRICS`.

    Raises:
        UsageError: there is no run, the runs have several tasks, or the metric is unknown.
        RunError: a folder cannot be read, or plotly is missing.
    """
    return _figure(charts.accuracy_vs_cost(_views(runs), metric))


@checked
def curves(runs: Sequence[Folder], quantity: str = "train_loss", against: str = "step") -> Figure:
    """A logged figure of each run over its steps or over its bit operations so far.

    Args:
        runs: run folders.
        quantity: ``"train_loss"``, ``"test_loss"``, ``"train_accuracy"``, ``"test_accuracy"``,
            ``"test_bits_per_byte"`` or ``"train_lr"``.
        against: ``"step"`` or ``"cost"``.

    Raises:
        UsageError: there is no run, or a name is unknown.
        RunError: a folder cannot be read, or plotly is missing.
    """
    return _figure(charts.curves(_views(runs), quantity, against))


@checked
def cost_by_product(runs: Sequence[Folder], metric: str = "GBitOPs") -> Figure:
    """What the three products cost in each setting, the mean over its runs.

    Args:
        runs: run folders.
        metric: name of a cost metric.

    Raises:
        UsageError: there is no run, or the metric is unknown.
        RunError: a folder cannot be read, or plotly is missing.
    """
    return _figure(charts.cost_by_product(_views(runs), metric))


@checked
def bits(run: Folder | Ledger, product: str = "output", operand: str = "input") -> Figure:
    """The bits of one operand in every converted layer over the steps: a heat map.

    Args:
        run: a run folder, or a ledger, e.g. of `lowbit.plan`.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        operand: ``"input"``, ``"weight"`` or ``"grad_output"``.

    Raises:
        UsageError: it is not a run folder, or no converted layer ran this operand.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.bits(_ledger(run), product, operand))


@checked
def cost_by_layer(run: Folder | Ledger, metric: str = "GBitOPs") -> Figure:
    """What each layer costs by product.

    Args:
        run: a run folder or a ledger.
        metric: name of a cost metric.

    Raises:
        UsageError: it is not a run folder, or the metric is unknown.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.cost_by_layer(_ledger(run).totals(), metric))


@checked
def work_by_engine(run: Folder | Ledger) -> Figure:
    """The multiply-accumulates that each engine executed, by product.

    Raises:
        UsageError: it is not a run folder.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.work_by_engine(_ledger(run).totals()))


@checked
def energy(run: Folder | Ledger, hardware: Accelerator) -> Figure:
    """Where the energy of the products goes on a modelled accelerator: its units and its stores.

    Args:
        run: a run folder or a ledger.
        hardware: e.g. `lowbit.hardware.BitFusion()`.

    Raises:
        UsageError: it is not a run folder, or the accelerator has an estimate for no product.
        RunError: the folder cannot be read, the accelerator raised an error, or plotly is missing.
    """
    cost = Cost(_ledger(run), hardware)
    if not (estimates := cost.on_hardware()):
        reasons = "; ".join(cost.not_estimated())
        raise UsageError(f"{type(hardware).__name__} has an estimate for no product of {run}: {reasons}")
    return _figure(run_charts.energy_on(type(hardware).__name__, estimates))


@checked
def sqnr(run: Folder | Proof) -> Figure:
    """Signal to quantisation noise of each product by layer, in dB, of a proof or of the proof of a run.

    Raises:
        UsageError: it is not a run folder, or has no proof.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.sqnr(_errors(run)))


@checked
def angle(run: Folder | Proof) -> Figure:
    """The angle of each product to full precision by layer, in degrees, of a proof or of the proof of a run.

    Raises:
        UsageError: it is not a run folder, or has no proof.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.angle(_errors(run)))


@checked
def gates(run: Folder) -> Figure:
    """How often the gates of a run chose each pair of bits, by block.

    Raises:
        UsageError: it is not a run folder, or no gates ran in it.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.gates(_views([run])[0]))


@checked
def gate_cost(run: Folder) -> Figure:
    """The cost of the gated blocks over the steps, and its target.

    Raises:
        UsageError: it is not a run folder, or no gates ran in it.
        RunError: the folder cannot be read, or plotly is missing.
    """
    return _figure(run_charts.gate_cost(_views([run])[0]))


def _views(runs: Sequence[Folder]) -> list[View]:
    if isinstance(runs, str):
        raise UsageError(f"runs={runs!r}: give a list of folders, e.g. [{runs!r}]")
    views, skipped = views_of(map(Path, runs))
    if skipped or not views:
        raise UsageError("; ".join(skipped.values()) or "no run was given")
    return views


def _ledger(run: Folder | Ledger) -> Ledger:
    return run if isinstance(run, Ledger) else _views([run])[0].ledger


def _errors(run: Folder | Proof) -> Sequence[Any]:
    found = errors_of(run.to_dict()) if isinstance(run, Proof) else _views([run])[0].errors
    if not found:
        raise UsageError("there is no proof to show" if isinstance(run, Proof) else f"{run} has no proof.json to show")
    return found


def _figure(chart: charts.Chart) -> Figure:
    try:
        from plotly.graph_objects import Figure as PlotlyFigure  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise RunError(f"figures need {error.name}: pip install 'lowbit[report]'") from error

    return PlotlyFigure(data=chart["data"], layout=chart["layout"])
