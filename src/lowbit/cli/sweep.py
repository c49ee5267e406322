"""``lowbit sweep``: many runs from one file, ending in a table and a page."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.fold import folded
from lowbit.errors import RunError, UsageError, shown

if TYPE_CHECKING:  # help must not wait for the trainer
    from lowbit.train.config import TrainConfig
    from lowbit.train.sweep.run import Done

DESCRIPTION = (
    "Train every combination of a grid, or search for settings of high accuracy at low cost, in parallel processes. "
    "The same command goes on after a kill. It ends with a table and a page of the runs."
)
HELP = "train a grid of runs, or search for good settings"
EXAMPLE = "lowbit sweep examples/study.yaml"


def add_arguments(parser: Any) -> None:
    """What the command takes."""
    parser.add_argument("sweep", type=Path, help="YAML file, see docs/sweeps.md")
    parser.add_argument("--out", type=Path, help="folder of the runs (as the file says, or runs/NAME for NAME.yaml)")
    parser.add_argument("--jobs", type=int, help="runs at the same time (as the file says, or 1)")


def run(*, sweep: Path, **changes: Any) -> None:
    """Do what is left of the sweep, and show its runs."""
    from lowbit.train.sweep.run import run_sweep
    from lowbit.train.sweep.settings import read_sweep

    settings = read_sweep(sweep, **{name: value for name, value in changes.items() if value is not None})
    done = run_sweep(settings, tell)
    conclude(done, settings.out / "report.html", settings.jobs)


def run_seeds(config: "TrainConfig", seeds: str, jobs: int) -> None:
    """Train one setting with each of the seeds, a text such as ``0,1,2``, and show the runs."""
    from lowbit.train.sweep.grid import run_all
    from lowbit.train.sweep.run import Done

    plan = plan_of(config, seeds)
    failed = run_all(plan, jobs=jobs, tell=tell)
    done = Done(folders=[folder for folder in plan if folder not in failed], failed=failed)
    conclude(done, next(iter(plan)).parent / "report.html", jobs)


def plan_of(config: "TrainConfig", seeds: str) -> dict[Path, "TrainConfig"]:
    """The settings of a run for each of the seeds, a text such as ``0,1,2``, by run folder.

    Raises:
        UsageError: the text is something else, or has a seed twice.
    """
    try:
        numbers = [int(each) for each in seeds.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds {shown(seeds)}: give whole numbers with commas, e.g. 0,1,2") from error
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"--seeds {seeds}: a seed is there twice")
    out = config.out
    if out is None:
        alone = replace(config, seed=0).resolved(threads=1, amp="none").out
        assert alone is not None
        out = alone.with_name(alone.name.removesuffix("-0"))
    return {out / f"seed{seed}": replace(config, seed=seed, out=out / f"seed{seed}") for seed in numbers}


def tell(line: str) -> None:
    """Show a line at once, in a file too."""
    print(line, flush=True)


def conclude(done: "Done", page: Path, jobs: int) -> None:
    """Print a table of complete runs, and write a page of them.

    Raises:
        RunError: runs failed.
    """
    from lowbit.report.compare import compare
    from lowbit.report.page import write_report
    from lowbit.report.reading import views_of

    views, _ = views_of(done.folders)
    try:
        if done.front is not None:
            print(folded(f"\n{done.front}"))
        elif views:
            print(folded(f"\n{compare(views, force=len({view.task for view in views}) > 1)}"))
            if jobs > 1:
                print(f"seconds are of {jobs} runs at the same time: they tell less than those of runs alone")
        if views:
            write_report(done.folders, page)
            print(f"\n{page}: {len(views)} run{'s' * (len(views) != 1)}, {page.stat().st_size / 1e6:.1f} MB")
    except RunError as error:  # of a library that is missing; the runs are complete
        print(f"lowbit: {error}", file=sys.stderr)
    if done.failed:
        listed = "; ".join(f"{folder.name}: {reason}" for folder, reason in done.failed.items())
        runs = f"{len(done.failed)} run{'s' * (len(done.failed) != 1)}"
        raise RunError(f"{runs} failed, and the same command tries again: {listed}")
