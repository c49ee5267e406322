"""Runs side by side: means over seeds with intervals, cost against a baseline, and whether two settings are equal.

Notation: d_i difference of two settings' scores with seed i, n seeds, m the margin within which they count as equal.
"""

import csv
import importlib
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowbit.errors import RunError, UsageError, shown, unknown
from lowbit.evidence.metrics import METRICS
from lowbit.report.charts import by_label, front
from lowbit.report.views import View
from lowbit.tables import Table, html_of, json_text

BASELINE = "fp32"
CONFIDENCE = 0.95
MOST_SEEDS = 10_000
"""Beyond so many seeds it is not said how many more would decide."""

Verdict = Literal["equal", "different", "not shown"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The complete runs of one setting.

    Args:
        label: the setting: recipe, and what else tells it apart.
        seeds: of the runs.
        scores: of the runs, in the same order.
        mean: of the scores.
        deviation: their standard deviation; None for one run.
        interval: half the width of the 95 % interval of the mean, by Student's t; None for one run.
        costs: the mean of each cost metric over the runs, by its name.
        seconds_per_step: mean of the runs' medians; None if a run lacks it. So are the three below.
        mib: memory held for the backward, at most.
        step_mib: memory of a whole step, see `StepMemory.total`.
        joules: of a run.
        best: whether no other setting has a better mean score for the same bit operations or fewer.
    """

    label: str
    seeds: Sequence[int | None]
    scores: Sequence[float]
    mean: float
    deviation: float | None
    interval: float | None
    costs: Mapping[str, float]
    seconds_per_step: float | None
    mib: float | None
    step_mib: float | None
    joules: float | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings side by side; as text a table, with what a reader must know below it.

    Args:
        task: model and data, or several of them.
        score_name: what is compared; see `View`.
        higher_is_better: its direction.
        baseline: label of the setting that others are relative to.
        groups: the settings.
        notes: what the figures do not say.
    """

    task: str
    score_name: str
    higher_is_better: bool
    baseline: str
    groups: Sequence[Group]
    notes: Sequence[str] = ()

    @property
    def table(self) -> Table:
        """Header and rows of text."""
        base = next(group for group in self.groups if group.label == self.baseline)
        places = 2 if self.higher_is_better else 4
        header = [
            "setting",
            "runs",
            self.score_name,
            "sd",
            "95 %",
            f"to {_printable(base.label)}",
            "bit op %",
            "s/step",
            "speed",
        ]
        whole = all(group.step_mib is not None for group in self.groups)
        titles = {"step_mib" if whole else "mib": "MiB" if whole else "MiB held", "joules": "J"}
        known = [name for name in titles if any(getattr(g, name) is not None for g in self.groups)]
        header += [titles[name] for name in known]
        rows = []
        for group in self.groups:
            row = [
                _printable(group.label) + (" *" if group.best else ""),
                str(len(group.scores)),
                f"{group.mean:.{places}f}",
                _cell(group.deviation, f".{places}f"),
                "-" if group.interval is None else f"±{group.interval:.{places}f}",
                "-" if group is base else f"{group.mean - base.mean:+.{places}f}",
                f"{100 * group.costs['GBitOPs'] / base.costs['GBitOPs']:.3g}",
                _cell(group.seconds_per_step, ".3g"),
                "-"
                if not group.seconds_per_step or base.seconds_per_step is None
                else f"{base.seconds_per_step / group.seconds_per_step:.2f}",
            ]
            row += [_cell(getattr(group, name), ",.3g") for name in known]
            rows.append(row)
        return Table(header=header, rows=rows)

    def __str__(self) -> str:
        return "\n".join([_printable(self.task), "", str(self.table), "", *self.notes])

    def to_markdown(self) -> str:
        """The table in Markdown."""
        table = self.table
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "task": self.task,
            "score": self.score_name,
            "baseline": self.baseline,
            "groups": [
                {**vars(group), "seeds": list(group.seeds), "scores": list(group.scores), "costs": dict(group.costs)}
                for group in self.groups
            ],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json_text(self.to_dict())

    def to_csv(self) -> str:
        """A line for each setting, with every cost metric."""
        columns = ("label", "mean", "deviation", "interval", "seconds_per_step", "mib", "step_mib", "joules", "best")
        names = [metric.name for metric in METRICS]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["setting", "runs", self.score_name, *columns[2:], *names])
        for group in self.groups:
            cells = [group.label, len(group.scores), *(getattr(group, name) for name in columns[1:])]
            writer.writerow([*cells, *(group.costs[name] for name in names)])
        return out.getvalue()

    def to_dataframe(self) -> Any:
        """A row for each setting, as a pandas DataFrame.

        Raises:
            RunError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            raise RunError("to_dataframe needs pandas: pip install pandas") from error
        return pandas.DataFrame([{**vars(group), **group.costs} for group in self.groups]).drop(columns="costs")

    def _repr_html_(self) -> str:
        return html_of([self.task, self.table, *self.notes])


def compare(views: Sequence[View], *, baseline: str | None = None, force: bool = False) -> Comparison:
    """Group runs by setting, over seeds, and relate each setting to a baseline.

    Args:
        views: runs; those without a result are left out, which a note says.
        baseline: label or recipe of a setting. Default: `BASELINE` if it is there, else the first.
        force: compare runs of several models or data sets all the same.

    Raises:
        UsageError: no complete run, runs of several tasks, or no such baseline.
        RunError: scipy is not installed.
    """
    whole = [view for view in views if view.complete and view.score is not None]
    if not whole:
        raise UsageError(
            "no complete run to compare: give folders of runs of `lowbit train` that reached their end and were tested"
        )
    tasks = list(dict.fromkeys(view.task for view in whole))
    if len({view.score_name for view in whole}) > 1:
        raise UsageError(f"runs of {', '.join(tasks)} have scores of different kinds, which have no common table")
    if len(tasks) > 1:
        if not force:
            raise UsageError(
                f"runs of {', '.join(tasks)}: their scores and costs say nothing about one another. Give runs of one "
                "model on one data set, or --force"
            )
        whole = [_with_task(view) for view in whole]
    grouped = by_label(whole)
    chosen = _baseline(grouped, baseline)
    up = whole[0].higher_is_better
    costs = {
        label: {metric.name: statistics.fmean(view.costs[metric.name].total for view in group) for metric in METRICS}
        for label, group in grouped.items()
    }
    means = {label: statistics.fmean(_scores(group)) for label, group in grouped.items()}
    best = front({label: (costs[label]["GBitOPs"], means[label]) for label in grouped}, higher_is_better=up)
    groups = [
        _group(label, group, costs[label], best=label in best)
        for label, group in sorted(grouped.items(), key=lambda item: item[0] != chosen)
    ]
    score_name = "accuracy %" if up else "bits/byte"
    return Comparison(
        task=", ".join(tasks),
        score_name=score_name,
        higher_is_better=up,
        baseline=chosen,
        groups=groups,
        notes=_notes(views, whole, groups),
    )


def _group(label: str, runs: Sequence[View], costs: Mapping[str, float], *, best: bool) -> Group:
    scores = _scores(runs)
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    half = None
    if deviation is not None:
        half = quantile(len(scores) - 1, (1 + CONFIDENCE) / 2) * deviation / math.sqrt(len(scores))
    held = [view.ledger.held_bytes for view in runs]
    return Group(
        label=label,
        seeds=[view.seed for view in runs],
        scores=scores,
        mean=statistics.fmean(scores),
        deviation=deviation,
        interval=half,
        costs=costs,
        seconds_per_step=_mean([view.seconds_per_step for view in runs]),
        mib=_mean([None if value is None else value / 2**20 for value in held]),
        step_mib=_mean([None if view.memory is None else view.memory.total / 2**20 for view in runs]),
        joules=_mean([view.joules for view in runs]),
        best=best,
    )


def _notes(given: Sequence[View], whole: Sequence[View], groups: Sequence[Group]) -> list[str]:
    notes = ["* no setting has a better mean for the same bit operations or fewer"]
    if any(group.interval is None for group in groups):
        notes.append("one run has no interval: train it with other seeds")
    if any(group.interval is not None for group in groups):
        notes.append("sd: over seeds. 95 %: interval of the mean by Student's t, for normal scores")
    for what, left in (
        ("unfinished", sum(not view.complete for view in given)),
        ("untested", sum(view.complete and view.score is None for view in given)),
    ):
        if left:
            notes.append(f"{left} {what} run{'s' * (left != 1)} left out")
    machines = {machine for view in whole for machine in view.machines}
    if len(machines) > 1:
        notes.append(f"seconds are of {len(machines)} machines or numbers of threads: compare them with care")
    for label, runs in by_label(whole).items():
        if len({tuple(sorted(view.engines.items())) for view in runs if view.engines}) > 1:
            notes.append(f"{_printable(label)}: its runs had different engines, so their seconds are of several kinds")
    for name in ("lowbit", "torch"):
        found = {view.versions[name] for view in whole if name in view.versions}
        if len(found) > 1:
            notes.append(f"runs are of several versions of {name}: {', '.join(map(_printable, sorted(found)))}")
    return notes


@dataclass(frozen=True, kw_only=True)
class Equality:
    """Whether two settings have equal scores, by two one-sided t-tests of the differences of equal seeds.

    The interval ``mean ± t(0.95, n - 1) s / sqrt(n)`` of the d_i decides: within ±m the settings are equal, beyond it
    they are different, and otherwise neither is shown. Each one-sided test has a false-alarm rate of 5 %.

    Args:
        first: label of the first setting.
        second: label of the second.
        margin: m, in points of the score.
        differences: d_i, second minus first, by seed.
        unpaired: seeds that only one setting has, which are left out.
        low: lower end of the interval.
        high: upper end.
        verdict: what is shown.
        more: how many more seeds would decide if mean and spread stayed as they are; None: already decided, or more
            than `MOST_SEEDS`.

    Source: Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657.
    """

    first: str
    second: str
    margin: float
    differences: Mapping[int, float]
    unpaired: Sequence[int]
    low: float
    high: float
    verdict: Verdict
    more: int | None

    def __str__(self) -> str:
        said = {
            "equal": f"equal within {self.margin:g} points",
            "different": f"different by more than {self.margin:g} points",
            "not shown": f"not shown: neither equal within {self.margin:g} points nor different by more",
        }[self.verdict]
        first, second = _printable(self.first), _printable(self.second)
        seeds = ", ".join(f"{seed}: {value:+.2f}" for seed, value in self.differences.items())
        lines = [
            f"{second} and {first}: {said}",
            f"{second} minus {first}, 90 % interval of the mean: {self.low:+.2f} to {self.high:+.2f}",
            f"by seed: {seeds}",
            "two one-sided t-tests at 5 % on differences of equal seeds, which count as independent and normal",
        ]
        if self.unpaired:
            lines.append(f"left out, as one setting lacks them: seeds {', '.join(map(str, self.unpaired))}")
        if self.verdict == "not shown":
            lines.append(
                f"about {self.more} more seeds would decide if mean and spread stayed as they are"
                if self.more is not None
                else f"even {MOST_SEEDS:,} seeds would not decide if mean and spread stayed as they are"
            )
        return "\n".join(lines)


def equality(views: Sequence[View], margin: float) -> Equality:
    """Test whether the two settings of these runs are equal within `margin` points.

    Raises:
        UsageError: not two settings, fewer than two common seeds, two runs of one seed, or a margin that is not
            positive and finite.
        RunError: scipy is not installed.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise UsageError(f"--equal must be a positive number of points, got {shown(margin)}")
    grouped = by_label([view for view in views if view.complete and view.score is not None])
    if len(grouped) != 2:
        raise UsageError(f"--equal compares two settings, and these runs have {len(grouped)}: {', '.join(grouped)}")
    (first, a), (second, b) = grouped.items()
    scores = [_by_seed(label, group) for label, group in ((first, a), (second, b))]
    common = sorted(scores[0].keys() & scores[1].keys())
    if len(common) < 2:
        raise UsageError(
            f"--equal pairs runs by seed and needs two common seeds, got {len(common)}: {first} has {sorted(scores[0])}"
            f" and {second} has {sorted(scores[1])}"
        )
    differences = {seed: scores[1][seed] - scores[0][seed] for seed in common}
    mean, spread = statistics.fmean(differences.values()), statistics.stdev(differences.values())
    half = _half(len(common), spread)
    verdict = _verdict(mean - half, mean + half, margin)
    more = None
    if verdict == "not shown":
        enough = (n for n in range(len(common) + 1, MOST_SEEDS + 1) if _half(n, spread) < abs(abs(mean) - margin))
        needed = next(enough, None)
        more = None if needed is None else needed - len(common)
    return Equality(
        first=first,
        second=second,
        margin=margin,
        differences=differences,
        unpaired=sorted(scores[0].keys() ^ scores[1].keys()),
        low=mean - half,
        high=mean + half,
        verdict=verdict,
        more=more,
    )


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if -margin < low and high < margin:
        return "equal"
    return "different" if low > margin or high < -margin else "not shown"


def _half(n: int, spread: float) -> float:
    return quantile(n - 1, CONFIDENCE) * spread / math.sqrt(n)


def quantile(freedom: int, share: float) -> float:
    """The value below which a share of Student's t distribution lies.

    Raises:
        RunError: scipy is not installed.
    """
    try:
        special = importlib.import_module("scipy.special")
    except ModuleNotFoundError as error:
        raise RunError("intervals over seeds need scipy: pip install scipy") from error
    return float(special.stdtrit(freedom, share))


def _by_seed(label: str, group: Sequence[View]) -> dict[int, float]:
    found: dict[int, float] = {}
    for view in group:
        if view.seed is None or view.score is None:
            continue
        if view.seed in found:
            raise UsageError(f"--equal pairs runs by seed, and {label} has two runs of seed {view.seed}: leave one out")
        found[view.seed] = view.score
    return found


def _baseline(groups: Mapping[str, Sequence[View]], asked: str | None) -> str:
    if asked is None:
        return next((label for label, group in groups.items() if group[0].recipe == BASELINE), next(iter(groups)))
    if asked in groups:
        return asked
    fitting = [label for label, group in groups.items() if group[0].recipe == asked]
    if len(fitting) != 1:
        raise unknown("baseline", asked, tuple(groups))
    return fitting[0]


def _with_task(view: View) -> View:
    return replace(view, label=f"{view.label}, {view.task}")


def _scores(views: Sequence[View]) -> list[float]:
    return [view.score for view in views if view.score is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _printable(text: str) -> str:
    """Without control characters, which could rewrite a reader's terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
