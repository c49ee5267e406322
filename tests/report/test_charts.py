import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lowbit import UsageError, metrics
from lowbit.report import charts, run_charts
from lowbit.report.reading import view_of, views_of
from lowbit.report.views import View


def _views(runs: dict[str, Path], *names: str) -> list[View]:
    views, skipped = views_of([runs[name] for name in names])
    assert not skipped
    return views


def _trace(chart: charts.Chart, **meta: str) -> dict[str, Any]:
    (found,) = [trace for trace in chart["data"] if meta.items() <= trace.get("meta", {}).items()]
    return dict(found)


def test_a_front_is_what_nothing_beats() -> None:
    """A point is on the front if no cheaper one is as good."""
    points = {"a": (1.0, 5.0), "b": (2.0, 5.0), "c": (2.0, 7.0), "d": (3.0, 6.0), "e": (4.0, 9.0)}

    assert charts.front(points, higher_is_better=True) == ["a", "c", "e"]
    assert charts.front(points, higher_is_better=False) == ["a"]


def test_means_are_of_complete_runs(runs: dict[str, Path]) -> None:
    """The large mark is the mean over seeds with its deviation; an unfinished run is hollow and not in it."""
    views = _views(runs, "int8-0", "int8-1", "stopped")
    scores = [view.score for view in views[:2]]
    chart = charts.accuracy_vs_cost(views)
    mean, run = _trace(chart, role="mean"), _trace(chart, role="run")

    assert mean["y"] == [statistics.fmean(s for s in scores if s is not None)]
    assert mean["error_y"]["array"] == [statistics.stdev(s for s in scores if s is not None)]
    assert [symbol.endswith("-open") for symbol in run["marker"]["symbol"]] == [False, False, True]


@pytest.mark.parametrize("metric", [metric.name for metric in metrics.METRICS])
def test_costs_are_the_metric_of_the_ledger(runs: dict[str, Path], metric: str) -> None:
    """Both charts of costs show what the metric gives for the run's ledger."""
    (view,) = _views(runs, "cpt-0")
    terms = charts.metric_of(metric)(view.ledger.totals())
    bars = charts.cost_by_product([view], metric)

    assert _trace(charts.accuracy_vs_cost([view], metric), role="mean")["x"] == [terms.total]
    assert [trace["x"] for trace in bars["data"]] == [[terms.output], [terms.grad_input], [terms.grad_weight]]


def test_curves_show_the_logged_rows(runs: dict[str, Path]) -> None:
    """A short curve has every row; accuracies are in percent; against cost the steps become bit operations."""
    (view,) = _views(runs, "fp32-0")
    steps, values = view.columns["test_accuracy"]
    curve = charts.curves([view], "test_accuracy")["data"][0]
    against_cost = charts.curves([view], "test_accuracy", "cost")["data"][0]

    assert curve["x"] == list(steps)
    assert curve["y"] == pytest.approx([100 * value for value in values], rel=1e-4)
    assert against_cost["x"][-1] == pytest.approx(view.costs["GBitOPs"].total, rel=1e-5)


def test_long_curves_are_thinned_to_means() -> None:
    """100 rows in at most 10 points become means of 10, and the last value stays."""
    steps, values = list(range(1, 101)), [float(i) for i in range(100)]

    x, y = charts.thinned(steps, values, 10)

    assert len(x) == 10
    assert y[:2] == [4.5, 14.5]
    assert (x[-1], y[-1]) == (100, 99.0)


def test_costs_by_layer_add_up(runs: dict[str, Path]) -> None:
    """The bars of all layers and products sum to the metric of the run."""
    (view,) = _views(runs, "cpt-0")
    chart = run_charts.cost_by_layer(view.ledger.totals())

    assert sum(sum(trace["x"]) for trace in chart["data"]) == pytest.approx(view.costs["GBitOPs"].total, rel=1e-5)


def test_errors_are_those_of_the_proof(runs: dict[str, Path]) -> None:
    """int8 has an error in each product of a converted layer, fp32 is exact and has none."""
    (quantised, exact) = _views(runs, "int8-0", "fp32-0")
    shown = [value for trace in run_charts.sqnr(quantised.errors)["data"] for value in trace["x"]]
    angles = [value for trace in run_charts.angle(quantised.errors)["data"] for value in trace["x"]]

    assert shown == [float(f"{e.sqnr_db:.5g}") for p in metrics_order(quantised) for e in p if e.sqnr_db is not None]
    assert all(0 < value < 30 for value in angles[:3])
    assert [trace["x"] for trace in run_charts.sqnr(exact.errors)["data"]] == [[], [], []]


def metrics_order(view: View) -> Sequence[Sequence[Any]]:
    """The errors of a view grouped by product, in the order of the chart."""
    products = dict.fromkeys(error.product for error in view.errors)
    return [[error for error in view.errors if error.product == product] for product in products]


def test_gates_are_shown_as_shares(runs: dict[str, Path]) -> None:
    """Each choice is a share of the samples of a block, and the shares of a block make 100 %."""
    chart = run_charts.gates(view_of(runs["dfq-0"]))

    assert {trace["name"]: trace["x"] for trace in chart["data"]} == {"3/6 bits": [25.0], "4/8 bits": [75.0]}
    assert len(run_charts.gate_cost(view_of(runs["dfq-0"]))["data"]) == 2


def test_a_run_without_gates_has_no_chart_of_them(runs: dict[str, Path]) -> None:
    """It is an error that names the run."""
    with pytest.raises(UsageError, match="cpt-0: no gates"):
        run_charts.gates(view_of(runs["cpt-0"]))


def test_names_are_literal_in_charts() -> None:
    """Plotly reads tags in texts, so a name that looks like one is escaped."""
    assert charts.text("<b>x</b> & \n y") == "&lt;b&gt;x&lt;/b&gt; &amp; y"


def test_tasks_are_not_mixed(runs: dict[str, Path]) -> None:
    """Runs on several data sets have no common chart of accuracy."""
    views = _views(runs, "int8-0")
    other = View(**{**vars(views[0]), "task": "mlp on others"})

    with pytest.raises(UsageError, match="mlp on digits, mlp on others"):
        charts.accuracy_vs_cost([*views, other])


@pytest.mark.parametrize(
    ("draw", "known"),
    [
        (lambda views: charts.curves(views, "loss"), "train_loss"),
        (lambda views: charts.curves(views, "train_loss", "time"), "cost"),
        (lambda views: charts.cost_by_product(views, "gbitops"), "GBitOPs"),
        (lambda views: run_charts.bits(views[0].ledger, "output", "grad_output"), "weight of output"),
    ],
)
def test_unknown_names_are_refused(runs: dict[str, Path], draw: Any, known: str) -> None:
    """The message names what is known."""
    with pytest.raises(UsageError, match=known):
        draw(_views(runs, "int8-0"))
