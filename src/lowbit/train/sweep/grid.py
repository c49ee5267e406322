"""The runs of a grid: those that are complete are kept, those that began go on, and the others begin."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_whole
from lowbit.train.config import TrainConfig, settled
from lowbit.train.folder import CONFIG, is_complete, read_result, read_settings
from lowbit.train.sweep.jobs import Ended, Point, do
from lowbit.train.sweep.settings import MOST_JOBS

Tell = Callable[[str], None]
"""Shows a line to whoever waits."""

# How a run is executed and kept, which changes nothing about what it is.
_FREE = {"threads", "keep", "checkpoint_every", "checkpoint_minutes", "logger", "proof"}


def run_all(plan: Mapping[Path, TrainConfig], *, jobs: int, tell: Tell = print) -> dict[Path, str]:
    """Train every run of a plan, some at the same time; what an earlier call did is not done again.

    Args:
        plan: settings by run folder.
        jobs: runs at the same time.
        tell: gets a line when a run starts, and one when it ends.

    Returns:
        For each run that failed, the reason in one line. The others are complete.

    Raises:
        UsageError: a folder holds a run with other settings, or `jobs` is not a whole number from 1.
        RunError: the settings of a run are damaged.
        Stopped: a signal came; the same call goes on.
    """
    check_whole("jobs", jobs, 1, MOST_JOBS)
    for config in plan.values():
        check_same(config)
    grid = _Grid(plan, tell)
    do(grid, jobs=jobs)
    return grid.failed


class _Grid:
    """The work of `run_all`."""

    def __init__(self, plan: Mapping[Path, TrainConfig], tell: Tell) -> None:
        self.failed: dict[Path, str] = {}
        self._left = [config for folder, config in plan.items() if not is_complete(folder)]
        self._count, self._ended = len(plan), len(plan) - len(self._left)
        self._tell = tell
        if self._ended:
            tell(f"{self._ended} of {self._count} runs are complete already")

    def next(self) -> TrainConfig | None:
        """Start or resume the next run."""
        if not self._left:
            return None
        config = self._left.pop(0)
        self._tell(beginning(config))
        return config

    def evaluated(self, folder: Path, points: list[Point]) -> bool:
        """Every run goes to its end."""
        raise AssertionError(f"{folder} told {len(points)} evaluations, and nobody asked")

    def ended(self, run: Ended) -> None:
        """Count it, or keep the reason of its failure."""
        self._ended += run.state != "stopped"
        if run.state == "failed":
            self.failed[run.folder] = run.text
        self._tell(f"{ending(run)}  ({self._ended} of {self._count})")


def beginning(config: TrainConfig) -> str:
    """A line that says that a run begins, or goes on."""
    assert config.out is not None
    return f"{'resumed' if (config.out / CONFIG).exists() else 'started'}  {config.out.name}"


def ending(run: Ended) -> str:
    """A line that says how a run ended."""
    if run.state != "done":
        return f"{run.state:7}  {run.folder.name}{run.text and f': {run.text}'}"
    result = read_result(run.folder)
    score = "not evaluated"
    if result.test_accuracy is not None:
        score = f"accuracy {100 * result.test_accuracy:.2f} %"
    elif result.test_bits_per_byte is not None:
        score = f"{result.test_bits_per_byte:.4f} bits/byte"
    return f"done     {run.folder.name}  {score}  {run.seconds:.3g} s"


def check_same(config: TrainConfig) -> None:
    """Raise where the run folder holds a run with other settings.

    Raises:
        UsageError: it does.
        RunError: the settings in the folder are damaged.
    """
    assert config.out is not None
    if not (config.out / CONFIG).exists():
        return
    found = read_settings(config.out).config
    assert found.threads is not None
    asked = config.resolved(threads=found.threads, amp=found.amp)
    there, wanted = settled(found.to_dict()), settled(asked.to_dict())
    for name in sorted(there.keys() | wanted.keys()):
        if name not in _FREE and there.get(name) != wanted.get(name):
            raise UsageError(
                f"{config.out} is a run with {name}={there.get(name)!r}, and {name}={wanted.get(name)!r} is asked for: "
                "choose another folder with --out, or remove that run"
            )
