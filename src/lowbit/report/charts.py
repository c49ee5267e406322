"""Charts that compare runs, as plain values that plotly draws: ``{"data": traces, "layout": layout}``.

A trace, or each of its points, carries the label of its runs in ``meta``, by which the page filters.
"""

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import UsageError, unknown
from lowbit.evidence.metrics import METRICS, Metric
from lowbit.evidence.records import PRODUCTS
from lowbit.report.timeline import bit_operations_so_far
from lowbit.report.views import View

Chart = dict[str, Any]

# Each has a contrast of at least 3 to 1 on white and on the page's dark ground.
COLOURS = ("#2f7ed8", "#d9660b", "#0a9670", "#c2459a", "#8064d8", "#c9443c", "#0b8fa3", "#8a7a00", "#6b7a90", "#a1622f")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "pentagon", "star", "triangle-down", "hexagon", "cross")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
OF_PRODUCT = dict(zip(PRODUCTS, ("#2f7ed8", "#d9660b", "#0a9670"), strict=True))

QUANTITIES = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy %",
    "train_accuracy": "training accuracy %",
    "test_bits_per_byte": "test bits per byte",
    "train_lr": "learning rate",
}
"""The logged figures that `curves` draws, with their titles."""

AGAINST = {"step": "step", "cost": "10⁹ bit operations so far"}


def text(value: object) -> str:
    """Any text as plotly shows it literally: its labels take a few tags of HTML."""
    return html.escape(" ".join(str(value).split()), quote=False)


def styles(views: Sequence[View]) -> dict[str, dict[str, str]]:
    """Colour, symbol and dash of each label, in the order of first appearance."""
    return {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "symbol": SYMBOLS[i % len(SYMBOLS)],
            "dash": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        for i, label in enumerate(dict.fromkeys(view.label for view in views))
    }


def layout(title: str, x: str, y: str, **rest: Any) -> dict[str, Any]:
    """A layout with titles; `rest` is added, axes one level deep."""
    whole: dict[str, Any] = {
        "title": {"text": text(title)},
        "xaxis": {"title": {"text": text(x)}, "automargin": True},
        "yaxis": {"title": {"text": text(y)}, "automargin": True},
        "legend": {"orientation": "h", "y": -0.25},
        "hovermode": "closest",
    }
    for name, value in rest.items():
        whole[name] = {**whole[name], **value} if isinstance(whole.get(name), dict) else value
    return whole


def metric_of(name: str) -> Metric:
    """The metric of this name.

    Raises:
        UsageError: there is none.
    """
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise unknown("cost metric", name, [metric.name for metric in METRICS])


def by_label(views: Sequence[View]) -> dict[str, list[View]]:
    """The runs of each label, in the order of first appearance."""
    groups: dict[str, list[View]] = {}
    for view in views:
        groups.setdefault(view.label, []).append(view)
    return groups


def front(points: Mapping[str, tuple[float, float]], *, higher_is_better: bool) -> list[str]:
    """The names of the points (cost, score) that no other point beats in both, from the cheapest on."""
    sign = 1 if higher_is_better else -1
    best: list[str] = []
    top = -float("inf")
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * score > top:
            best.append(name)
            top = sign * score
    return best


def accuracy_vs_cost(views: Sequence[View], metric: str = "GBitOPs") -> Chart:
    """The score of each run against its cost, the mean of each label with its standard deviation, and the Pareto front.

    Means and the front are of complete runs; a run without an end is an open symbol.
    """
    task = one_task(views)
    asked, style = metric_of(metric), styles(views)
    traces: list[dict[str, Any]] = []
    means: dict[str, tuple[float, float]] = {}
    for label, group in by_label(views).items():
        scored = [view for view in group if view.score is not None]
        points = {view.name: (view.costs[metric].total, view.score or 0.0) for view in scored}
        ended = [points[view.name] for view in scored if view.complete]
        mark = {"color": style[label]["color"], "symbol": style[label]["symbol"]}
        if scored:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": text(label),
                    "x": [points[view.name][0] for view in scored],
                    "y": [points[view.name][1] for view in scored],
                    "text": [text(view.name if view.complete else f"{view.name} (unfinished)") for view in scored],
                    "marker": {
                        **mark,
                        "symbol": [mark["symbol"] + ("" if view.complete else "-open") for view in scored],
                        "size": 6,
                        "opacity": 0.55,
                    },
                    "hovertemplate": "%{text}<br>%{y:.4~g} at %{x:.4~g}<extra></extra>",
                    "showlegend": False,
                    "meta": {"label": label, "role": "run"},
                }
            )
        if ended:
            cost, score = (statistics.fmean(values) for values in zip(*ended, strict=True))
            means[label] = (cost, score)
            spread = statistics.stdev(score for _, score in ended) if len(ended) > 1 else 0.0
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers+text",
                    "name": text(label),
                    "x": [cost],
                    "y": [score],
                    "text": [f"\u2002{text(label)}\u2002"],
                    "textposition": "middle right",
                    "cliponaxis": False,
                    "error_y": {"type": "data", "array": [spread], "visible": len(ended) > 1},
                    "marker": {**mark, "size": 12},
                    "hovertemplate": f"%{{text}}, mean of {len(ended)}<br>%{{y:.4~g}} at %{{x:.4~g}}<extra></extra>",
                    "meta": {"label": label, "role": "mean"},
                }
            )
    dearest = max(means, key=lambda label: means[label][0], default="")
    for trace in traces:  # names stand beside the bars of the spread, and within the chart
        if trace["meta"] == {"label": dearest, "role": "mean"} and len(means) > 1:
            trace["textposition"] = "middle left"
    best = front(means, higher_is_better=all(view.higher_is_better for view in views))
    traces.insert(
        0,
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [means[label][0] for label in best],
            "y": [means[label][1] for label in best],
            "line": {"dash": "dot", "width": 1.5, "color": "#7a8599"},
            "hoverinfo": "skip",
            "meta": {"role": "front"},
        },
    )
    better = "" if all(view.higher_is_better for view in views) else ", lower is better"
    return {
        "data": traces,
        "layout": layout(
            f"{views[0].score_name.capitalize()} against cost, {task}",
            f"{asked.name} ({asked.unit}), whole run",
            f"{_score_title(views)}{better}",
            xaxis=_log_axis([x for trace in traces for x in trace["x"]]),
            showlegend=False,
        ),
    }


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """An axis by powers with marks at 1, 2 and 5, or an even one where the values are close or 0."""
    if not values or min(values) <= 0 or max(values) / min(values) < 3:
        return {"type": "linear"}
    low, high = (math.floor(math.log10(value)) for value in (min(values) / 2, 2 * max(values)))
    marks = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": marks, "ticktext": [f"{mark:,g}" for mark in marks]}


def _score_title(views: Sequence[View]) -> str:
    return "test accuracy %" if views[0].higher_is_better else "test bits per byte"


def one_task(views: Sequence[View]) -> str:
    """The task of these runs.

    Raises:
        UsageError: there is no run, or they have several tasks: their scores and costs cannot be compared.
    """
    tasks = list(dict.fromkeys(view.task for view in views))
    if len(tasks) != 1:
        raise UsageError(
            "no run to show" if not tasks else f"runs of {', '.join(tasks)}: give runs of one model on one data set"
        )
    return tasks[0]


def thinned(steps: Sequence[float], values: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """At most about `points` points of a curve, each the mean of neighbours, and its last point as it is."""
    size = -(-len(steps) // points)
    if size <= 1:
        return list(steps), [float(f"{value:.5g}") for value in values]
    x = [float(steps[min(i + size, len(steps)) - 1]) for i in range(0, len(steps), size)]
    y = [float(f"{statistics.fmean(values[i : i + size]):.5g}") for i in range(0, len(values), size)]
    return [*x[:-1], float(steps[-1])], [*y[:-1], float(f"{values[-1]:.5g}")]


def curves(views: Sequence[View], quantity: str = "train_loss", against: str = "step", *, points: int = 1000) -> Chart:
    """A logged figure of each run over its steps, or over its bit operations so far.

    Args:
        views: runs.
        quantity: one of `QUANTITIES`.
        against: ``"step"`` or ``"cost"``.
        points: the most points of a curve; with more, each point is the mean of neighbours.
    """
    if quantity not in QUANTITIES:
        raise unknown("figure", quantity, QUANTITIES)
    if against not in AGAINST:
        raise unknown("axis", against, AGAINST)
    style, scale = styles(views), 100 if quantity.endswith("accuracy") else 1
    traces = []
    for view in views:
        steps, values = view.columns.get(quantity, ((), ()))
        if not steps:
            continue
        x, y = thinned(steps, [scale * value for value in values], points)
        if against == "cost":
            so_far, first = bit_operations_so_far(view.ledger), view.ledger.first_step
            x = [float(f"{so_far[min(max(int(step) - first, 1), len(so_far)) - 1] / 1e9:.6g}") for step in x]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(x) > 1 else "markers",
                "name": text(view.name),
                "x": x,
                "y": y,
                "line": {"color": style[view.label]["color"], "dash": style[view.label]["dash"], "width": 1.6},
                "marker": {"color": style[view.label]["color"]},
                "hovertemplate": "%{fullData.name}<br>%{y:.4~g} at %{x:.6~g}<extra></extra>",
                "showlegend": len(views) <= 12,
                "meta": {"label": view.label, "role": "run", "run": view.name},
            }
        )
    title = QUANTITIES[quantity]
    return {
        "data": traces,
        "layout": layout(title.capitalize(), AGAINST[against], title),
    }


def cost_by_product(views: Sequence[View], metric: str = "GBitOPs") -> Chart:
    """The cost of the three products of each label, the mean of its runs."""
    asked, groups = metric_of(metric), by_label(views)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": product,
            "y": [text(label) for label in groups],
            "x": [
                statistics.fmean(getattr(view.costs[metric], product) for view in group) for group in groups.values()
            ],
            "marker": {"color": OF_PRODUCT[product]},
            "hovertemplate": f"%{{y}}, {product}<br>%{{x:.4~g}}<extra></extra>",
            "meta": {"labels": list(groups)},
        }
        for product in PRODUCTS
    ]
    return {
        "data": traces,
        "layout": layout(
            "Cost by product",
            f"{asked.name} ({asked.unit}), whole run",
            "",
            barmode="stack",
            yaxis={"autorange": "reversed", "type": "category"},
            height=140 + 34 * len(groups),
        ),
    }
