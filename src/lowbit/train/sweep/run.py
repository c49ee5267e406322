"""A sweep from its settings to its run folders, whatever it consists of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from lowbit.errors import UsageError
from lowbit.inputs import files
from lowbit.train.folder import CONFIG, is_complete
from lowbit.train.lock import locked
from lowbit.train.sweep.grid import Tell, run_all
from lowbit.train.sweep.search import STUDY, run_search
from lowbit.train.sweep.settings import Sweep, read_sweep

COPY = "sweep.yaml"
"""File in the sweep's folder that has its settings."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a sweep did.

    Args:
        folders: of its runs that are complete.
        failed: for each run of a grid that failed, the reason in one line.
        front: of a search, a table of its best trials.
    """

    folders: Sequence[Path]
    failed: Mapping[Path, str] = field(default_factory=dict)
    front: str | None = None


def run_sweep(sweep: Sweep, tell: Tell = print) -> Done:
    """Do what is left of a sweep.

    Args:
        sweep: its settings.
        tell: gets a line when a run starts, and one when it ends.

    Raises:
        UsageError: the folder is a run, or has runs with other settings, or another search.
        RunError: another process does this sweep, optuna is missing, or every trial failed.
        Stopped: a signal came; the same call goes on.
    """
    out = sweep.out
    if (out / CONFIG).exists():
        raise UsageError(f"{out} is a run folder: choose another folder for the sweep with --out")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder: choose another one for the sweep with --out")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if (out / STUDY).exists():
            _check_same_search(sweep, read_sweep(out / COPY))
        files.write_text(out / COPY, yaml.safe_dump(_plain(sweep), sort_keys=False))
        if sweep.search is None:
            plan = sweep.plan()
            failed = run_all(plan, jobs=sweep.jobs, tell=tell)
            return Done(folders=[folder for folder in plan if folder not in failed], failed=failed)
        front = run_search(sweep, tell)
        return Done(folders=[folder for folder in sorted(out.glob("trial-*")) if is_complete(folder)], front=front)


def _check_same_search(sweep: Sweep, before: Sweep) -> None:
    """Raise where the folder has a search of other settings; the number of trials and of jobs may change."""
    free = {"out", "jobs", "search.trials"}
    now, then = _flat(_plain(sweep)), _flat(_plain(before))
    for name in sorted(now.keys() | then.keys()):
        if name not in free and now.get(name) != then.get(name):
            raise UsageError(
                f"{sweep.out} is a sweep with {name}={then.get(name)!r}, and {name}={now.get(name)!r} is asked for: "
                "choose another folder with --out, or remove that one"
            )


def _plain(sweep: Sweep) -> dict[str, Any]:
    """The settings as YAML writes them, read again by `read_sweep`."""
    values = {name: value for name, value in asdict(sweep).items() if value is not None}
    return values | {"out": str(sweep.out)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
