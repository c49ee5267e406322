"""Run folders as views. Everything that a folder holds is checked.

A folder without settings or ledger is refused. If a lesser file is damaged, its part of the view is empty and the
view's problems name it.
"""

import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.memory import StepMemory
from lowbit.inputs import files, userfile
from lowbit.inputs.checks import check_fields, check_type
from lowbit.report.views import ACCURACY, BITS_PER_BYTE, LayerConversion, ProductError, View

_T = TypeVar("_T")
_LIMIT = 1 << 26  # bytes of a table of figures or of a report
_LONGEST = 300  # characters of a text from a file


class Reader:
    """Reads the files of one run folder, and keeps what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def read(self, name: str, parse: Callable[[str], _T], otherwise: _T) -> _T:
        """What `parse` makes of a file; `otherwise` if there is none, or it is damaged, which becomes a problem."""
        if not (self.folder / name).exists():
            return otherwise
        try:
            return parse(files.read(self.folder / name, limit=_LIMIT, hint="It is not of `lowbit train`.").decode())
        except (RunError, ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
            reason = " ".join(str(error).split())[:_LONGEST]
            self.problems.append(f"{name} is damaged and left out: {reason}")
            return otherwise

    def columns(self) -> dict[str, tuple[list[float], list[float]]]:
        """The table of figures by column; rows that are damaged are left out, and counted."""
        return self.read("csv/metrics.csv", self._columns, {})

    def _columns(self, text: str) -> dict[str, tuple[list[float], list[float]]]:
        lines = text.splitlines()
        names = next(csv.reader(lines[:1]), [])
        number = names.index("step")
        columns: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names if name != "step"}
        damaged = 0
        for line in lines[1:]:
            try:
                row = next(csv.reader([line]))
                values = [(name, float(cell)) for name, cell in zip(names, row, strict=True) if cell]
                step = float(row[number])
            except (ValueError, StopIteration, csv.Error):
                damaged += 1
                continue
            for name, value in values:
                if name != "step" and math.isfinite(value):
                    columns[name][0].append(step)
                    columns[name][1].append(value)
        if damaged:
            self.problems.append(f"csv/metrics.csv: {damaged} damaged rows are left out")
        return {name: column for name, column in columns.items() if column[0]}

    def errors(self) -> list[ProductError]:
        """The rows of the proof."""
        return self.read("proof.json", lambda text: errors_of(json.loads(text)), [])

    def conversion(self) -> list[LayerConversion]:
        """The rows of the conversion report."""
        return self.read("conversion.json", lambda text: [_conversion(row) for row in json.loads(text)["rows"]], [])

    def notes(self) -> list[str]:
        """The sentences below both."""
        before = len(self.problems)
        none: list[str] = []
        found = [
            note
            for name in ("conversion.json", "proof.json")
            for note in self.read(name, lambda text: [_text(each) for each in json.loads(text)["notes"]], none)
        ]
        del self.problems[before:]  # said already
        return list(dict.fromkeys(found))


def _text(value: object) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _model(value: object) -> str:
    """The name of a model; of a file of one's own without its folders, which say nothing to a reader."""
    text = _text(value)
    own = userfile.split(text)
    return text if own is None else f"{own[0].name}:{own[1]}"


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def errors_of(proof: Mapping[str, Any]) -> list[ProductError]:
    """The rows of a proof as `Proof.to_dict` gives it."""
    return [_error(row) for row in proof["rows"]]


def _error(row: Mapping[str, Any]) -> ProductError:
    cosine = number(row["cosine"])
    return ProductError(
        layer=_text(row["layer"]) or "(model)",
        product=_text(row["product"]),
        bits=_text(row["bits"]),
        engine=_text(", ".join(row["engines"])),
        kernel=_text(", ".join(row["kernels"])),
        sqnr_db=number(row["sqnr_db"]),
        angle=None if cosine is None else math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
        exact=row["exact"] is True,
        clipped=number(row["clipped"]),
    )


def _conversion(row: Mapping[str, Any]) -> LayerConversion:
    return LayerConversion(
        layer=_text(row["name"]) or "(model)",
        type=_text(row["type"]),
        recipe=_text(row["recipe"]),
        bits={_text(product): _text(bits) for product, bits in row["bits"].items()},
        engines={_text(product): _text(engine) for product, engine in row["engines"].items()},
        remark=_text(row["reason"]),
    )


def views_of(folders: Iterable[Path]) -> tuple[list[View], dict[str, str]]:
    """The views of run folders, and for each folder that is not shown the reason why."""
    views: dict[Path, View] = {}
    skipped: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        try:
            views[folder] = view_of(folder)
        except (RunError, UsageError) as error:
            skipped[str(folder)] = " ".join(str(error).split())
    names = _names(list(views))
    named = [replace(view, name=names[folder]) for folder, view in views.items()]
    return _labelled(named), skipped


def view_of(folder: Path) -> View:
    """The view of one run folder; its label is the recipe.

    Raises:
        UsageError: it is not a run folder, or nothing ran yet.
        RunError: its settings or its ledger are damaged.
    """
    reader = Reader(folder)
    settings = _settings(folder)
    ledger = Ledger.load(folder / "ledger.jsonl", drop_damaged=True)
    if not ledger.steps:
        raise UsageError(f"{folder}: its ledger has no step yet")
    columns = reader.columns()
    result: Mapping[str, Any] = reader.read("result.json", _result, {})
    starts: Sequence[Mapping[str, Any]] = reader.read("measured.jsonl", _starts, [])
    text = "test_bits_per_byte" in columns
    name = "test_bits_per_byte" if text else "test_accuracy"
    score = number(result.get(name)) if result else _last(columns, name)
    seconds = [s for s in (number(start.get("seconds_per_step")) for start in starts) if s is not None]
    joules = [number(start.get("joules")) for start in starts]
    whole = None if not joules or None in joules else sum(j for j in joules if j is not None)
    recipe = _text(settings.get("recipe"))
    return View(
        name=folder.name,
        task=f"{_model(settings.get('model'))} on {_text(settings.get('data'))}",
        recipe=recipe,
        label=recipe,
        seed=settings["seed"] if isinstance(settings.get("seed"), int) else None,
        steps=len(ledger.steps),
        complete=bool(result),
        score_name=BITS_PER_BYTE if text else ACCURACY,
        score=score if score is None or text else 100 * score,
        loss=number(result.get("test_loss")) if result else _last(columns, "test_loss"),
        ledger=ledger,
        columns=columns,
        errors=reader.errors(),
        conversion=reader.conversion(),
        notes=[*reader.notes(), *map(_text, ledger.notes)],
        seconds_per_step=seconds[-1] if seconds else None,
        joules=whole,
        energy=_text(starts[-1].get("reason")) if starts else "not measured",
        settings=settings,
        memory=result.get("memory"),
        engines=result.get("engines", {}),
        versions=result.get("versions", {}),
        machines=list(dict.fromkeys(_text(start["machine"]) for start in starts if "machine" in start)),
        problems=reader.problems,
    )


def _loaded(text: str) -> Any:
    """What YAML says, read by the loader in C where it is there: it is many times as fast."""
    import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return yaml.safe_load(text)  # it takes characters that the other refuses, such as halves of pairs


def _settings(folder: Path) -> dict[str, Any]:
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{folder} is not a run folder: it lacks config.yaml")
    try:
        values = _loaded(files.read(path, limit=1 << 20, hint="It is not of `lowbit train`.").decode())
        if not isinstance(values, dict) or not {"model", "data", "recipe"} <= values.keys():
            raise UsageError("it lacks model, data or recipe")
    except (UsageError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return {_text(name): value for name, value in values.items()}


def _mapping(text: str) -> Mapping[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError("it is not an object")
    return values


def _result(text: str) -> Mapping[str, Any]:
    values = dict(_mapping(text))
    if values.get("memory") is not None:
        values["memory"] = StepMemory(**values["memory"])
        check_fields(values["memory"])
    for name, of in (("engines", int), ("versions", str)):
        check_type(name, values.setdefault(name, {}), Mapping[str, of])  # type: ignore[valid-type]  # made, not written
        values[name] = {_text(key): _text(value) if of is str else value for key, value in values[name].items()}
    return values


def _starts(text: str) -> list[Mapping[str, Any]]:
    return [_mapping(line) for line in text.splitlines()]


def _last(columns: Mapping[str, tuple[Sequence[float], Sequence[float]]], name: str) -> float | None:
    values = columns.get(name, ((), ()))[1]
    return values[-1] if values else None


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of the paths that tell the folders apart."""
    names: dict[Path, str] = {}
    left = {folder: folder.resolve().parts for folder in folders}
    size = 0
    while left:
        size += 1
        ends = Counter(parts[-size:] for parts in left.values())
        for folder, parts in list(left.items()):
            if ends[parts[-size:]] == 1 or size >= len(parts):
                names[folder] = "/".join(parts[-size:])
                del left[folder]
    return names


_NOT_IN_LABELS = (
    "model",
    "data",
    "recipe",
    "seed",
    "out",
    "changes",
    "threads",
    "keep",
    "checkpoint_every",
    "logger",
    "proof",
)


def _labelled(views: Sequence[View]) -> list[View]:
    """The views with labels that tell apart runs of one task and recipe whose settings differ in more than the seed."""
    values: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for view in views:
        for name, value in view.settings.items():
            values[view.task, view.recipe][name].add(repr(value))
    labelled = []
    for view in views:
        known = values[view.task, view.recipe]
        differing = [
            f"{name} {_text(value)}"
            for name, value in view.settings.items()
            if name not in _NOT_IN_LABELS and len(known[name]) > 1
        ]
        labelled.append(replace(view, label=f"{view.recipe} ({', '.join(differing)})" if differing else view.recipe))
    return labelled
