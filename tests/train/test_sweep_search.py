"""A search by optuna: trials are runs, the same after a kill, ended early only where cheaper runs do better."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit import metrics
from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.train.folder import is_complete, read_result, read_settings
from lowbit.train.sweep.jobs import points_of
from lowbit.train.sweep.run import run_sweep
from lowbit.train.sweep.search import LEAST, _Search, is_behind, run_search
from lowbit.train.sweep.settings import Range, Search, Sweep

optuna = pytest.importorskip("optuna")

TRAIN: dict[str, Any] = {"model": "mlp", "data": "digits", "subset": 320, "batch_size": 64, "epochs": 2, "threads": 1}
SPACE = {"recipe": ["fp32", "int8"], "lr": Range(low=0.01, high=0.3, log=True)}


def search_of(out: Path, trials: int = 3, **changes: Any) -> Sweep:
    """A search over recipes and learning rates."""
    return Sweep(out=out, train=TRAIN, search=Search(**({"trials": trials, "settings": SPACE} | changes)))


def study_of(out: Path) -> Any:
    """The study in a sweep's folder."""
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.db'}")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search of six trials that was never stopped."""
    out = tmp_path_factory.mktemp("search") / "whole"
    run_sweep(search_of(out, 6, pruning=False), lambda _: None)
    return out


def test_a_trial_is_a_run_and_its_values_are_the_runs(searched: Path) -> None:
    """Settings, accuracy and cost that the study knows are those of the run folders, and they differ."""
    trials = study_of(searched).trials

    for trial in trials:
        run = searched / f"trial-{trial.number:03d}"
        settings, accuracy = read_settings(run).config, read_result(run).test_accuracy
        assert accuracy is not None
        assert trial.values[0] == pytest.approx(100 * accuracy)
        assert trial.values[1] == metrics.gbitops(Ledger.load(run / "ledger.jsonl").totals()).total
        assert settings.recipe == SPACE["recipe"][trial.params["recipe"]]  # type: ignore[index]  # it is the list
        assert settings.lr == float(f"{trial.params['lr']:.3g}")
    assert len({read_settings(searched / f"trial-{n:03d}").config.lr for n in range(6)}) > 3


def test_the_table_has_the_trials_that_none_beats(searched: Path) -> None:
    """It names exactly the trials that are on the Pareto front, the cheapest first."""
    values = {f"trial-{t.number:03d}": t.values for t in study_of(searched).trials}
    best = {
        name
        for name, (score, cost) in values.items()
        if not any(s >= score and c <= cost and (s, c) != (score, cost) for s, c in values.values())
    }

    front = run_sweep(search_of(searched, 6, pruning=False), lambda _: None).front

    assert front is not None
    named = [line.split()[0] for line in front.splitlines() if line.startswith("trial-")]
    assert set(named) == best
    assert sorted(named, key=lambda name: values[name][1]) == named
    assert "of 6 trials (6 complete)" in front


def test_a_killed_search_goes_on_with_the_same_trials(searched: Path, tmp_path: Path) -> None:
    """Stopped in its third trial and called again, it trains that one to its end and asks for the same settings."""
    out = tmp_path / "killed"
    run_sweep(search_of(out, 2, pruning=False), lambda _: None)
    search = _Search(search_of(out, 3, pruning=False), lambda _: None)
    search.next()  # asked for, and killed before it ran
    lines: list[str] = []

    run_sweep(search_of(out, 6, pruning=False), lines.append)

    assert lines[0] == "2 of 6 trials ended already"
    assert lines[1].startswith("started  trial-002")
    whole, killed = study_of(searched).trials, study_of(out).trials
    assert [trial.params for trial in killed] == [trial.params for trial in whole]
    assert [trial.values for trial in killed] == [trial.values for trial in whole]


def test_the_same_settings_are_not_trained_twice(tmp_path: Path) -> None:
    """A trial with the settings of a complete one takes its values; there is no folder for it."""
    sweep = search_of(tmp_path, 4, settings={"recipe": ["fp32", "int8"]}, pruning=False)
    lines: list[str] = []

    run_sweep(sweep, lines.append)

    skipped = [line for line in lines if line.startswith("skipped")]
    assert len(skipped) == 4 - len(list(tmp_path.glob("trial-*")))
    assert len(skipped) >= 2
    assert {trial.state.name for trial in study_of(tmp_path).trials} == {"COMPLETE"}


def test_a_run_that_is_behind_ends_early(tmp_path: Path) -> None:
    """After runs that learn, one that cannot, at the same cost, is stopped, and its study says pruned."""
    rates = [0.1, 0.12, 0.14, 0.16, 0.0]
    sweep = replace(search_of(tmp_path, 5, settings={"lr": rates}), train=TRAIN | {"epochs": 10})
    search = _Search(sweep, lambda _: None)
    for number in range(5):
        search.study.enqueue_trial({"lr": number})
    lines: list[str] = []

    run_search(sweep, lines.append)

    states = [trial.state.name for trial in study_of(tmp_path).trials]
    assert states == ["COMPLETE"] * 4 + ["PRUNED"]
    assert not is_complete(tmp_path / "trial-004")
    assert lines[-1].startswith("pruned   trial-004  after evaluation ")


def test_another_search_needs_another_folder(searched: Path) -> None:
    """What is searched cannot change on the way; the number of trials can, as the test of the kill shows."""
    with pytest.raises(UsageError, match=r"search.cost='GBitOPs', and search.cost='MACs' is asked for.*--out"):
        run_sweep(search_of(searched, 6, pruning=False, cost="MACs"))
    with pytest.raises(UsageError, match=r"search.settings.recipe="):
        run_sweep(search_of(searched, 6, pruning=False, settings={**SPACE, "recipe": ["fp32"]}))


def test_a_search_of_failures_is_an_error(tmp_path: Path) -> None:
    """If no trial can run, the message has the reason."""
    sweep = search_of(tmp_path, 2, settings={"context": [8, 16]})  # digits are not text

    with pytest.raises(RunError, match=r"every trial failed; the last one: context is a setting of text"):
        run_sweep(sweep, lambda _: None)
    assert [trial.state.name for trial in study_of(tmp_path).trials] == ["FAIL", "FAIL"]


def test_a_search_without_optuna_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command; a grid does not need it."""
    monkeypatch.setitem(sys.modules, "optuna", None)

    with pytest.raises(RunError, match=r"pip install 'lowbit\[sweep\]'"):
        run_sweep(search_of(tmp_path))
    assert run_sweep(Sweep(out=tmp_path / "grid", train=TRAIN, grid={"seed": [0]}), lambda _: None).folders


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    """A file that is no SQLite is reported in one line with what to do."""
    run_sweep(search_of(tmp_path, 1), lambda _: None)
    (tmp_path / "study.db").write_bytes(b"no database at all" * 100)

    with pytest.raises(RunError, match=r"study.db cannot be used .*move it away"):
        run_sweep(search_of(tmp_path, 1))


LEARNT = [(10.0, 50.0), (20.0, 60.0)]


@pytest.mark.parametrize(
    ("own", "rivals", "behind"),
    [
        ([(10.0, 40.0)], [LEARNT] * LEAST, True),
        ([(10.0, 50.0)], [LEARNT] * LEAST, False),  # as good as the median
        ([(10.0, 40.0)], [LEARNT] * (LEAST - 1), False),  # too few to compare with
        ([(10.0, 40.0)], [LEARNT] * (LEAST - 1) + [[(10.0, float("nan"))]], False),  # one of them diverged
        ([(9.0, 40.0)], [LEARNT] * LEAST, False),  # it costs less than all
        ([(10.0, 40.0), (20.0, 61.0)], [LEARNT] * LEAST, False),  # it has caught up
        ([(10.0, 55.0), (20.0, 55.0)], [LEARNT] * LEAST, True),
        ([(10.0, 40.0), (20.0, 40.0)], [LEARNT[:1]] * LEAST, False),  # rivals are not as far
        ([], [LEARNT] * LEAST, False),
    ],
)
def test_a_run_is_behind_only_those_that_cost_no_more(own: Any, rivals: Any, behind: bool) -> None:
    """It is compared with the median of runs that are as far and cost no more; lower scores turn it round."""
    turned = [[(cost, -score) for cost, score in each] for each in (own, *rivals)]

    assert is_behind(own, rivals, higher_is_better=True) is behind
    assert is_behind(turned[0], turned[1:], higher_is_better=False) is behind


def test_points_are_the_cost_before_each_evaluation(searched: Path) -> None:
    """The cost grows with the steps, and the last point is that of the whole run."""
    ledger = Ledger.load(searched / "trial-000" / "ledger.jsonl")

    points = points_of(ledger, "GBitOPs")

    assert len(points) == 2
    assert points[0][0] == pytest.approx(points[1][0] / 2)
    assert points[1][0] == metrics.gbitops(ledger.totals()).total
