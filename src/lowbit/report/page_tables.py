"""The tables of the report page: the results of each setting, and of one run its facts, conversion and proof."""

import statistics
from collections.abc import Sequence
from typing import Any

from lowbit.evidence.memory import StepMemory
from lowbit.evidence.records import PRODUCTS
from lowbit.report import charts
from lowbit.report.views import View

BASELINE = "fp32"


def facts(view: View) -> list[tuple[str, str]]:
    """Where the time, the memory and the energy of a run went, as names and values."""
    seconds, held = view.seconds_per_step, view.ledger.held_bytes
    costs = view.costs
    whole = view.memory
    energy = view.energy if view.joules is None else f"{view.joules:,.4g} J ({view.energy})"
    return [
        ("state", "complete" if view.complete else f"unfinished: {view.steps:,} steps so far"),
        (f"test {view.score_name}", "not evaluated yet" if view.score is None else _score(view)),
        ("test loss", "not evaluated yet" if view.loss is None else f"{view.loss:.4f}"),
        ("steps", f"{view.steps:,} with {view.ledger.samples:,} samples"),
        ("time", "too few steps to say" if seconds is None else f"{seconds:.4g} s a step (median)"),
        ("time of all steps", "-" if seconds is None else f"about {_duration(seconds * view.steps)}"),
        ("memory", "not measured" if held is None else f"{held / 2**20:,.1f} MiB held for the backward, at most"),
        ("memory of a step", "not measured" if whole is None else _parts(whole)),
        ("engines", ", ".join(f"{name} for {n} products" for name, n in view.engines.items()) or "not known"),
        ("versions", ", ".join(f"{name} {text}" for name, text in view.versions.items()) or "not known"),
        ("operands", f"{digits(costs['operand bytes'].total / 2**30, 3)} GiB, each read once at its width"),
        ("energy", energy),
        ("bit operations", f"{digits(costs['GBitOPs'].total)} × 10⁹, {costs['cp'].total:.3g} % of 32 × 32 bits"),
    ]


def _score(view: View) -> str:
    return f"{view.score:.2f} %" if view.higher_is_better else f"{view.score:.4f}"


def _parts(memory: StepMemory) -> str:
    parts = {name.replace("_", " "): size for name, size in vars(memory).items()}
    listed = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
    return f"{memory.total / 2**20:,.1f} MiB at most ({listed})"


def digits(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, or more before the point; never with an exponent unless it is tiny."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:,.{digits}g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def conversion_table(view: View) -> dict[str, Any]:
    """The layers as header and rows of text."""
    return {
        "header": ["layer", "type", "recipe", *PRODUCTS, "engine", "remark"],
        "rows": [
            [
                row.layer,
                row.type,
                row.recipe or "left as it is",
                *(row.bits.get(product, "-") for product in PRODUCTS),
                ", ".join(dict.fromkeys(row.engines.values())) or "-",
                row.remark,
            ]
            for row in view.conversion
        ],
    }


def proof_table(view: View) -> dict[str, Any]:
    """The products that were proved as header and rows of text."""

    def cell(value: float | None, places: int, scale: float = 1.0) -> str:
        return "-" if value is None else f"{scale * value:.{places}f}"

    return {
        "header": ["layer", "product", "bits", "engine", "kernel", "SQNR dB", "angle °", "clipped %"],
        "rows": [
            [
                e.layer,
                e.product,
                e.bits,
                e.engine,
                e.kernel,
                "exact" if e.exact else cell(e.sqnr_db, 1),
                cell(e.angle, 2),
                cell(e.clipped, 2, 100),
            ]
            for e in view.errors
        ],
    }


def results(views: Sequence[View]) -> list[dict[str, Any]]:
    """A row for each label: means over its complete runs, against the baseline where there is one."""
    groups = {
        label: [view for view in group if view.complete and view.score is not None]
        for label, group in charts.by_label(views).items()
    }
    scores = {label: [view.score or 0.0 for view in group] for label, group in groups.items()}
    costs = {
        label: statistics.fmean(view.costs["GBitOPs"].total for view in group)
        for label, group in groups.items()
        if group
    }
    points = {label: (costs[label], statistics.fmean(scores[label])) for label in costs}
    best = charts.front(points, higher_is_better=all(view.higher_is_better for view in views))
    base = points.get(BASELINE)
    places = 2 if all(view.higher_is_better for view in views) else 4
    rows = []
    for label, group in groups.items():
        score = points[label][1] if label in points else None
        rows.append(
            {
                "label": label,
                "runs": len(group),
                "unfinished": sum(view.label == label for view in views) - len(group),
                "score": None if score is None else f"{score:.{places}f}",
                "spread": f"{statistics.stdev(scores[label]):.{places}f}" if len(group) > 1 else "",
                "difference": ""
                if base is None or score is None or label == BASELINE
                else f"{score - base[1]:+.{places}f}".replace("-", "\u2212"),
                "cost": digits(costs[label]) if label in costs else "",
                "share": f"{100 * costs[label] / base[0]:.3g}" if base and label in costs else "",
                "seconds": _mean([view.seconds_per_step for view in group], "{:.3g}"),
                "memory": _mean([_mib(view) for view in group], "{:,.1f}"),
                "energy": _mean([view.joules for view in group], "{:,.3g}"),
                "best": label in best,
            }
        )
    return rows


def _mib(view: View) -> float | None:
    held = view.ledger.held_bytes
    return None if held is None else held / 2**20


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known and len(known) == len(values) else ""
