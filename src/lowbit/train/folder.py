"""The files of a run folder, and the two that say what the run is: its settings with their changes, and its result."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from lowbit.errors import RunError, UsageError
from lowbit.evidence.memory import StepMemory
from lowbit.inputs import files, userfile
from lowbit.inputs.checks import check_fields
from lowbit.methods.recipe import Recipe, from_toml, is_file_name, read_file
from lowbit.tables import json_text
from lowbit.train.config import CHANGEABLE, Result, TrainConfig
from lowbit.train.lock import LOCK

CHECKPOINT = "last.ckpt"
CONFIG = "config.yaml"
LEDGER = "ledger.jsonl"
PROOF = "proof.txt"
RECIPE = "recipe.toml"  # of a run whose recipe is a file: its text as the run began
MODEL = "model.py"  # of a run whose model is a class of a file: the same
RESULT = "result.json"
RANGE_TEST = "range-test.txt"

_LIMIT = 1 << 20  # bytes of settings or of a result


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, and what of them changed on the way.

    Args:
        config: the settings in force.
        changes: one entry for each time the run went on with something else: ``from_step``, and for each setting its
            value ``from`` and ``to``; ``data`` names what of the data set changed.
    """

    config: TrainConfig
    changes: tuple[Mapping[str, Any], ...] = ()

    def changed(self, config: TrainConfig, *, step: int, data: Sequence[str] = ()) -> Self:
        """The same run, which goes on from `step` with the settings `config`, and with changed data where it has any.

        A change that was made after that step counts from it: what ran in between is gone.
        """
        before, now = self.config.to_dict(), config.to_dict()
        entry: dict[str, Any] = {
            name: {"from": before[name], "to": now[name]} for name in CHANGEABLE if before[name] != now[name]
        }
        if data:
            entry["data"] = list(data)
        changes = [{**change, "from_step": min(change["from_step"], step)} for change in self.changes]
        if entry:
            changes.append({"from_step": step, **entry})
        return dataclasses.replace(self, config=config, changes=tuple(changes))

    def versions(self) -> list[dict[str, Any]]:
        """All settings as they were in force one after the other, the newest first."""
        versions = [self.config.to_dict()]
        for change in reversed(self.changes):
            old = {name: value["from"] for name, value in change.items() if name in CHANGEABLE}
            versions.append(versions[-1] | old)
        return versions


def refuse_taken(out: Path) -> None:
    """Raise where `out` is not free for a new run; what a killed process left before it wrote the settings is ignored.

    Raises:
        UsageError: it is not a folder, or has something in it.
    """
    if out.exists() and (
        not out.is_dir() or any(path.name != LOCK and not files.is_part(path) for path in out.iterdir())
    ):
        raise UsageError(
            f"{out} exists and is not empty. Continue that run with `lowbit resume {out}`,"
            " or choose another folder with --out."
        )


def is_complete(out: Path) -> bool:
    """Whether the run in `out` reached its end."""
    return (out / CONFIG).exists() and (out / RESULT).exists()


def read_settings(out: Path) -> Settings:
    """The settings of the run in `out`.

    Raises:
        RunError: the file is damaged.
    """
    path = out / CONFIG
    try:
        values = yaml.safe_load(_read_text(path))
        if not isinstance(values, dict):
            raise UsageError("it is not a list of settings.")
        changes = values.pop("changes", [])
        if not isinstance(changes, list) or not all(map(_is_change, changes)):
            raise UsageError("its changes are not entries of from_step and settings with from and to.")
        return Settings(config=TrainConfig.from_dict(values, out=out), changes=tuple(changes))
    except (UsageError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} is damaged: {reason}") from error


def _is_change(change: object) -> bool:
    if not isinstance(change, dict) or not isinstance(change.get("from_step"), int):
        return False
    return all(
        name in {"from_step", "data"}
        or (name in CHANGEABLE and isinstance(value, dict) and value.keys() == {"from", "to"})
        for name, value in change.items()
    )


def write_settings(settings: Settings) -> None:
    """Write the settings into their run folder."""
    assert settings.config.out is not None
    values = settings.config.to_dict()
    if settings.changes:
        values["changes"] = [dict(change) for change in settings.changes]
    files.write_text(settings.config.out / CONFIG, yaml.safe_dump(values, sort_keys=False))


def write_sources(config: TrainConfig) -> None:
    """Keep the recipe and the model of a new run where they are files, so that the run does not change with them."""
    assert config.out is not None
    if is_file_name(config.recipe):
        files.write_text(config.out / RECIPE, read_file(Path(config.recipe)))
    if (own := userfile.split(config.model)) is not None:
        files.write_bytes(config.out / MODEL, userfile.read(own[0]))


def sources(config: TrainConfig) -> dict[str, str]:
    """The SHA-256 of the recipe and of the model in the run folder, by file name, where the run began with files."""
    assert config.out is not None
    kept = {RECIPE: is_file_name(config.recipe), MODEL: userfile.split(config.model) is not None}
    return {
        name: hashlib.sha256(files.read(config.out / name, limit=_LIMIT, hint="It is another file.")).hexdigest()
        for name, there in kept.items()
        if there
    }


def model_name(config: TrainConfig) -> str:
    """The model of a run, in the run's own copy where it is a class of a file and the run has begun.

    Raises:
        RunError: that copy is gone.
    """
    own = userfile.split(config.model)
    if own is None or config.out is None or not (config.out / CONFIG).exists():
        return config.model
    if not (config.out / MODEL).is_file():
        raise RunError(f"{config.out / MODEL} cannot be read: the run began with the model in it, so bring it back.")
    return f"{config.out / MODEL}:{own[1]}"


def read_recipe(config: TrainConfig) -> Recipe:
    """The recipe of a run, from its folder where it was a file and the run has begun.

    Raises:
        UsageError: the recipe does not exist.
        RunError: the file in the run folder cannot be read.
    """
    if is_file_name(config.recipe) and config.out is not None and (config.out / CONFIG).exists():
        return from_toml(Path(config.recipe).stem, read_file(config.out / RECIPE))
    return Recipe.find(config.recipe)


def read_result(out: Path) -> Result:
    """The result of the complete run in `out`.

    Raises:
        RunError: the file is damaged.
    """
    try:
        values = json.loads(_read_text(out / RESULT))
        loss, memory = values["test_loss"], values.get("memory")
        values["test_loss"] = math.nan if loss is None else loss
        values["memory"] = None if memory is None else StepMemory(**memory)
        result = Result(**values, out=out)
        check_fields(result)
        if result.memory is not None:
            check_fields(result.memory)
        return result
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{out / RESULT} is damaged; delete it and resume again.") from error


def write_result(result: Result) -> None:
    """Write a result into its run folder."""
    values = {name: value for name, value in dataclasses.asdict(result).items() if name != "out"}
    files.write_text(result.out / RESULT, json_text(values) + "\n")


def _read_text(path: Path) -> str:
    return files.read(path, limit=_LIMIT, hint="It is not of `lowbit train`.").decode()
