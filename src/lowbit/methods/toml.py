"""A recipe as TOML."""

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.errors import RunError, UsageError, shown, unknown
from lowbit.inputs import files
from lowbit.inputs.checks import is_whole
from lowbit.methods.attention import Attention
from lowbit.methods.autocast import Autocast, LossScaling
from lowbit.methods.dynamic import Gating, Scheduling, Skipping
from lowbit.methods.normalization import NORMALIZATIONS
from lowbit.methods.operands import GradInput, GradWeight, Output
from lowbit.methods.update import Update
from lowbit.numerics.formats import NAMED, Format, from_table
from lowbit.numerics.parts import construct
from lowbit.schedules import Template


def read_file(path: Path) -> str:
    """The text of a recipe's file.

    Raises:
        RunError: it cannot be read, is longer than 1 MiB, or is not UTF-8.
    """
    try:
        return files.read(path, limit=1 << 20, hint="It is not a recipe.").decode()
    except UnicodeDecodeError as error:
        raise RunError(f"{path} cannot be read: it is not UTF-8.") from error


def parsed(cls: type[Any], name: str, text: str, *, base_of: Callable[[str], Any]) -> Any:
    """The recipe in a text, see `from_toml`.

    Args:
        cls: the class of recipes.
        name: the recipe's name.
        text: TOML.
        base_of: gives the recipe of a name, for the text's `base`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name} is not TOML: {error}") from error
    formats: dict[str, Format] = dict(NAMED)
    own = _table(f"recipe {name}: formats", data.pop("formats", {}))
    if taken := sorted(own.keys() & formats.keys()):
        raise UsageError(f"recipe {name}: the format {taken[0]!r} exists already: choose another name")
    if "name" in data:
        raise UsageError(f"recipe {name}: its name is that of its file; leave `name` out")
    made, unused = _formats(own, formats)
    formats.update(made)

    def resolved(table: type[Any], where: str, fields: dict[str, Any]) -> Any:
        operands = {f.name for f in dataclasses.fields(table) if f.type is Format}
        unused.difference_update(v for k, v in _table(where, fields).items() if k in operands and isinstance(v, str))
        return _construct(
            table,
            where,
            {k: _named(formats, f"{where}.{k}", v) if k in operands else v for k, v in fields.items()},
        )

    _changes(name, data)
    phases = [_phase(name, table) for table in _tables(f"recipe {name}: phases", data.pop("phases", []))]
    if phases:
        data["phases"] = ()
    inherited: dict[str, Any] = {}
    if "base" in data:
        base = base_of(data.pop("base"))
        inherited = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    for key, table in (
        ("output", Output),
        ("grad_input", GradInput),
        ("grad_weight", GradWeight),
        ("attention", Attention),
    ):
        if key in data:
            data[key] = resolved(table, key, data[key])
    if "normalization" in data:
        fields = dict(_table("normalization", data["normalization"]))
        kind = fields.pop("kind", "range")
        if kind not in NORMALIZATIONS:
            raise unknown(f"recipe {name}: normalization of kind", kind, NORMALIZATIONS)
        data["normalization"] = resolved(NORMALIZATIONS[kind], "normalization", fields)
    if "update" in data:
        data["update"], used = _update(f"recipe {name}: update", data["update"], formats)
        unused -= used
    result = resolved(cls, f"recipe {name}", {**inherited, **data, "name": name})
    if unused:
        raise UsageError(f"recipe {name}: no product uses the format {sorted(unused)[0]!r}")
    for start, other in phases:
        result = result.then(base_of(other), start=start, name=name)
    return result


def _changes(name: str, data: dict[str, Any]) -> None:
    """Make of the tables of a text what says how bits and skipped products change in a run."""
    if "schedule" in data:
        data["schedule"] = _scheduling(name, data["schedule"])
    if "gates" in data:
        gates = _table(f"recipe {name}: gates", data["gates"])
        data["gates"] = _construct(Gating, "gates", {key: frozen(value) for key, value in gates.items()})
    if "depthwise" in data:
        data["depthwise"] = frozen(data["depthwise"])
    if data.get("grad_weight") == "skip":
        data.setdefault("skip", {})
        del data["grad_weight"]
    if "skip" in data:
        data["skip"] = _construct(Skipping, f"recipe {name}: skip", data["skip"])
    if "autocast" in data:
        data["autocast"] = _autocast(f"recipe {name}: autocast", data["autocast"])


def _autocast(where: str, value: object) -> Autocast:
    """The table of an autocast, whose scaling is a table too."""
    fields = dict(_table(where, value))
    if "scaling" in fields:
        fields["scaling"] = _construct(LossScaling, f"{where}.scaling", fields["scaling"])
    made: Autocast = _construct(Autocast, where, fields)
    return made


def _update(where: str, value: object, formats: dict[str, Format]) -> tuple[Update, set[str]]:
    """The table of an update, and the names of the formats that it uses."""
    fields = dict(_table(where, value))
    states = _table(f"{where}.states", fields.pop("states", {}))
    used = {name for name in (*fields.values(), *states.values()) if isinstance(name, str)}
    made = {key: _named(formats, f"{where}.{key}", name) for key, name in fields.items()}
    pairs = tuple((key, _named(formats, f"{where}.states.{key}", name)) for key, name in states.items())
    return _construct(Update, where, {**made, "states": pairs}), used


def _phase(name: str, fields: dict[str, Any]) -> tuple[Any, str]:
    """The start and the recipe's name in a table of a phase."""
    where = f"recipe {name}: phases"
    if unknown_key := [key for key in fields if key not in ("start", "recipe")]:
        raise unknown(f"field of {where}", unknown_key[0], ("start", "recipe"))
    if missing := [key for key in ("start", "recipe") if key not in fields]:
        raise UsageError(f'{where} lack {missing[0]}: each has a start and a recipe, e.g. start = "0.9"')
    if not isinstance(fields["recipe"], str):
        raise UsageError(f"{where}: recipe is {shown(fields['recipe'])}: give the name of a recipe of lowbit")
    return fields["start"], fields["recipe"]


def _tables(where: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise UsageError(f"{where} is {shown(value)}: write a table [[phases]] for each")
    return [_table(where, each) for each in value]


def _formats(own: dict[str, Any], known: dict[str, Format]) -> tuple[dict[str, Format], set[str]]:
    """The formats of a text by their names, and those names that no other format uses for its `widths`.

    Args:
        own: their tables.
        known: formats that exist without them.
    """
    tables = {key: dict(_table(f"formats.{key}", fields)) for key, fields in own.items()}
    widths = {key: _table(f"formats.{key}.widths", t.pop("widths")) for key, t in tables.items() if "widths" in t}
    plain = {key: from_table(f"formats.{key}", table) for key, table in tables.items()}
    made, unused = dict(plain), set(own)
    for key, others in widths.items():
        where = f"formats.{key}.widths"
        if wrong := [bits for bits in others if not bits.isdecimal()]:
            raise UsageError(f"{where} has {shown(wrong[0])}: give numbers of bits, each with the name of a format")
        chosen = {bits: _named(known | plain, f"{where}.{bits}", name) for bits, name in others.items()}
        try:
            made[key] = plain[key].replace(widths=tuple((int(bits), chosen[bits]) for bits in sorted(chosen, key=int)))
        except UsageError as error:
            raise UsageError(f"formats.{key}: {error}") from error
        unused.difference_update(others.values())
    return made, unused


def frozen(value: Any) -> Any:
    """Lists as tuples, to any depth."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def _scheduling(name: str, fields: object) -> Scheduling:
    where = f"recipe {name}: schedule"
    schedules = {key: _template(f"{where}.{key}", value) for key, value in _table(where, fields).items()}
    result: Scheduling = _construct(Scheduling, where, schedules)
    return result


def _template(where: str, value: object) -> Template:
    if is_whole(value):
        return Template(kind="constant", settings=(("bits", value),))
    settings = dict(_table(where, value))
    if "kind" not in settings:
        raise UsageError(f"{where} lacks kind: give a number of bits, or a table with kind and its settings")
    return Template(kind=settings.pop("kind"), settings=tuple((key, frozen(value)) for key, value in settings.items()))


def _table(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {shown(value)}: give a table of fields")
    return value


def _named(formats: dict[str, Format], where: str, name: object) -> Format:
    if isinstance(name, Format):  # it comes from the recipe that this one is based on
        return name
    if not isinstance(name, str):
        raise UsageError(
            f"{where} is {shown(name)}: give the name of a format; a format's fields stand under [formats.NAME]"
        )
    if name not in formats:
        raise unknown(f"format of {where}", name, formats)
    return formats[name]


def _construct(cls: type[Any], where: str, fields: object) -> Any:
    return construct(cls, where, _table(where, fields))
