"""Charts of one run, as plain values that plotly draws: bits over time, cost by layer, errors, gates."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.records import PRODUCTS, Total, per_layer
from lowbit.hardware import Estimate
from lowbit.report.charts import COLOURS, OF_PRODUCT, SYMBOLS, Chart, layout, metric_of, text
from lowbit.report.timeline import Bits, bits_over_time
from lowbit.report.views import ProductError, View

_ROW = 20  # pixels of a layer
_SHAPES = dict(zip(PRODUCTS, ("circle", "square", "diamond"), strict=True))


def bits(ledger: Ledger, product: str = "output", operand: str = "input", *, columns: int = 120) -> Chart:
    """The bits of one operand in every converted layer over the steps of a run, as a heat map.

    Raises:
        UsageError: no converted layer ran this operand.
    """
    known = bits_over_time(ledger, columns)
    if (product, operand) not in known:
        there = ", ".join(f"{operand} of {product}" for product, operand in known) or "none"
        raise UsageError(f"no converted layer ran {operand} of {product}; there is: {there}")
    return bits_chart(known[product, operand], f"{operand} in {product}")


def bits_chart(table: Bits, name: str) -> Chart:
    """The heat map of a table of bits."""
    values = [value for row in table.values for value in row if value is not None]
    low, high = min(values), max(values)
    title = "step" if table.width == 1 else f"step (a column: mean of {table.width})"
    return {
        "data": [
            {
                "type": "heatmap",
                "x": list(table.steps),
                "y": [text(layer or "(model)") for layer in table.layers],
                "z": [list(row) for row in table.values],
                "zmin": min(low, 2.0),
                "zmax": max(high, 8.0),
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "bits"}, "thickness": 12},
                "hoverongaps": False,
                "hovertemplate": "%{y}<br>step %{x}: %{z} bits<extra></extra>",
            }
        ],
        "layout": layout(
            f"Bits of {name}",
            title,
            "",
            yaxis={"autorange": "reversed", "type": "category", "dtick": 1},
            height=_height(len(table.layers)),
        ),
    }


def _height(rows: int) -> int:
    return 130 + _ROW * max(rows, 2)


def cost_by_layer(totals: Sequence[Total], metric: str = "GBitOPs") -> Chart:
    """The cost of each layer by product, of ``ledger.totals()``."""
    asked = metric_of(metric)
    whole = {layer or "(model)": asked(each) for layer, each in per_layer(totals)}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": product,
            "y": [text(layer) for layer in whole],
            "x": [float(f"{getattr(terms, product):.6g}") for terms in whole.values()],
            "marker": {"color": OF_PRODUCT[product]},
            "hovertemplate": f"%{{y}}, {product}<br>%{{x:.4~g}}<extra></extra>",
        }
        for product in PRODUCTS
    ]
    return {
        "data": traces,
        "layout": layout(
            "Cost by layer",
            f"{asked.name} ({asked.unit}), whole run",
            "",
            barmode="stack",
            yaxis={"autorange": "reversed", "type": "category", "dtick": 1},
            height=_height(len(whole)),
        ),
    }


def work_by_engine(totals: Sequence[Total]) -> Chart:
    """The multiply-accumulates of each engine by product, of ``ledger.totals()``."""
    engines = list(dict.fromkeys(total.product.engine for total in totals))
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for total in totals:
        sums[total.product.engine, total.product.product] += total.macs
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": product,
            "y": [text(engine) for engine in engines],
            "x": [sums[engine, product] / 1e9 for engine in engines],
            "marker": {"color": OF_PRODUCT[product]},
            "hovertemplate": f"%{{y}}, {product}<br>%{{x:.4~g}}<extra></extra>",
        }
        for product in PRODUCTS
    ]
    return {
        "data": traces,
        "layout": layout(
            "What executed the products",
            "10⁹ MACs, whole run",
            "",
            barmode="stack",
            yaxis={"autorange": "reversed", "type": "category"},
            height=150 + 30 * len(engines),
        ),
    }


def energy_on(name: str, estimates: Mapping[str, Estimate]) -> Chart:
    """Where the energy of each product goes on a modelled accelerator: its units and its stores.

    Args:
        name: of the accelerator.
        estimates: by product, as `Cost.on_hardware` gives them; their total is left out.
    """
    products = [product for product in PRODUCTS if product in estimates]
    parts: dict[str, list[float]] = {"units": [estimates[product].core_nj for product in products]}
    for store in estimates["total"].stores:
        parts[store.name] = [
            sum(s.energy_nj for s in estimates[product].stores if s.name == store.name) for product in products
        ]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": text(part),
            "y": products,
            "x": [float(f"{value / 1e9:.5g}") for value in values],
            "marker": {"color": COLOURS[3 + i % (len(COLOURS) - 3)]},
            "hovertemplate": "%{y}, %{fullData.name}<br>%{x:.4~g} J<extra></extra>",
        }
        for i, (part, values) in enumerate(parts.items())
    ]
    return {
        "data": traces,
        "layout": layout(
            f"Energy on {name}, a model",
            "J, whole run",
            "",
            barmode="stack",
            yaxis={"autorange": "reversed", "type": "category"},
            height=260,
        ),
    }


def sqnr(errors: Sequence[ProductError]) -> Chart:
    """Signal to quantisation noise of each product by layer, in dB; exact products have none."""
    return _by_layer(errors, "sqnr_db", "Signal to quantisation noise", "SQNR, dB (higher is better)")


def angle(errors: Sequence[ProductError]) -> Chart:
    """The angle of each product to full precision by layer, in degrees."""
    return _by_layer(errors, "angle", "Angle to full precision", "angle, degrees (lower is better)")


def _by_layer(errors: Sequence[ProductError], name: str, title: str, x: str) -> Chart:
    layers = list(dict.fromkeys(error.layer for error in errors))
    traces = []
    for product in dict.fromkeys(error.product for error in errors):
        shown = [e for e in errors if e.product == product and getattr(e, name) is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(product),
                "x": [float(f"{getattr(e, name):.5g}") for e in shown],
                "y": [text(e.layer) for e in shown],
                "text": [text(f"{e.bits}, {e.engine}") for e in shown],
                "marker": {
                    "color": OF_PRODUCT.get(product, COLOURS[3]),
                    "symbol": _SHAPES.get(product, SYMBOLS[3]),
                    "size": 9,
                },
                "hovertemplate": "%{y}, %{text}<br>%{x:.4~g}<extra></extra>",
            }
        )
    return {
        "data": traces,
        "layout": layout(
            title,
            x,
            "",
            yaxis={
                "autorange": "reversed",
                "type": "category",
                "dtick": 1,
                "categoryarray": [text(layer) for layer in layers],
            },
            height=_height(len(layers)),
        ),
    }


def gates(view: View) -> Chart:
    """How often the gates chose each pair of bits in each block: the mean of the logged shares.

    Raises:
        UsageError: the run has no gates.
    """
    shares = shares_of_gates(view)
    if not shares:
        raise UsageError(f"{view.name}: no gates ran in it")
    blocks = list(dict.fromkeys(block for block, _ in shares))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": text(f"{choice.replace('-', '/')} bits"),
            "y": [text(block) for block in blocks],
            "x": [round(100 * shares.get((block, choice), 0.0), 2) for block in blocks],
            "marker": {"color": COLOURS[i % len(COLOURS)]},
            "hovertemplate": "%{y}, %{fullData.name}<br>%{x:.1f} %<extra></extra>",
        }
        for i, choice in enumerate(dict.fromkeys(choice for _, choice in shares))
    ]
    return {
        "data": traces,
        "layout": layout(
            "Choices of the gates, forward/backward bits",
            "% of samples",
            "",
            barmode="stack",
            yaxis={"autorange": "reversed", "type": "category", "dtick": 1},
            height=_height(len(blocks)) + 20,
        ),
    }


def shares_of_gates(view: View) -> dict[tuple[str, str], float]:
    """The mean share of samples by block and choice."""
    names = {name: name.split("/") for name in view.columns if name.startswith("gates/")}
    return {
        ("/".join(parts[1:-1]), parts[-1]): statistics.fmean(view.columns[name][1])
        for name, parts in names.items()
        if len(parts) > 2
    }


def gate_cost(view: View) -> Chart:
    """The cost that the gates reached in each logged step, and their target, in percent of the widest choice.

    Raises:
        UsageError: the run has no gates.
    """
    traces: list[dict[str, Any]] = []
    for name, title, line in (
        ("cost_percent", "cost", {"color": COLOURS[0]}),
        ("target_percent", "target", {"color": COLOURS[1], "dash": "dash"}),
    ):
        steps, values = view.columns.get(name, ((), ()))
        if steps:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": title,
                    "x": list(steps),
                    "y": list(values),
                    "line": line,
                    "hovertemplate": f"{title}<br>%{{y:.4~g}} % at step %{{x}}<extra></extra>",
                }
            )
    if not traces:
        raise UsageError(f"{view.name}: no gates ran in it")
    return {"data": traces, "layout": layout("Cost of the gated blocks", "step", "cost, %")}
