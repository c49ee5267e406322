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
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lowbit.errors import RunError, UsageError
from lowbit.evidence.metrics import METRICS
from lowbit.hardware import Accelerator
from lowbit.inputs import files
from lowbit.report import charts, page_tables, run_charts
from lowbit.report.cost import Cost
from lowbit.report.reading import views_of
from lowbit.report.timeline import bit_operations_so_far, bits_over_time
from lowbit.report.views import View

LIMIT = 6_000_000  # bytes of a page
# The most points of a curve and columns of a heat map, from the finest on: the first that keeps the page within LIMIT.
_DETAIL = ((400, 200), (150, 100), (60, 40), (25, 20), (10, 10))
_POINTS = 500_000  # of all curves and heat maps: beyond it a level is not even tried


def write_report(folders: Sequence[Path], out: Path, *, hardware: Accelerator | None = None) -> dict[str, str]:
    """Write the report page of run folders.

    Args:
        folders: run folders; those that cannot be shown are named in the page.
        out: the HTML file, which is replaced.
        hardware: an accelerator to estimate cycles and energy of each run on, e.g. `lowbit.hardware.BitFusion()`.

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
    text = page_of(views, skipped, hardware)
    try:
        files.write_text(out, text)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    return skipped


def page_of(views: Sequence[View], skipped: Mapping[str, str], hardware: Accelerator | None = None) -> str:
    """The page of these runs as text.

    Raises:
        RunError: plotly or jinja2 is missing, or the page would be larger than `LIMIT`.
    """
    tasks: dict[str, list[View]] = {}
    for view in views:
        tasks.setdefault(view.task, []).append(view)
    estimates = {} if hardware is None else {id(view): Cost(view.ledger, hardware) for view in views}
    size = 0
    for points, columns in _DETAIL:
        if len(views) * (8 * points + 10 * columns) > _POINTS and (points, columns) != _DETAIL[-1]:
            continue
        text = _rendered(tasks, skipped, estimates, points, columns)
        size = len(text.encode())
        if size <= LIMIT:
            return text
    raise RunError(f"the page of {len(views)} runs would have {size:,} bytes, and {LIMIT:,} is the limit: show fewer")


def _rendered(
    tasks: Mapping[str, Sequence[View]],
    skipped: Mapping[str, str],
    estimates: Mapping[int, Cost],
    points: int,
    columns: int,
) -> str:
    from lowbit import __version__

    pool = _Pool()
    data = {
        "metrics": [{"name": m.name, "unit": m.unit, "source": m.source, "formula": m.formula} for m in METRICS],
        "quantities": charts.QUANTITIES,
        "tasks": [_task(name, views, estimates, pool, points, columns) for name, views in tasks.items()],
        "pool": pool.items,
    }
    script = _part("page.js")
    return _encodable(
        _template().render(
            title=_title(tasks),
            tasks=[{"name": name, "rows": page_tables.results(views), "views": views} for name, views in tasks.items()],
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


def _task(
    name: str, views: Sequence[View], estimates: Mapping[int, Cost], pool: _Pool, points: int, columns: int
) -> dict[str, Any]:
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
        "runs": [_run(view, estimates.get(id(view)), pool, columns) for view in views],
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


def _run(view: View, cost: Cost | None, pool: _Pool, columns: int) -> dict[str, Any]:
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
    modelled, notes = _on_hardware(cost)
    if modelled is not None:
        drawn["energy"] = modelled
    return {
        "name": view.name,
        "label": view.label,
        "bits": [{"names": names, "chart": index} for index, names in same.items()],
        "charts": {name: pool.add(chart) for name, chart in drawn.items()},
        "facts": page_tables.facts(view),
        "conversion": pool.add(page_tables.conversion_table(view)),
        "proof": pool.add(page_tables.proof_table(view)),
        "notes": [*view.notes, *notes],
        "problems": list(view.problems),
        "command": view.command,
        "settings": pool.add(
            [[name, _plain(value)] for name, value in view.settings.items() if value is not None and name != "seed"]
        ),
        "changes": _plain(view.settings.get("changes", "")),
        "machines": list(view.machines),
    }


def _on_hardware(cost: Cost | None) -> tuple[charts.Chart | None, list[str]]:
    """The energy of a run on an accelerator as a chart, and in words what it takes and what has no estimate."""
    if cost is None or cost.hardware is None:
        return None, []
    name, estimates = type(cost.hardware).__name__, cost.on_hardware()
    notes = [
        f"{name} has no estimate for {', '.join(map(_layer, s))}: {why}" for why, s in cost.not_estimated().items()
    ]
    if not estimates:
        return None, notes
    whole = estimates["total"]
    sums = f"{page_tables.digits(whole.cycles / 1e6)} million cycles, {page_tables.digits(whole.energy_nj / 1e9)} J"
    return run_charts.energy_on(name, estimates), [f"on {name}, a model, the products take {sums}", *notes]


def _layer(name: str) -> str:
    return name or "(model)"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


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
