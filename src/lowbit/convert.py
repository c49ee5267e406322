"""Conversion of a model in place, the report of what was converted, and the way back.

A layer is converted by changing its class to its quantised twin's and attaching a site: the object, its name, its
parameters and its hooks stay. So shared layers, layers used twice and a bare layer as the model need no special care.
"""

import itertools
import math
import re
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit import calibration
from lowbit.calibration import Shape, Table, Timing
from lowbit.checks import check_keys, check_type, check_whole, checked, is_like, is_whole
from lowbit.engines.choice import ENGINES
from lowbit.errors import UsageError, shown, unknown
from lowbit.formats import BF16, Format
from lowbit.kernels import native_instruction_sets
from lowbit.nn import containers, kinds
from lowbit.nn.gate import release
from lowbit.nn.kinds import plain_type
from lowbit.nn.layers import QuantLayer, converted_layers, sites_of
from lowbit.nn.site import Clock, Site
from lowbit.recipe import Recipe, recipes
from lowbit.strides import suggests_channels_last
from lowbit.tables import json_text, text_table

RecipeLike = Recipe | str
Matcher = str | re.Pattern[str] | type
Rule = tuple[Matcher, RecipeLike | None]

LeftBy = Literal["rule", "recipe", "conversion"]
_NOT_ASKED_FOR = ("rule", "conversion")
_WHICH = "give a name, a compiled regular expression, or a module type"

# The largest seed and step: noise is a hash of 64 bits of each, and a larger one would give another's noise.
MOST_SEED = 2**64 - 1
_MOST_STEPS = 2**63 - 1

# Channels of one group below which a grouped convolution leaves 32-wide tiles mostly idle; engine="auto" then takes
# the reference engine, where this machine was not measured.
FEW_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one layer.

    Args:
        name: the layer's name in the model; ``""`` where the model itself is the layer.
        type: its type before conversion.
        recipe: name of the recipe it runs; None where it was left as it is.
        reason: why it was left, or a remark.
        bits: widths of the operands by product, e.g. ``{"output": "8x8"}``.
        engines: how each product is executed.
        speed: how many times as fast as in full precision this machine was on that engine with the most similar
            layer; None where nothing was measured or ``"auto"`` did not choose.
        weights: numbers in the weights of its matrix products and convolutions, see `lowbit.Report`.
        left_by: whether a ``"rule"`` leaves it as it is, the ``"recipe"``, for the first or last layer, or an earlier
            ``"conversion"``, which converted it.
    """

    name: str
    type: str
    recipe: str | None
    reason: str = ""
    bits: dict[str, str] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    speed: float | None = None
    weights: int = 0
    left_by: LeftBy | None = None

    @property
    def converted(self) -> bool:
        """Whether the layer runs a recipe."""
        return self.recipe is not None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `convert_` did, a row per layer; `print` shows it as a table.

    Its first line says which share of the weights of matrix products and convolutions is converted. These are the
    parameters with two axes or more of every layer that has products, and of a layer of unknown type those with two
    axes longer than 1; each tensor counts once. Embeddings and normalisations have none, unless an embedding is also
    the weight of a layer.
    """

    recipe: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """The converted share of these weights, 0 to 1, of what neither a rule nor an earlier conversion leaves.

        None without any.
        """
        return _share([row for row in self.rows if row.left_by not in _NOT_ASKED_FOR])

    @property
    def without_gain(self) -> tuple[str, ...]:
        """Names of the layers for which no engine is faster than full precision on this machine, as measured."""
        return tuple(row.name for row in self.rows if row.speed is not None and row.speed <= 1)

    def __str__(self) -> str:
        names = ("output", "grad_input", "grad_weight")
        table = [
            [
                row.name or "(model)",
                row.type,
                row.recipe or "left as it is",
                *(row.bits.get(product, "-") for product in names),
                ", ".join(dict.fromkeys(row.engines.values())) or "-",
                row.reason,
            ]
            for row in self.rows
        ]
        head = f"{self.recipe}: {self._converted()}; bits as first operand x second"
        body = text_table(["layer", "type", "recipe", *names, "engine", "remark"], table)
        return "\n".join([head, "", body, *("note: " + note for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """The first line, the table and the notes as plain values."""
        return {
            "version": 1,
            "recipe": self.recipe,
            "layers": len(self.rows),
            "converted": self._number,
            "share": self.share,
            "largest_left": [row.name for row in self._largest_left()],
            "without_gain": list(self.without_gain),
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json_text(self.to_dict())

    @property
    def _number(self) -> int:
        """How many layers are converted."""
        return sum(row.converted for row in self.rows)

    def _largest_left(self) -> list[Row]:
        """Of the layers that should have been converted and are not, the three with most weights."""
        left = [row for row in self.rows if row.weights and not row.converted and row.left_by not in _NOT_ASKED_FOR]
        return sorted(left, key=lambda row: -row.weights)[:3]

    def _converted(self) -> str:
        """How many layers and which share of the weights are converted, and where the largest of the others are."""
        layers = f"{self._number} of {len(self.rows)} layers converted"
        if self.share is None:
            return layers
        largest = [f"{row.name or '(model)'} ({row.type}, {row.weights:,})" for row in self._largest_left()]
        percent = math.floor(1000 * self.share) / 10  # 100 % is all of them
        others = f", largest not converted: {', '.join(largest)}" if largest else ""
        return f"{layers} with {percent:g} % of the weights of matrix products and convolutions{others}"


def _share(rows: Sequence[Row]) -> float | None:
    """The converted share of the weights of these layers; None where they have none."""
    total = sum(row.weights for row in rows)
    return sum(row.weights for row in rows if row.converted) / total if total else None


def _warn_of_a_small_share(report: Report, model: nn.Module) -> None:
    """Say it where less than half of what neither a rule nor the recipe leaves is converted."""
    share = _share([row for row in report.rows if row.left_by is None])
    if share is not None and share < 0.5:
        warnings.warn(
            f"convert_({type(model).__name__}, {report.recipe!r}): {report._converted()}. What is left runs in the "
            "precision it has: replace layers of unknown types by torch's own, or say with rules=[(name, None)] that "
            "they stay",
            UserWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Plan:
    """One layer of the walk and what is to become of it."""

    name: str
    layer: nn.Module
    twin: type[QuantLayer] | None
    recipe: Recipe | None
    reason: str
    left_by: LeftBy | None = None


def convert_(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    rules: Sequence[Rule] = (),
    strict: bool = True,
    engine: str = "auto",
    seed: int = 0,
) -> Report:
    """Convert every layer with products in place, so that it trains and evaluates in the formats of a recipe.

    Parameters stay the same objects under the same names; `state_dict()` does not change. Warns where less than half of
    the model's weights, of those that neither a rule nor the recipe leaves, is converted; see `Report`.

    Args:
        model: any module, also a single layer.
        recipe: a recipe, its name, or a TOML file of one, e.g. ``"mine.toml"``, see `lowbit.Recipe.load`.
        rules: pairs (which layers, recipe or name or None). Which: an exact name, a compiled regular expression that
            matches a whole name, or an exact type. The first rule that matches a layer decides, also over the
            recipe's policy for first and last layers; None leaves the layer alone.
        strict: True raises where a layer should be converted and cannot, or is converted already, as a shared encoder
            is; False leaves it and says so in the report.
        engine: ``"auto"`` or one of `lowbit.engines.choice.ENGINES`.
        seed: of all noise in stochastic rounding, 0 to ``2**64 - 1``. Parts of one model that are converted apart need
            a seed each.

    Returns:
        The report, a row per layer.

    Raises:
        UsageError: an argument of another type, unknown recipe or engine, a rule that decided no layer, a layer that
            cannot be converted or is converted already, nothing to convert, a model that is compiled. The model is then
            unchanged.
    """
    check_type("strict", strict, bool)
    check_whole("seed", seed, 0, MOST_SEED)
    recipe = _recipe(recipe)
    resolved = [(which, None if r is None else _recipe(r)) for which, r in _pairs(rules)]
    if engine not in ("auto", *ENGINES):
        raise unknown("engine", engine, ("auto", *ENGINES))
    _check_model(model)
    if engine == "auto":
        _warn_once_without_kernels()
    plans = _plan(model, recipe, resolved, strict)
    table, found = calibration.load() if engine == "auto" else (None, "")
    choices = _choices(plans, engine, table)
    if strict and not any(plan.twin or plan.left_by == "rule" for plan in plans):
        reasons = "; ".join(f"{p.name or 'the model'} ({_type_name(p.layer)}): {p.reason}" for p in plans[:5])
        raise UsageError(f"nothing in this model would be converted. {reasons or 'It has no layer with products'}")

    with torch.inference_mode(mode=False):  # tensors that training changes in place
        clock = Clock(seed, free=engine == "auto")
        for plan in plans:
            if plan.twin is not None and plan.recipe is not None:
                plan.layer.__class__ = plan.twin
                layer: Any = plan.layer
                layer.attach(name=plan.name, recipe=plan.recipe, clock=clock, engine=choices[plan.name].engine)
                layer.site.train(layer.training)
    if clock.sites:
        clock.attach(model)
        for module in model.modules():
            containers.adapt(module)
    weights = _weights(plans)
    rows = tuple(
        replace(_row(plan, choices.get(plan.name)), weights=weights[plan.name], left_by=plan.left_by) for plan in plans
    )
    notes = (*_notes(clock), *_memory_notes(plans, choices))
    if engine == "auto":
        notes = (*notes, *_choice_notes(choices, found))
    report = Report(recipe=recipe.name, rows=rows, notes=notes)
    if slow := report.without_gain:
        gain = f"no engine is faster than fp32 here for {_some(slow)}: rules=[(name, None)] leaves them in fp32"
        report = replace(report, notes=(*notes, gain))
    _warn_of_a_small_share(report, model)
    return report


@cache
def _warn_once_without_kernels() -> None:
    """Say once in a process that an install without a compiler runs on the reference engine."""
    if native_instruction_sets() is None:
        warnings.warn(
            "lowbit was installed without its native kernels (no C++17 compiler was found): every layer runs on the "
            "reference engine, which simulates low precision and is slower than fp32. Install a compiler and reinstall",
            RuntimeWarning,
            stacklevel=3,
        )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How a layer is executed: why not on int8 units (empty where it is), and the timing that ``"auto"`` looked at."""

    why: str = ""
    timing: Timing | None = None
    open: bool = False  # both engines could run it

    @property
    def engine(self) -> str:
        return "reference" if self.why else "int8"


def _choices(plans: Sequence[_Plan], engine: str, table: Table | None) -> dict[str, _Choice]:
    """For each layer to convert how it is executed.

    Raises:
        UsageError: ``engine="int8"`` was asked for and a layer cannot.
    """
    asked = _Choice(why="it was asked for")
    choices = {
        plan.name: asked if engine == "reference" else _choose(plan.layer, plan.twin, plan.recipe, engine, table)
        for plan in plans
        if plan.twin is not None and plan.recipe is not None
    }
    refused = {name: choice.why for name, choice in choices.items() if choice.why} if engine == "int8" else {}
    if refused:
        types = {plan.name: _type_name(plan.layer) for plan in plans}
        shown = [f"{n or 'the model'} ({types[n]}): the int8 engine cannot run {why}" for n, why in refused.items()]
        raise UsageError(
            f"{len(refused)} of {len(choices)} layers cannot run as asked. {'; '.join(shown[:5])}. Leave them out with "
            "a rule, or let engine='auto' run them on the reference engine"
        )
    return choices


def _choose(layer: nn.Module, twin: type[QuantLayer], recipe: Recipe, engine: str, table: Table | None) -> _Choice:
    """What runs a layer: what can, and with ``"auto"`` what is faster, by the table or else by a rule."""
    why = twin.int8_refusal(layer, recipe)
    op, weight = twin.operator(layer), twin.largest_weight(layer)
    if engine != "auto" or op is None or weight is None:
        return _Choice(why=why)
    shape = Shape.of(op, weight.shape)
    timing = None if table is None else table.nearest(shape, recipe)
    if why:
        return _Choice(why=why, timing=timing)
    if timing is not None and timing.fastest == "reference":
        why = f"measured {timing.reference:.2g} ms against {timing.int8:.2g} on int8 units, as {timing.shape}"
    elif timing is None and shape.groups > 1 and (narrow := min(shape.inputs, shape.outputs)) < FEW_CHANNELS:
        why = f"{narrow} channels in a group, fewer than {FEW_CHANNELS}, leave int8 units mostly idle"
    return _Choice(why=why, timing=timing, open=True)


def _memory_notes(plans: Sequence[_Plan], choices: dict[str, _Choice]) -> list[str]:
    """That convolutions with contiguous weights make the int8 engine copy, whose memory is channels last."""
    names = [
        plan.name
        for plan in plans
        if plan.twin is not None
        and choices[plan.name].engine == "int8"
        and (weight := plan.twin.largest_weight(plan.layer)) is not None
        and weight.dim() == 4
        and not suggests_channels_last(weight.shape, weight.stride())
    ]
    if not names:
        return []
    return [f"model.to(memory_format=torch.channels_last) spares a copy of what goes into and out of {_some(names)}"]


def _choice_notes(choices: dict[str, _Choice], found: str) -> list[str]:
    """What ``"auto"`` went by, and which layers it leaves to the reference engine and why, a line for each reason."""
    lines = []
    if any(choice.timing is not None for choice in choices.values()):
        lines.append(f"engines chosen by {found}")
    elif any(choice.open for choice in choices.values()):
        lines.append(f"engines chosen by what the units take and by channels: {found}")
    for why in dict.fromkeys(choice.why for choice in choices.values() if choice.why):
        names = [name for name, choice in choices.items() if choice.why == why]
        lines.append(f"reference engine for {_some(names)}: {why}")
    return lines


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name or "the model" for name in names[:3]) + more


def _recipe(given: object) -> Recipe:
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        return Recipe.find(given)
    raise UsageError(
        f"recipe {shown(given)}: give a lowbit.Recipe, a file that ends in .toml, or a name: {', '.join(recipes())}"
    )


def _pairs(rules: object) -> list[Rule]:
    """The rules as they are; a UsageError unless each is a pair that begins with what can match."""
    if not isinstance(rules, list | tuple):
        raise UsageError(f"rules={shown(rules)}: rules are pairs (which layers, recipe or None) in a list")
    for rule in rules:
        if not isinstance(rule, tuple) or len(rule) != 2:
            raise UsageError(f"rule {shown(rule)}: rules are pairs (which layers, recipe or None) in a list")
        if not isinstance(rule[0], str | re.Pattern | type):
            raise UsageError(f"rule for {shown(rule[0])}: {_WHICH}")
    return list(rules)


def _check_model(model: nn.Module) -> None:
    check_type("model", model, nn.Module)
    for name, module in model.named_modules():
        where = f"{name!r}" if name else "the model"
        # Where the compiler was never imported, nothing can be compiled; importing it takes a second.
        compiler = sys.modules.get("torch._dynamo")
        if module._compiled_call_impl is not None or (compiler and isinstance(module, compiler.OptimizedModule)):
            raise UsageError(f"{where} is compiled: convert the plain model first, then compile it")
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{where} is a TorchScript module: convert the plain model instead")


def _plan(
    model: nn.Module, recipe: Recipe, rules: Sequence[tuple[Matcher, Recipe | None]], strict: bool
) -> list[_Plan]:
    layers = list(kinds.walk(model))
    with_products = [layer for _, layer in layers if kinds.multiplies(layer)]
    ends = {
        "first": with_products[0] if with_products and recipe.first == "leave" else None,
        "last": with_products[-1] if with_products and recipe.last == "leave" else None,
    }
    plans: list[_Plan] = []
    used: set[int] = set()
    refusals: list[tuple[str, str]] = []
    converted: list[str] = []
    for name, layer in layers:
        rule = next((i for i, (which, _) in enumerate(rules) if matches(which, name, layer)), None)
        if rule is not None:
            used.add(rule)
        chosen = recipe if rule is None else rules[rule][1]
        end = next((end for end, which in ends.items() if which is layer), None)
        twin, reason = None, ""
        left_by: LeftBy | None = None
        if isinstance(layer, QuantLayer):
            reason = f"converted already, to {layer.sites()[0].recipe.name}"
            left_by = "conversion" if chosen else "rule"
            if chosen:
                converted.append(name)
        elif chosen is None:
            reason, left_by = "a rule leaves it", "rule"
        elif rule is None and end is not None:
            reason, left_by = f"{recipe.name} leaves the {end} layer", "recipe"
        else:
            twin, reason, refused = kinds.choose_twin(layer, chosen)
            if refused:
                refusals.append((name, f"{name or 'the model'} ({_type_name(layer)}): {reason}"))
        plans.append(_Plan(name, layer, twin, chosen if twin else None, reason, left_by))
    _check_rules(model, {plan.name for plan in plans}, rules, used)
    if strict and converted:
        raise UsageError(
            f"{len(converted)} of {len(plans)} layers are converted already: {_some(converted)}. Call lowbit.restore_ "
            f"first to convert them anew. To convert only the others, leave these as they are with rules="
            f"[({_pattern(converted)}, None)] or with strict=False"
        )
    if strict and refusals:
        raise UsageError(
            f"cannot convert {'; '.join(text for _, text in refusals)}. Leave such a layer in full precision with a "
            f"rule, e.g. rules=[({refusals[0][0]!r}, None)], or pass strict=False to leave all of them"
        )
    _mark_shared_parameters(plans)
    return plans


def _pattern(names: Sequence[str]) -> str:
    """Python text for a rule that means these layers: the part of the model that holds them, or their names."""
    if len(names) == 1:
        return repr(names[0])
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    part = [level[0] for level in itertools.takewhile(lambda level: len({*level}) == 1, levels)]
    text = re.escape(".".join(part)) + r"\..*" if part else "|".join(map(re.escape, names))
    return f"re.compile(r'{text}')"


def matches(which: Matcher, name: str, layer: nn.Module) -> bool:
    """Whether a rule means this layer: by its exact name, a pattern of its whole name, or its exact plain type."""
    if isinstance(which, str):
        return which == name
    if isinstance(which, re.Pattern):
        return which.fullmatch(name) is not None
    if isinstance(which, type):
        return plain_type(layer) is which
    raise UsageError(f"rule for {shown(which)}: {_WHICH}")


def _check_rules(
    model: nn.Module, layers: set[str], rules: Sequence[tuple[Matcher, Recipe | None]], used: set[int]
) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {module: name for name, module in reversed(list(modules.items()))}
    for i, (which, _) in enumerate(rules):
        if i in used:
            continue
        shown = which.pattern if isinstance(which, re.Pattern) else getattr(which, "__name__", which)
        hint = "no layer has that name or type"
        if which in layers or not isinstance(which, str):
            hint = "no layer has that name or type that an earlier rule did not decide"
        elif which in modules and first_names[modules[which]] in layers:
            hint = f"that layer is shared, and its first name {first_names[modules[which]]!r} counts"
        elif which in modules:
            hint = f"{which!r} is no layer but holds some: use re.compile(r'{re.escape(which)}\\..*')"
        raise UsageError(f"rule {i + 1}, {shown!r}, decided nothing: {hint}")


def _mark_shared_parameters(plans: list[_Plan]) -> None:
    """Say in the remark of a layer that it shares a parameter with an earlier one."""
    owner: dict[Tensor, str] = {}
    for i, plan in enumerate(plans):
        shared = {owner[p] for p in plan.layer.parameters(recurse=False) if p in owner}
        for p in plan.layer.parameters(recurse=False):
            owner.setdefault(p, plan.name)
        if shared:
            remark = "; ".join(filter(None, [plan.reason, f"shares a parameter with {', '.join(sorted(shared))}"]))
            plans[i] = replace(plan, reason=remark)


def _weights(plans: Sequence[_Plan]) -> dict[str, int]:
    """How many numbers each layer multiplies by, see `Report`; a shared tensor counts with a converted layer."""
    counts: dict[str, int] = {}
    seen: set[Tensor] = set()
    for plan in sorted(plans, key=lambda plan: plan.twin is None):
        own = [p for p in kinds.weights(plan.layer) if p not in seen]
        seen.update(own)
        counts[plan.name] = sum(p.numel() for p in own)
    return counts


def _type_name(layer: nn.Module) -> str:
    return plain_type(layer).__name__


def _row(plan: _Plan, choice: _Choice | None) -> Row:
    recipe = plan.recipe
    if recipe is None or plan.twin is None or choice is None:
        return Row(name=plan.name, type=_type_name(plan.layer), recipe=None, reason=plan.reason)
    tables = plan.twin.formats(recipe)
    timing = choice.timing
    speed = None if timing is None else timing.speed(choice.engine)
    gain = f"no gain: {speed:.2f} times the speed of fp32 as {timing.shape}" if timing and speed and speed <= 1 else ""
    return Row(
        name=plan.name,
        type=_type_name(plan.layer),
        recipe=recipe.name,
        reason="; ".join(filter(None, [plan.reason, gain])),
        bits={product: "x".join(str(f.bits) for f in formats) for product, formats in tables.items()},
        engines={p: _unit(choice.engine, formats) for p, formats in tables.items()},
        speed=speed,
    )


def _unit(engine: str, formats: tuple[Format, ...]) -> str:
    """The units that a product runs on: int8, bf16 where one of its operands is bf16, or the reference engine."""
    if engine == "reference" or len(formats) != 2:
        return engine
    return "bf16" if BF16 in formats else "int8"


def _notes(clock: Clock) -> tuple[str, ...]:
    """What holds for many layers at once."""
    notes = []
    kept = sum(site.input_format.running is not None for site in clock.sites)
    if kept:
        notes.append(
            f"evaluation takes the running input range of {kept} layers; until training recorded one, that of its batch"
        )
    for name in dict.fromkeys(site.recipe.name for site in clock.sites if site.recipe.is_dynamic):
        notes.append(
            f"the bits of {name} change during training: make a lowbit.PrecisionController.from_recipe(model, ...)"
        )
    return tuple(notes)


@checked
def restore_(model: nn.Module) -> None:
    """Make every converted layer of a model plain again, in place; parameters stay the same objects.

    Raises:
        UsageError: nothing in the model is converted.
    """
    layers = list(converted_layers(model).values())
    if not layers:
        raise UsageError("restore_: nothing in this model is converted")
    _check_controllers(layers)
    release(model)
    for layer in layers:
        if layer.is_altered:
            raise UsageError(
                f"restore_: {layer.sites()[0].name or 'the model'} is a {type(layer).__name__} since its conversion: "
                "undo that first"
            )
    for layer in layers:
        layer.undo()
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Clock) and not owner.sites:
                owner.detach(module)
        containers.restore(module)


def _check_controllers(layers: list[QuantLayer]) -> None:
    """Raise where a controller of these layers also controls others."""
    sites = [site for layer in layers for site in layer.sites()]
    controllers = list({id(s.controller): s.controller for s in sites if s.controller is not None}.values())
    for controller in controllers:
        if others := [site.name for site in controller.sites() if site not in sites]:
            raise UsageError(
                f"restore_: a PrecisionController of these layers also controls {others[0]!r}, which would stay "
                "converted: call its remove() first"
            )


def clocks(model: nn.Module) -> list[Clock]:
    """The clocks of a model's converted layers, each once, in the order of the layers."""
    return list(dict.fromkeys(site.clock for site in sites_of(model)))


def replaced(model: nn.Module) -> dict[Site, str]:
    """The sites of layers that were converted with this model and are no longer in it, and what stands there now.

    A layer whose place a converted one has taken is not among them, nor is one of a model that this is a part of.
    """
    here = sites_of(model)
    gone: dict[Site, str] = {}
    for root in model.modules():
        owners = [getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values()]
        for clock in owners:
            if not isinstance(clock, Clock):
                continue
            modules = dict(root.named_modules(remove_duplicate=False))
            for site in clock.sites:
                module = modules.get(site.layer_name)
                if site not in here and not isinstance(module, QuantLayer):
                    gone[site] = "nothing" if module is None else type(module).__name__
    return gone


@checked
def state_dict(model: nn.Module) -> dict[str, Any]:
    """Lowbit's own state, apart from `model.state_dict()`: seed, step, recipes, bits, running ranges, engines.

    It holds what is in `model`: of a part of a converted model the layers of that part. Warns of converted layers that
    were replaced since, names them, and forgets them: no later state has them, and `verify` misses them no more.

    Returns:
        Tensors and plain values only, so that it loads with ``torch.load(..., weights_only=True)``.

    Raises:
        UsageError: nothing in the model is converted.
    """
    groups = clocks(model)
    if not groups:
        raise UsageError("state_dict: nothing in this model is converted; call lowbit.convert_ first")
    if gone := replaced(model):
        now = ", ".join(f"{site.name or 'the model'} (now {kind})" for site, kind in gone.items())
        warnings.warn(
            f"state_dict: {now}: converted layers that are no longer in the model are not saved, and are forgotten. "
            "What stands there now runs in the precision it has; lowbit.convert_(layer, recipe) converts it. restore_ "
            "a layer before you replace it",
            UserWarning,
            stacklevel=3,
        )
        for site in gone:
            site.clock.sites.remove(site)
    here = sites_of(model)
    return {"version": 1, "groups": [_state_of(clock, here) for clock in groups]}


# What is saved of a site, and what besides where a controller sets its bits.
_SITE = ("recipe", "formats", "engine", "uses", "bits", "running_range")
_CONTROLLED = "evaluation_bits"


def _state_of(clock: Clock, here: Mapping[Site, QuantLayer]) -> dict[str, Any]:
    """The part of `state_dict` that one conversion has, of the sites that are here."""
    return {
        "seed": clock.seed,
        "step": int(clock.step),
        "sites": {
            site.name: {
                "recipe": site.recipe.name,
                "formats": _fingerprint(site.recipe),
                "engine": site.engine,
                "uses": site.uses,
                "bits": site.bits.detach().cpu().clone(),
                "running_range": site.running_range.detach().cpu().clone(),
                **({_CONTROLLED: site.evaluation_bits.detach().cpu().clone()} if site.is_controlled else {}),
            }
            for site in _of(clock, here)
        },
    }


def _of(clock: Clock, here: Mapping[Site, QuantLayer]) -> list[Site]:
    """The sites of a clock that are here, in the order of the conversion."""
    return [site for site in clock.sites if site in here]


def _fingerprint(recipe: Recipe) -> int:
    """A number that tells recipes of one name apart: a CRC of all their fields.

    How a range test finds the lowest bits is left out. The state of the controller has it, and there are runs from
    before it was a setting of recipes.
    """
    text = repr(recipe)
    if recipe.schedule is not None:
        forward = recipe.schedule.forward
        text = text.replace(repr(forward.settings), repr(forward.of_the_class))
    return zlib.crc32(text.encode())


@checked
def load_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Give a converted model the state that `state_dict` returned; nothing changes where any part of it does not fit.

    A model converted with ``engine="auto"`` takes the saved engines too, whatever it chose itself: the run goes on as
    it began, also where this machine was measured since. Where a controller set the bits of the saved model, this one
    needs a controller too before it trains, made before or after; it evaluates at the saved evaluation bits.

    Raises:
        UsageError: the state is of another version, model or recipe, or damaged; or it is of another engine than the
            one that was asked for at conversion, or than a layer can run on here.
    """
    groups = clocks(model)
    if not isinstance(state, dict) or not is_whole(state.get("version")) or state["version"] != 1:
        raise UsageError("load_state_dict: this is not a lowbit.state_dict of version 1")
    check_keys("load_state_dict: the state", state, ("version", "groups"))
    if not isinstance(state["groups"], list) or len(groups) != len(state["groups"]):
        saved = len(state["groups"]) if isinstance(state["groups"], list) else shown(state["groups"])
        raise UsageError(f"load_state_dict: {saved} conversions saved, the model has {len(groups)}")
    here = sites_of(model)
    for clock, saved in zip(groups, state["groups"], strict=True):
        _check_group(clock, here, saved)
        for site in _of(clock, here):
            _check_site(site, saved["sites"][site.name])
        if clock.free:
            _check_engines(clock, saved["sites"], here)
    for clock, saved in zip(groups, state["groups"], strict=True):
        clock.seed = saved["seed"]
        clock.set_step(saved["step"])
        for site in _of(clock, here):
            entry = saved["sites"][site.name]
            site.engine = entry["engine"]
            site.uses = entry["uses"]
            site.set_bits(entry["bits"].tolist(), entry.get(_CONTROLLED, entry["bits"]).tolist())
            site.lost_controller = site.controller is None and _CONTROLLED in entry
            site.running_range.copy_(entry["running_range"])
        for controller in {id(site.controller): site.controller for site in _of(clock, here)}.values():
            if controller is not None:
                controller.write()


def _check_group(clock: Clock, here: Mapping[Site, QuantLayer], saved: Any) -> None:
    """Raise unless a saved group has a seed, a step, and the sites of this clock, with the same recipes and engines.

    A clock that is free in its engines takes any.
    """
    check_keys("load_state_dict: a conversion", saved, ("seed", "step", "sites"))
    check_whole("load_state_dict: seed", saved["seed"], 0, MOST_SEED)
    check_whole("load_state_dict: step", saved["step"], 0, _MOST_STEPS)
    if not isinstance(saved["sites"], dict):
        raise UsageError(f"load_state_dict: sites is {shown(saved['sites'])}: expected a dict by the layers' names")
    there = {name: _identity(name, entry, clock) for name, entry in saved["sites"].items()}
    own = {name: _identity(name, entry, clock) for name, entry in _state_of(clock, here)["sites"].items()}
    different = [name for name in dict.fromkeys([*own, *there]) if own.get(name) != there.get(name)]
    if different:
        name = different[0]
        raise UsageError(
            f"load_state_dict: {len(different)} layers differ, first {shown(name)}: saved {there.get(name, 'none')}, "
            f"here {own.get(name, 'none')}. Convert the same model in the same way first"
        )


def _identity(name: str, entry: object, clock: Clock) -> str:
    """What must agree between a saved site and one here."""
    controlled = isinstance(entry, Mapping) and _CONTROLLED in entry
    check_keys(f"load_state_dict: the state of {shown(name)}", entry, (*_SITE, _CONTROLLED) if controlled else _SITE)
    assert isinstance(entry, Mapping)
    check_type(f"load_state_dict: recipe of {shown(name)}", entry["recipe"], str)
    check_whole(f"load_state_dict: formats of {shown(name)}", entry["formats"], 0, 2**32 - 1)
    check_type(f"load_state_dict: engine of {shown(name)}", entry["engine"], str)
    if entry["engine"] not in ENGINES:
        raise unknown(f"engine of {shown(name)} in load_state_dict", entry["engine"], ENGINES)
    engine = "any" if clock.free else entry["engine"]
    return f"recipe {entry['recipe']} ({entry['formats']:08x}), engine {engine}"


def _check_site(site: Site, entry: dict[str, Any]) -> None:
    """Raise unless the saved values of a site are values that it can have."""
    what = f"load_state_dict: {site.name or 'the model'}"
    check_whole(f"{what}: uses", entry["uses"], 0, _MOST_STEPS)
    widths = [name for name in ("bits", _CONTROLLED) if name in entry]
    for name in (*widths, "running_range"):
        own, saved = getattr(site, name), entry[name]
        if not is_like(saved, own):
            raise UsageError(f"{what}: {name} is {shown(saved)}: expected {own.dtype} of shape {tuple(own.shape)}")
    for bits, (product, operand, fmt) in (
        pair for name in widths for pair in zip(entry[name].tolist(), site.formats(), strict=True)
    ):
        try:
            fmt.with_bits(bits)
        except UsageError as error:
            raise UsageError(f"{what}: {operand} of {product}: {error}") from error
    low, high, count = entry["running_range"].tolist()
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and count >= 0 and count == count // 1):
        raise UsageError(
            f"{what}: running_range={[low, high, count]}: expected finite extremes in order, and a number of batches"
        )


def _check_engines(clock: Clock, saved: dict[str, Any], layers: Mapping[Site, QuantLayer]) -> None:
    """Raise where a layer of this clock cannot run on the engine that was saved for it."""
    for site in _of(clock, layers):
        engine = saved[site.name]["engine"]
        if engine == "int8" and engine != site.engine and (why := layers[site].int8_refusal(layers[site], site.recipe)):
            raise UsageError(
                f"load_state_dict: {site.name!r} was saved on the int8 engine, which cannot run it here: {why}. Go on "
                "where it began; another engine gives other last digits"
            )
