"""The report page: one HTML file with charts, tables and their data, which opens from disk without a network.

Python puts the data of all charts into the page as JSON, in which no text can end the script element that holds it, and
jinja2 escapes what stands in the page itself. The charts are drawn by plotly.js, which is taken compressed from the
installed plotly package. A content security policy allows the page's own script only, and no network at all.
"""

import base64
import gzip
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lowbit.errors import RunError, UsageError
from lowbit.evidence.metrics import METRICS
from lowbit.evidence.records import PRODUCTS
from lowbit.inputs import files
from lowbit.report import charts, run_charts
from lowbit.report.reading import views_of
from lowbit.report.timeline import bit_operations_so_far, bits_over_time
from lowbit.report.views import View

LIMIT = 6_000_000  # bytes of a page
_BASELINE = "fp32"
# The most points of a curve and columns of a heat map, from the finest on: the first that keeps the page within LIMIT.
_DETAIL = ((400, 200), (150, 100), (60, 40), (25, 20), (10, 10))
_POINTS = 500_000  # of all curves and heat maps: beyond it a level is not even tried


def write_report(folders: Sequence[Path], out: Path) -> dict[str, str]:
    """Write the report page of run folders.

    Args:
        folders: run folders; those that cannot be shown are named in the page.
        out: the HTML file, which is replaced.

    Returns:
        The reason for each folder that is not shown.

    Raises:
        UsageError: no folder can be shown.
        RunError: plotly or jinja2 is missing, the page would be larger than `LIMIT`, or it cannot be written.
    """
    views, skipped = views_of(folders)
    if not views:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in skipped.items())
        raise UsageError(f"no run to show: {reasons or 'no folder was given'}")
    text = page_of(views, skipped)
    try:
        files.write_text(out, text)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    return skipped


def page_of(views: Sequence[View], skipped: Mapping[str, str]) -> str:
    """The page of these runs as text.

    Raises:
        RunError: plotly or jinja2 is missing, or the page would be larger than `LIMIT`.
    """
    tasks: dict[str, list[View]] = {}
    for view in views:
        tasks.setdefault(view.task, []).append(view)
    size = 0
    for points, columns in _DETAIL:
        if len(views) * (8 * points + 10 * columns) > _POINTS and (points, columns) != _DETAIL[-1]:
            continue
        text = _rendered(tasks, skipped, points, columns)
        size = len(text.encode())
        if size <= LIMIT:
            return text
    raise RunError(f"the page of {len(views)} runs would have {size:,} bytes, and {LIMIT:,} is the limit: show fewer")


def _rendered(tasks: Mapping[str, Sequence[View]], skipped: Mapping[str, str], points: int, columns: int) -> str:
    from lowbit import __version__

    pool = _Pool()
    data = {
        "metrics": [{"name": m.name, "unit": m.unit, "source": m.source, "formula": m.formula} for m in METRICS],
        "quantities": charts.QUANTITIES,
        "tasks": [_task(name, views, pool, points, columns) for name, views in tasks.items()],
        "pool": pool.items,
    }
    script = _part("page.js")
    return _encodable(
        _template().render(
            title=_title(tasks),
            tasks=[{"name": name, "rows": _results(views), "views": views} for name, views in tasks.items()],
            views=[view for views in tasks.values() for view in views],
            skipped=skipped,
            metrics=METRICS,
            labels={name: charts.styles(views) for name, views in tasks.items()},
            thinned=any(
                len(steps) > points for v in tasks.values() for view in v for steps, _ in view.columns.values()
            ),
            points=points,
            columns=columns,
            style=_part("page.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            plotly=_plotly_script(),
            data=json_for_html(data),
            version=__version__,
        )
    )


class _Pool:
    """Values that several runs share, each kept once."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, value: Any) -> int:
        """The index of a plain value."""
        key = json.dumps(value, sort_keys=True)
        if key not in self._index:
            self._index[key] = len(self.items)
            self.items.append(value)
        return self._index[key]


def _task(name: str, views: Sequence[View], pool: _Pool, points: int, columns: int) -> dict[str, Any]:
    """Everything that is drawn of the runs of one task."""
    logged = [quantity for quantity in charts.QUANTITIES if any(quantity in view.columns for view in views)]
    return {
        "name": name,
        "labels": charts.styles(views),
        "accuracy": {metric.name: charts.accuracy_vs_cost(views, metric.name) for metric in METRICS},
        "products": {metric.name: charts.cost_by_product(views, metric.name) for metric in METRICS},
        "curves": {quantity: charts.curves(views, quantity, points=points) for quantity in logged},
        "costs": _costs_of_steps(views, points),
        "costTitle": charts.AGAINST["cost"],
        "runs": [_run(view, pool, columns) for view in views],
    }


def _costs_of_steps(views: Sequence[View], points: int) -> dict[str, list[list[float]]]:
    """For each run the bit operations so far, in 10⁹, at some steps; the page interpolates between them."""
    found = {}
    for view in views:
        so_far, first = bit_operations_so_far(view.ledger), view.ledger.first_step
        size = max(1, -(-len(so_far) // points))
        places = sorted({*range(size - 1, len(so_far), size), len(so_far) - 1})
        found[view.name] = [
            [first, *(first + i + 1 for i in places)],
            [0.0, *(float(f"{so_far[i] / 1e9:.6g}") for i in places)],
        ]
    return found


def _run(view: View, pool: _Pool, columns: int) -> dict[str, Any]:
    """What is shown of one run alone."""
    same: dict[int, list[str]] = {}
    for (product, operand), table in bits_over_time(view.ledger, columns).items():
        index = pool.add(run_charts.bits_chart(table, ""))
        same.setdefault(index, []).append(f"{operand} in {product}")
    drawn = {
        "layers": run_charts.cost_by_layer(view.totals),
        "engines": run_charts.work_by_engine(view.totals),
        **({"sqnr": run_charts.sqnr(view.errors), "angle": run_charts.angle(view.errors)} if view.errors else {}),
        **({"gates": run_charts.gates(view)} if run_charts.shares_of_gates(view) else {}),
        **(
            {"gateCost": run_charts.gate_cost(view)} if view.columns.keys() & {"cost_percent", "target_percent"} else {}
        ),
    }
    return {
        "name": view.name,
        "label": view.label,
        "bits": [{"names": names, "chart": index} for index, names in same.items()],
        "charts": {name: pool.add(chart) for name, chart in drawn.items()},
        "facts": facts(view),
        "conversion": pool.add(_conversion_table(view)),
        "proof": pool.add(_proof_table(view)),
        "notes": list(view.notes),
        "problems": list(view.problems),
        "command": view.command,
        "settings": pool.add(
            [[name, _plain(value)] for name, value in view.settings.items() if value is not None and name != "seed"]
        ),
        "changes": _plain(view.settings.get("changes", "")),
        "machines": list(view.machines),
    }


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def facts(view: View) -> list[tuple[str, str]]:
    """Where the time, the memory and the energy of a run went, as names and values."""
    seconds, held = view.seconds_per_step, view.ledger.held_bytes
    costs = view.costs
    energy = view.energy if view.joules is None else f"{view.joules:,.4g} J ({view.energy})"
    return [
        ("state", "complete" if view.complete else f"unfinished: {view.steps:,} steps so far"),
        (f"test {view.score_name}", "not evaluated yet" if view.score is None else _score(view)),
        ("test loss", "not evaluated yet" if view.loss is None else f"{view.loss:.4f}"),
        ("steps", f"{view.steps:,} with {view.ledger.samples:,} samples"),
        ("time", "too few steps to say" if seconds is None else f"{seconds:.4g} s a step (median)"),
        ("time of all steps", "-" if seconds is None else f"about {_duration(seconds * view.steps)}"),
        ("memory", "not measured" if held is None else f"{held / 2**20:,.1f} MiB held for the backward, at most"),
        ("operands", f"{_digits(costs['operand bytes'].total / 2**30, 3)} GiB, each read once at its width"),
        ("energy", energy),
        ("bit operations", f"{_digits(costs['GBitOPs'].total)} × 10⁹, {costs['cp'].total:.3g} % of 32 × 32 bits"),
    ]


def _score(view: View) -> str:
    return f"{view.score:.2f} %" if view.higher_is_better else f"{view.score:.4f}"


def _digits(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, or more before the point; never with an exponent unless it is tiny."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:,.{digits}g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _conversion_table(view: View) -> dict[str, Any]:
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


def _proof_table(view: View) -> dict[str, Any]:
    def cell(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

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


def _results(views: Sequence[View]) -> list[dict[str, Any]]:
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
    base = points.get(_BASELINE)
    digits = 2 if all(view.higher_is_better for view in views) else 4
    rows = []
    for label, group in groups.items():
        score = points[label][1] if label in points else None
        rows.append(
            {
                "label": label,
                "runs": len(group),
                "unfinished": sum(view.label == label for view in views) - len(group),
                "score": None if score is None else f"{score:.{digits}f}",
                "spread": f"{statistics.stdev(scores[label]):.{digits}f}" if len(group) > 1 else "",
                "difference": ""
                if base is None or score is None or label == _BASELINE
                else f"{score - base[1]:+.{digits}f}".replace("-", "\u2212"),
                "cost": _digits(costs[label]) if label in costs else "",
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


def _title(tasks: Mapping[str, Sequence[View]]) -> str:
    return ", ".join(tasks) if len(tasks) < 4 else f"{len(tasks)} tasks"


# The parts of the page.


def json_for_html(data: Any) -> str:
    """Plain values as JSON for a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _encodable(text)


def _encodable(text: str) -> str:
    """A text without halves of surrogate pairs, as files and names of folders may have: they are in no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _part(name: str) -> str:
    return resources.files("lowbit.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise _missing(error) from error

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_part("page.html"))


@cache
def _plotly_script() -> str:
    """plotly.js of the installed plotly package, compressed, in base64."""
    try:
        file = resources.files("plotly").joinpath("package_data/plotly.min.js")
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return base64.b64encode(gzip.compress(file.read_bytes(), 9, mtime=0)).decode()


def _missing(error: ModuleNotFoundError) -> RunError:
    return RunError(f"the report needs {error.name}: pip install 'lowbit[report]'")
