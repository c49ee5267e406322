"""A search for settings with a high score at a low cost, by optuna, whose trials are kept in a SQLite file.

Trial n is a function of what the file holds and of (seed, n), so a search with one job that is killed and called again
asks for the same trials as one that was never stopped. Only this process opens the file; each run is a process.
"""

import importlib
import math
import statistics
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.errors import RunError
from lowbit.evidence.ledger import Ledger
from lowbit.report.reading import view_of
from lowbit.tables import text_table
from lowbit.train.config import TrainConfig
from lowbit.train.folder import LEDGER
from lowbit.train.sweep.grid import Tell, beginning, check_same, ending
from lowbit.train.sweep.jobs import Ended, Point, do, points_of
from lowbit.train.sweep.settings import Range, Sweep

STUDY = "study.db"
LEAST = 4
"""Runs that a run is compared with, at least, before it can be pruned."""


def run_search(sweep: Sweep, tell: Tell = print) -> str:
    """Do the trials of a search, some at the same time; what an earlier call did is not done again.

    A trial that diverges or cannot be built counts as failed, and the search goes on.

    Returns:
        A table of the trials that no other beats in both score and cost.

    Raises:
        RunError: optuna is not installed, or every trial failed.
        UsageError: a folder holds a run with other settings.
        Stopped: a signal came; the same call goes on.
    """
    search = _Search(sweep, tell)
    do(search, jobs=sweep.jobs, cost=sweep.search.cost if sweep.search is not None and sweep.search.pruning else None)
    if search.reasons and not search.study.best_trials:
        raise RunError(f"every trial failed; the last one: {search.reasons[-1]}")
    return search.front()


class _Search:
    """The work of `run_search`."""

    def __init__(self, sweep: Sweep, tell: Tell) -> None:
        assert sweep.search is not None
        self.sweep, self.search, self._tell = sweep, sweep.search, tell
        self.optuna = _optuna()
        self.reasons: list[str] = []
        self.study = self._study()
        self._space = {name: self._distribution(each) for name, each in self.search.settings.items()}
        self._points: dict[Path, list[Point]] = {}
        self._pruned: set[Path] = set()
        trials = self._begun()
        self._waiting = [trial for trial in trials if not trial.state.is_finished()]
        for trial in trials:
            check_same(self._config(trial))
            if trial.state.is_finished() and (self._folder(trial.number) / LEDGER).exists():
                ledger = Ledger.load(self._folder(trial.number) / LEDGER, drop_damaged=True)
                self._points[self._folder(trial.number)] = points_of(ledger, self.search.cost)
        if ended := len(trials) - len(self._waiting):
            tell(f"{ended} of {self.search.trials} trials ended already")

    def next(self) -> TrainConfig | None:
        """Go on with a trial that was killed, or ask for a new one; one with known settings needs no run."""
        while True:
            if self._waiting:
                trial = self._waiting.pop(0)
            elif len(self._begun()) < self.search.trials:
                trial = self._ask()
            else:
                return None
            twin = self._twin(trial)
            if twin is None:
                config = self._config(trial)
                self._tell(f"{beginning(config)}  {_listed(self._values(trial))}")
                return config
            self.study.tell(trial.number, twin.values)
            same = self._folder(twin.number).name
            self._tell(f"skipped  {self._folder(trial.number).name}  it has the settings of {same}")

    def evaluated(self, folder: Path, points: list[Point]) -> bool:
        """End the run where those that cost no more do better."""
        self._points[folder] = points
        if folder in self._pruned:
            return False
        others = [each for other, each in self._points.items() if other != folder]
        if is_behind(points, others, higher_is_better=self._higher):
            self._pruned.add(folder)
            return True
        return False

    def ended(self, run: Ended) -> None:
        """Tell the study."""
        number = int(run.folder.name.removeprefix("trial-"))
        state = self.optuna.trial.TrialState
        if run.state == "done":
            view = view_of(run.folder)
            if view.score is not None:
                self.study.tell(number, [view.score, view.costs[self.search.cost].total])
                return self._tell(ending(run))
        if run.state == "stopped" and run.folder not in self._pruned:
            return self._tell(ending(run))  # by a signal: the trial goes on next time
        if run.folder in self._pruned:
            self.study.tell(number, state=state.PRUNED)
            n = len(self._points[run.folder])
            return self._tell(f"pruned   {run.folder.name}  after evaluation {n}: runs that cost no more do better")
        self.study.tell(number, state=state.FAIL)
        self.reasons.append(run.text or "it has no score that is a number")
        return self._tell(ending(run))

    def front(self) -> str:
        """The trials that no other beats in both score and cost, the cheapest first."""
        best = {self._folder(trial.number).name: trial for trial in self.study.best_trials}
        score = "accuracy %" if self._higher else "bits/byte"
        rows = [
            [name, *(str(each) for each in self._values(trial).values()), *(f"{each:.4g}" for each in trial.values)]
            for name, trial in sorted(best.items(), key=lambda item: item[1].values[1])
        ]
        counts = Counter(trial.state.name.lower() for trial in self._begun())
        ended = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = text_table(["trial", *self.search.settings, score, self.search.cost], rows)
        return f"{table}\n\nof {sum(counts.values())} trials ({ended}), none beats these in both score and cost"

    @property
    def _higher(self) -> bool:
        """Whether a higher score is better."""
        return bool(self.study.directions[0] == self.optuna.study.StudyDirection.MAXIMIZE)

    def _study(self) -> Any:
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        path = self.sweep.out / STUDY
        text = str(self.sweep.train.get("data", "")).startswith("text:")  # whose score is bits per byte
        try:
            return self.optuna.create_study(
                storage=f"sqlite:///{path.resolve()}",
                study_name="sweep",
                directions=["minimize" if text else "maximize", "minimize"],
                load_if_exists=True,
            )
        except Exception as error:  # of optuna, of its storage, of SQLite
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{path} cannot be used ({reason}): move it away to begin a new search") from error

    def _begun(self) -> list[Any]:
        """The trials, without those that optuna was told to try and that wait to be asked for."""
        waiting = self.optuna.trial.TrialState.WAITING
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != waiting]

    def _ask(self) -> Any:
        seed = zlib.crc32(f"{self.search.seed} {len(self._begun())}".encode())
        self.study.sampler = self.optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=self.sweep.jobs > 1
        )
        return self.study.ask(self._space)

    def _twin(self, trial: Any) -> Any:
        """A complete trial with the same settings; None without one."""
        complete = self.study.get_trials(deepcopy=False, states=[self.optuna.trial.TrialState.COMPLETE])
        return next((each for each in complete if self._values(each) == self._values(trial)), None)

    def _values(self, trial: Any) -> dict[str, Any]:
        """The settings of a trial: numbers with three digits, and lists, which the study keeps as text."""
        return {name: _value(self.search.settings[name], each) for name, each in trial.params.items()}

    def _config(self, trial: Any) -> TrainConfig:
        return self.sweep.config(self._values(trial), self._folder(trial.number).name)

    def _folder(self, number: int) -> Path:
        return self.sweep.out / f"trial-{number:03d}"

    def _distribution(self, space: Range | Sequence[Any]) -> Any:
        kinds = self.optuna.distributions
        if not isinstance(space, Range):
            return kinds.CategoricalDistribution(range(len(space)))
        kind = kinds.IntDistribution if space.whole else kinds.FloatDistribution
        return kind(space.low, space.high, log=space.log)


def _value(space: Range | Sequence[Any], given: Any) -> Any:
    if not isinstance(space, Range):
        return space[given]
    return given if space.whole else float(f"{given:.3g}")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def is_behind(own: Sequence[Point], others: Sequence[Sequence[Point]], *, higher_is_better: bool) -> bool:
    """Whether a run should end early: after n evaluations its score is worse than the median of its rivals'.

    Its rivals are the runs that cost no more after as many evaluations; there must be `LEAST`. So a run that costs
    less than the others stays, however low its score: it may be on the Pareto front.

    Source: after the median stopping rule of Golovin et al. 2017 (Google Vizier), which compares the best score so far
    with the running means of all complete runs, whatever they cost.
    """
    n = len(own)
    if not n:
        return False
    cost, score = own[-1]
    rivals = [each[n - 1][1] for each in others if len(each) >= n and each[n - 1][0] <= cost]
    rivals = [each for each in rivals if not math.isnan(each)]
    if len(rivals) < LEAST:
        return False
    median = statistics.median(rivals)
    return score < median if higher_is_better else score > median


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise RunError("a search needs optuna: pip install 'lowbit[sweep]'") from error
