"""The checkpoint that a run goes on from: the newest good one, which must fit settings, model and data."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowbit import ranks
from lowbit.errors import RunError, UsageError
from lowbit.train import checkpoint, data
from lowbit.train.config import Result, settled
from lowbit.train.folder import CHECKPOINT, CONFIG, RESULT, Settings, read_result, read_settings, sources
from lowbit.train.module import Module

# What lowbit keeps in a checkpoint, beside what Lightning does.
_OWN = {"config", "state", "loader", "test", "controller", "cost", "data", "sources"}
_LATER = {"processes", "unsent"}  # older checkpoints lack them


def resume_point(
    settings: Settings, loaded: data.Data, module: Module, *, data_changed: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """The checkpoint that the run goes on from, None at step 0, and what of the data changed since; `module` fits it.

    Raises:
        RunError: as `newest`, it does not fit the model, or the data set changed and `data_changed` is not set.
    """
    out = settings.config.out
    assert out is not None
    if not checkpoint.kept(out / CHECKPOINT):
        return None, []

    def tell(path: Path, error: RunError) -> None:
        print(f"lowbit: {error} It is now {checkpoint.set_aside(path).name}.", file=sys.stderr)

    path, content = newest(settings, tell)
    check_fit(path, content, module)
    if path.name != CHECKPOINT and ranks.rank() == 0:
        print(f"lowbit: going on from {path}, of step {content['global_step']}", file=sys.stderr)
    then, now = content["lowbit"]["data"], module.fingerprint
    changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if changed and not data_changed:
        what = ", ".join(f"{name} (was {then.get(name)}, is {now.get(name)})" for name in changed)
        raise RunError(
            f"the data set {loaded.name} changed since step {content['global_step']}: {what}. Bring the old data back, "
            f"or go on with the new data: `lowbit resume {out} --data-changed`."
        )
    module.test = content["lowbit"]["test"]
    module.cost = dict(content["lowbit"]["cost"])
    if module.controller is not None:
        try:
            module.controller.load_state_dict(content["lowbit"]["controller"])
        except UsageError as error:
            raise RunError(f"{path} does not fit these settings: {error}") from error
    return content, changed


def newest(settings: Settings, tell: Callable[[Path, RunError], None] = lambda *_: None) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is not damaged; `tell` hears of each newer one once there is one.

    Raises:
        RunError: all are damaged, or the newest is of another run.
    """
    assert settings.config.out is not None
    damaged: list[tuple[Path, RunError]] = []
    for path in checkpoint.kept(settings.config.out / CHECKPOINT):
        try:
            content = _load_checkpoint(path, settings)
        except checkpoint.DamagedError as error:
            damaged.append((path, error))
            continue
        for each in damaged:
            tell(*each)
        return path, content
    reasons = " ".join(str(error) for _, error in damaged)
    raise RunError(f"{reasons} No good checkpoint is left: to start again from step 0, remove the damaged ones.")


def _load_checkpoint(path: Path, settings: Settings) -> dict[str, Any]:
    """Read a checkpoint of the run with these settings.

    Raises:
        DamagedError: the file holds no checkpoint of lowbit.
        RunError: its settings were never those of the run folder.
    """
    content: dict[str, Any] = checkpoint.load(path)
    own = content.get("lowbit")
    if not isinstance(own, dict) or set(own) - _LATER != _OWN:
        raise checkpoint.DamagedError(
            f"{path} has no state of lowbit; expected a checkpoint that `lowbit train` wrote."
        )
    if settled(own["config"]) not in map(settled, settings.versions()):
        now = settings.config.to_dict()
        name = next(name for name in {**now, **own["config"]} if own["config"].get(name) != now.get(name))
        raise RunError(
            f"{path} is of another run: it has {name}={own['config'].get(name)!r},"
            f" and {path.with_name(CONFIG)} has {now.get(name)!r}."
        )
    return content


def check_fit(path: Path, content: Mapping[str, Any], module: Module) -> None:
    """Raise a RunError where the recipe, the model or its tensors are others, or the step is beyond the run's end."""
    now = sources(module.config)
    for name, then in content["lowbit"]["sources"].items():
        if now.get(name) != then:
            raise RunError(f"{path.with_name(name)} is not what the run began with (SHA-256 {then}): bring that back.")
    saved, own = content["state_dict"], module.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise RunError(f"{path} does not fit the model {module.config.model}: they differ in {name}.")
    step = content["global_step"]
    if not 0 < step <= module.total_steps:
        raise RunError(f"{path} is at step {step}; expected a step from 1 to {module.total_steps}.")


def result_of_complete(out: Path) -> Result | None:
    """The result of a complete run whose checkpoint is good; None where there is something left to do."""
    if not (out / RESULT).is_file():
        return None
    result, path = read_result(out), out / CHECKPOINT
    if not checkpoint.kept(path):
        print(f"lowbit: the run is complete, and its checkpoints are gone from {out}", file=sys.stderr)
        return result
    try:
        step = _load_checkpoint(path, read_settings(out))["global_step"]
    except checkpoint.DamagedError:  # who goes on from the one before it says so
        return None
    return result if step == result.steps else None
