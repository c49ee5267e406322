"""Runs side by side: groups, intervals, and the test of equality, on small real runs and on scores that are set."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import copied

from lowbit import UsageError
from lowbit.report.compare import Equality, compare, equality, quantile
from lowbit.report.reading import view_of, views_of
from lowbit.report.views import View

NAMES = ("fp32-0", "fp32-1", "int8-0", "int8-1")


@pytest.fixture
def views(runs: dict[str, Path]) -> list[View]:
    """Two seeds of fp32 and of int8."""
    return views_of([runs[name] for name in NAMES])[0]


def scored(view: View, label: str, scores: list[float]) -> list[View]:
    """Runs of a setting that reached these scores, with seeds 0, 1, ..."""
    return [replace(view, label=label, recipe=label, seed=seed, score=score) for seed, score in enumerate(scores)]


def equality_of(view: View, first: list[float], second: list[float], margin: float) -> Equality:
    """The test of two settings with these scores."""
    return equality([*scored(view, "a", first), *scored(view, "b", second)], margin)


@pytest.mark.parametrize(
    ("freedom", "share", "expected"),
    [(1, 0.975, 12.7062), (2, 0.95, 2.91999), (4, 0.975, 2.77645), (30, 0.95, 1.69726)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, share: float, expected: float) -> None:
    """Printed tables of Student's t have these values."""
    assert quantile(freedom, share) == pytest.approx(expected, abs=1e-4)


def test_a_setting_is_the_mean_of_its_seeds(views: list[View]) -> None:
    """Mean, deviation and interval of three scores are those computed by hand, and fp32 is the baseline."""
    found = compare([*scored(views[2], "int8", [79.0, 80.0, 81.0]), *scored(views[0], "fp32", [80.5])])

    fp32, int8 = found.groups
    assert found.baseline == fp32.label == "fp32"
    assert (int8.mean, int8.deviation, list(int8.seeds)) == (80.0, 1.0, [0, 1, 2])
    assert int8.interval == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert fp32.interval is None
    assert any("one run has no interval" in note for note in found.notes)


def test_memory_is_that_of_a_step(views: list[View]) -> None:
    """The column is the whole step where every run measured it, and what was held for the backward otherwise."""
    first, *rest = views
    assert first.memory is not None

    whole, part = compare(views), compare([replace(first, memory=None), *rest])

    assert whole.groups[0].step_mib == pytest.approx(first.memory.total / 2**20)
    assert "MiB" in whole.table.header
    assert "MiB held" in part.table.header


def test_other_engines_and_versions_are_said(views: list[View]) -> None:
    """A note names versions that differ, and a setting whose runs had different engines."""
    first, second, *rest = views

    notes = compare([replace(first, engines={"bf16": 1}, versions={"torch": "1.0"}), second, *rest]).notes

    assert any("versions of torch: 1.0, " in note for note in notes)
    assert any(note.startswith("fp32: its runs had different engines") for note in notes) == bool(second.engines)
    assert not any("versions" in note or "engines" in note for note in compare(views).notes)


def test_costs_are_those_of_the_ledgers(views: list[View]) -> None:
    """The bit operations of a group are the mean over its runs, and the table has their share of the baseline's."""
    found = compare(views)

    fp32, int8 = found.groups
    assert int8.costs["GBitOPs"] == views[2].costs["GBitOPs"].total
    share = float(found.table.rows[1][found.table.header.index("bit op %")])
    assert share == pytest.approx(100 * int8.costs["GBitOPs"] / fp32.costs["GBitOPs"], rel=0.01)
    assert 6 < share < 100


def test_only_what_nothing_beats_is_marked(views: list[View]) -> None:
    """A dearer setting with a lower score is not on the front; the cheapest one always is."""
    worse = compare([*scored(views[0], "fp32", [79.0, 79.0]), *scored(views[2], "int8", [80.0, 80.0])])
    better = compare([*scored(views[0], "fp32", [81.0, 81.0]), *scored(views[2], "int8", [80.0, 80.0])])

    assert [group.best for group in worse.groups] == [False, True]
    assert [group.best for group in better.groups] == [True, True]


def test_other_tasks_are_refused_by_name(runs: dict[str, Path], tmp_path: Path) -> None:
    """Runs of two models have no common table unless it is forced, and then rows name the task."""
    other = view_of(copied(runs["int8-0"], tmp_path / "other", model="resnet20"))
    views = [view_of(runs["int8-0"]), other]

    with pytest.raises(UsageError, match=r"mlp on digits, resnet20 on digits.*--force"):
        compare(views)
    assert [group.label for group in compare(views, force=True).groups] == [
        "int8, mlp on digits",
        "int8, resnet20 on digits",
    ]


def test_unfinished_runs_are_left_out_and_counted(runs: dict[str, Path], views: list[View]) -> None:
    """A run without a result is in no mean, and a note says so."""
    found = compare([*views, view_of(runs["stopped"])])

    assert sum(len(group.scores) for group in found.groups) == len(NAMES)
    assert "1 unfinished run left out" in found.notes


def test_an_unknown_baseline_is_named(views: list[View]) -> None:
    """The message says which settings there are."""
    with pytest.raises(UsageError, match=r"int9.*fp32.*int8"):
        compare(views, baseline="int9")


def test_formats_have_the_same_figures(views: list[View]) -> None:
    """JSON, CSV and Markdown agree, and Markdown escapes what would break a row."""
    found = compare([*views, *scored(views[0], "a|b", [50.0])])
    data, lines = json.loads(found.to_json()), list(csv.DictReader(found.to_csv().splitlines()))

    assert [group["mean"] for group in data["groups"]] == [float(line["accuracy %"]) for line in lines]
    assert [float(line["GBitOPs"]) for line in lines] == [group["costs"]["GBitOPs"] for group in data["groups"]]
    assert "a\\|b" in found.to_markdown()
    assert len(found.to_dataframe()) == len(lines) == 3


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ([80.0, 81.1, 82.0, 83.1], "equal"),
        ([78.0, 79.1, 80.0, 81.1], "different"),
        ([82.0, 83.1, 84.0, 85.1], "different"),
        ([80.0, 79.0, 82.0, 85.0], "not shown"),
    ],
)
def test_equality_is_shown_refuted_or_neither(views: list[View], second: list[float], verdict: str) -> None:
    """The 90 % interval of the differences lies within the margin, beyond it, or across it."""
    found = equality_of(views[0], [80.0, 81.0, 82.0, 83.0], second, 0.3)

    assert found.verdict == verdict
    assert (found.more is None) == (verdict != "not shown")
    assert found.low < found.high


def test_as_many_seeds_as_are_asked_for_decide(views: list[View]) -> None:
    """With the seeds that a test asks for, and the same mean and spread, it decides; with one fewer it does not."""
    mean, spread = 0.1, 0.4

    def scores(n: int) -> list[float]:
        # Alternating values of this mean whose standard deviation over n - 1 is exactly the spread; n is even.
        return [mean + (-1) ** i * spread * ((n - 1) / n) ** 0.5 for i in range(n)]

    few = equality_of(views[0], [0.0] * 4, scores(4), 0.3)
    assert few.more is not None
    enough = 4 + few.more + few.more % 2
    assert few.verdict == "not shown"
    assert equality_of(views[0], [0.0] * enough, scores(enough), 0.3).verdict == "equal"
    assert equality_of(views[0], [0.0] * (enough - 2), scores(enough - 2), 0.3).verdict == "not shown"


def test_equal_seeds_are_paired(views: list[View]) -> None:
    """Seeds that vary far more than the settings differ still show equality, as the same seeds are subtracted."""
    found = equality_of(views[0], [10.0, 50.0, 90.0], [10.1, 50.0, 90.1], 0.3)

    assert found.verdict == "equal"
    assert list(found.differences) == [0, 1, 2]


def test_seeds_of_one_setting_alone_are_named(views: list[View]) -> None:
    """They enter no difference, and the text says which they are."""
    found = equality_of(views[0], [80.0, 81.0, 82.0], [80.1, 81.0], 0.3)

    assert list(found.differences) == [0, 1]
    assert "seeds 2" in str(found)


@pytest.mark.parametrize(
    ("first", "second", "margin", "message"),
    [
        ([80.0], [80.0], 0.3, "two common seeds"),
        ([80.0, 81.0], [80.0, 81.0], 0.0, "positive number"),
        ([80.0, 81.0], [80.0, 81.0], float("nan"), "positive number"),
        ([80.0, 81.0], [], 0.3, "these runs have 1"),
    ],
)
def test_what_cannot_be_tested_is_refused(
    views: list[View], first: list[float], second: list[float], margin: float, message: str
) -> None:
    """One seed, an empty margin and a single setting are wrong requests."""
    with pytest.raises(UsageError, match=message):
        equality_of(views[0], first, second, margin)


def test_two_runs_of_one_seed_are_refused(views: list[View]) -> None:
    """Which of them to pair is unknown."""
    with pytest.raises(UsageError, match="two runs of seed 0"):
        equality([*views, views[0]], 0.3)
