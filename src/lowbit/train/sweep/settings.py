"""The file of a sweep: what all runs have in common, and what differs, as a grid or as the space of a search."""

import dataclasses
import itertools
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from lowbit.errors import UsageError, shown, unknown
from lowbit.evidence.metrics import METRICS
from lowbit.inputs import files
from lowbit.inputs.checks import check_fields, check_whole, is_finite, is_whole
from lowbit.methods.recipe import Recipe
from lowbit.train.config import TrainConfig

_LIMIT = 1 << 20  # bytes of the file
_MOST_RUNS = 10_000
MOST_JOBS = 1024
SETTINGS = frozenset(get_type_hints(TrainConfig)) - {"out"}
"""The settings of a run that a sweep may give: all but the folder, which it chooses."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, whole numbers if both ends are.

    Args:
        low: the lower end, included.
        high: the upper end, included.
        log: whether to look as closely at small numbers as at large ones, which takes a `low` above 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not (is_finite(self.low) and is_finite(self.high) and self.low < self.high):
            raise UsageError(
                f"low={shown(self.low)}, high={shown(self.high)}: give two finite numbers, the lower first"
            )
        if self.log and self.low <= 0:
            raise UsageError(f"low={shown(self.low)}: with log it must be above 0")

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers."""
        return is_whole(self.low) and is_whole(self.high)


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for settings with a high score at a low cost.

    Args:
        trials: runs in all, those that end early included.
        settings: for each setting that is searched, its `Range` or the list of its values.
        cost: name of the metric that should be low, see `lowbit.evidence.metrics`; the score should be good.
        pruning: whether to end a run early where runs that cost no more do better.
        seed: of the sampler.
    """

    trials: int
    settings: Mapping[str, Any]
    cost: str = "GBitOPs"
    pruning: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_whole("trials", self.trials, 1, _MOST_RUNS)
        check_whole("seed", self.seed, 0)
        if not self.settings:
            raise UsageError("search.settings is empty: name the settings to search, e.g. lr: {low: 0.01, high: 1.0}")
        names = [metric.name for metric in METRICS]
        if self.cost not in names:
            raise unknown("cost of a search", self.cost, names)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs of a sweep.

    Args:
        out: folder of the sweep; it holds one folder for each run.
        train: settings that all runs have.
        grid: for each setting that differs, its values; every combination is a run.
        search: or what to search; a sweep has one of both.
        jobs: runs at the same time, each in a process of its own.
    """

    out: Path
    train: Mapping[str, Any]
    grid: Mapping[str, Any] | None = None
    search: Search | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_whole("jobs", self.jobs, 1, MOST_JOBS)
        if (self.grid is None) == (self.search is None):
            given = "both" if self.search is not None else "neither"
            raise UsageError(f"a sweep has either a grid or a search, and this one has {given}")
        differing = self.grid if self.search is None else self.search.settings
        assert differing is not None
        for name in [*self.train, *differing]:
            if name not in SETTINGS:
                raise unknown("setting of a run", name, SETTINGS)
        if self.search is not None and "data" in differing:
            raise UsageError("data cannot be searched: scores on different data sets have no common scale")
        if twice := self.train.keys() & differing.keys():
            raise UsageError(f"{', '.join(sorted(twice))}: given under train and again below: give it once")
        for name, values in differing.items():
            _check_values(name, values)
        if self.search is None:
            self.plan()
            return
        for name, space in differing.items():
            for value in (space.low, space.high) if isinstance(space, Range) else space:
                first = {n: s.low if isinstance(s, Range) else s[0] for n, s in differing.items()}
                self.config(first | {name: value}, "trial")

    def config(self, values: Mapping[str, Any], name: str) -> TrainConfig:
        """The settings of the run in folder `name` that has these values.

        Raises:
            UsageError: a value is impossible, or names no recipe.
        """
        config = TrainConfig(**(dict(self.train) | dict(values)), out=self.out / name)
        Recipe.find(config.recipe)
        return config

    def plan(self) -> dict[Path, TrainConfig]:
        """The runs of the grid by folder, the last setting changing first.

        Raises:
            UsageError: as `config`, or there are too many runs.
        """
        assert self.grid is not None
        combinations = itertools.product(*self.grid.values())
        found = {}
        for number, values in enumerate(combinations, start=1):
            if number > _MOST_RUNS:
                raise UsageError(f"the grid has more than {_MOST_RUNS:,} runs: give fewer values")
            named = dict(zip(self.grid, values, strict=True))
            config = self.config(named, folder_name(named))
            assert config.out is not None
            found[config.out] = config
        return found


def _check_values(name: str, values: object) -> None:
    if isinstance(values, Range):
        return
    if not isinstance(values, list | tuple) or not values:
        raise UsageError(f"{name}: {shown(values)}: give the list of its values, e.g. {name}: [a, b]")
    if len({repr(value) for value in values}) < len(values):
        raise UsageError(f"{name}: {shown(values)}: a value is there twice")


def folder_name(values: Mapping[str, Any]) -> str:
    """A name for the run with these values, e.g. ``int8-seed0``; no other values give the same name."""
    plain = {"recipe", "model", "data"}  # their values say what they are
    raw = "-".join(str(value) if name in plain else f"{name}{value}" for name, value in values.items())
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", raw)[:100].lstrip(".-")
    return name if name == raw and name else f"{name}-{zlib.crc32(repr(values).encode()):08x}"


def read_sweep(path: Path, **changes: Any) -> Sweep:
    """Read the file of a sweep.

    Args:
        path: a YAML file with the fields of `Sweep`.
        changes: fields that are not as in the file; `out` is ``runs/NAME`` for ``NAME.yaml`` if neither has it.

    Raises:
        UsageError: the file is not what it should be; the message names the key and what is allowed.
        RunError: the file cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the YAML file of a sweep")
    text = bytes(files.read(path, limit=_LIMIT, hint="A sweep is a short YAML file.")).decode(errors="replace")
    try:
        values = load_yaml(text)
        if not isinstance(values, dict):
            raise UsageError(f"it must be settings with the keys {_names(Sweep)}")
        values = {"out": Path("runs", path.stem)} | values | changes
        return _made(values)
    except (UsageError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def _made(values: dict[str, Any]) -> Sweep:
    _check_keys("a sweep", values, Sweep)
    for name in ("train", "grid", "search"):
        if name in values and not isinstance(values[name], dict):
            raise UsageError(f"{name}: {shown(values[name])}: it must be keys with values")
    if isinstance(values["out"], str):
        values["out"] = Path(values["out"])
    if "search" in values:
        search = values["search"]
        _check_keys("search", search, Search)
        if not isinstance(search["settings"], dict):
            raise UsageError(f"search.settings: {shown(search['settings'])}: it must be settings with their values")
        space = {name: _space(name, each) for name, each in search["settings"].items()}
        values["search"] = Search(**(search | {"settings": space}))
    return Sweep(**values)


def _space(name: str, given: object) -> Any:
    if not isinstance(given, dict):
        return given
    _check_keys(f"search.settings.{name}", given, Range)
    try:
        return Range(**given)
    except UsageError as error:
        raise UsageError(f"search.settings.{name}: {error}") from error


def _check_keys(what: str, given: Mapping[Any, Any], cls: type[Any]) -> None:
    """Raise a UsageError unless these are keys of a dataclass, and all that it needs."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in given:
        if name not in fields:
            raise unknown(f"key of {what}", name, fields)
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in given]:
        raise UsageError(f"{what} lacks {', '.join(missing)}; its keys are {_names(cls)}")


def _names(cls: type[Any]) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    """YAML's plain values, with two surprises taken out: 1e-3 is a number, and a key that is there twice an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"{shown(key)} is there twice{str(node.start_mark).strip()}")
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        UsageError: a key is there twice.
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)
