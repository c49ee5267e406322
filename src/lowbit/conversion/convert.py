"""Conversion of a model in place, and the way back.

A layer is converted by changing its class to its quantised twin's and attaching a site: the object, its name, its
parameters and its hooks stay. So shared layers, layers used twice and a bare layer as the model need no special care.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from lowbit.conversion import calibration
from lowbit.conversion.calls import CallPlan, names_of_left, watch_calls
from lowbit.conversion.choice import choice_notes, choose_all, memory_notes
from lowbit.conversion.report import Report, count_weights, row_of, warn_of_a_small_share
from lowbit.conversion.rules import Plan, RecipeLike, Rule, as_recipe, as_rules, plan_layers, some, type_name
from lowbit.conversion.state import MOST_SEED
from lowbit.engines.choice import ENGINES
from lowbit.errors import UsageError, unknown
from lowbit.inputs.checks import check_type, check_whole, checked
from lowbit.kernels import native_instruction_sets
from lowbit.nn import containers
from lowbit.nn.calls.call import QuantCall
from lowbit.nn.calls.caller import callers, is_altered, stop_watching
from lowbit.nn.gate import release
from lowbit.nn.layers import QuantLayer, converted_layers
from lowbit.nn.loop import autocast_of
from lowbit.nn.site import Clock


def convert_(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    rules: Sequence[Rule] = (),
    strict: bool = True,
    engine: str = "auto",
    seed: int = 0,
    calls: bool = True,
) -> Report:
    """Convert every layer with products in place, so that it trains and evaluates in the formats of a recipe.

    Parameters stay the same objects under the same names, and `state_dict()` does not change. Of the model's weights
    that neither a rule nor the recipe leaves, a warning says if less than half is converted; see `Report`.

    Args:
        model: any module, even a single layer.
        recipe: a recipe, its name, or a TOML file of one, e.g. ``"mine.toml"``, see `lowbit.Recipe.load`.
        rules: pairs (which layers, recipe or name or None). Which: an exact name, a compiled regular expression that
            matches a whole name, or an exact type. The first rule that matches a layer decides, even against the
            recipe's policy for first and last layers; None leaves the layer alone.
        strict: whether to raise if a layer should be converted but cannot, or is converted already, as a shared
            encoder is. False leaves such a layer and says so in the report.
        engine: ``"auto"`` or one of `lowbit.engines.choice.ENGINES`.
        seed: of all noise in stochastic rounding, 0 to ``2**64 - 1``. Parts of one model that are converted separately
            need different seeds.
        calls: whether products in functions are converted too, e.g. ``x @ self.w``, `F.linear` or `addmm`, if one
            operand is a parameter or made of parameters alone. The first forward finds them, in every module with a
            forward that is not torch's own. Each is then a layer, named after its module, the operator and its number,
            as in ``"h.0.attn.c_attn.addmm.0"``; rules by name mean these names too.

    Returns:
        The report, a row per layer.

    Raises:
        UsageError: an argument of another type, an unknown recipe or engine, a rule that decided no layer, a layer that
            cannot be converted or is converted already, nothing to convert, a model that is compiled. The model is then
            unchanged.
    """
    check_type("strict", strict, bool)
    check_type("calls", calls, bool)
    check_whole("seed", seed, 0, MOST_SEED)
    recipe = as_recipe(recipe)
    resolved = [(which, None if r is None else as_recipe(r)) for which, r in as_rules(rules)]
    if engine not in ("auto", *ENGINES):
        raise unknown("engine", engine, ("auto", *ENGINES))
    _check_model(model)
    if engine == "auto":
        _warn_once_without_kernels()
    plans = plan_layers(model, recipe, resolved, strict, calls)
    table, found = calibration.load() if engine == "auto" else (None, "")
    choices = choose_all(plans, engine, table)
    _check_skipping(plans)
    _check_autocast(plans)
    if strict and not any(plan.twin or plan.called or plan.left_by == "rule" for plan in plans):
        reasons = "; ".join(f"{p.name or 'the model'} ({type_name(p.layer)}): {p.reason}" for p in plans[:5])
        raise UsageError(f"nothing in this model would be converted. {reasons or 'It has no layer with products'}")

    with torch.inference_mode(mode=False):  # for tensors that training changes in place
        clock = Clock(seed, free=engine == "auto")
        for plan in plans:
            if plan.twin is not None and plan.recipe is not None:
                plan.layer.__class__ = plan.twin
                layer: Any = plan.layer
                layer.attach(name=plan.name, recipe=plan.recipe, clock=clock, engine=choices[plan.name].engine)
                layer.site.train(layer.training)
                chosen = choices[plan.name]
                for site in layer.sites():
                    site.engines = [chosen.engine, *(later.engine for later in chosen.later)]
        if calls and any(plan.twin or plan.called for plan in plans):
            call_plan = CallPlan(
                default=recipe, rules=tuple(resolved), left=names_of_left(plans), engine=engine, table=table
            )
            watch_calls(model, plans, call_plan, clock)
    if clock.sites or clock.callers:
        clock.attach(model)
        for module in model.modules():
            containers.adapt(module)
    weights = count_weights(plans)
    rows = tuple(
        replace(row_of(plan, choices.get(plan.name)), weights=weights[plan.name], left_by=plan.left_by)
        for plan in plans
    )
    notes = (*_notes(clock), *_call_notes(plans), *memory_notes(plans, choices))
    if engine == "auto":
        notes = (*notes, *choice_notes(choices, found))
    report = Report(recipe=recipe.name, rows=rows, notes=notes)
    if slow := report.without_gain:
        gain = (
            f"measured alone and in float32, no engine is faster than fp32 for {some(slow)}; whether the whole step is "
            "faster without them, lowbit.advise(model, batch) measures"
        )
        report = replace(report, notes=(*notes, gain))
    warn_of_a_small_share(report, model)
    return report


@cache
def _warn_once_without_kernels() -> None:
    """Say once in a process that an install without a compiler runs on the reference engine."""
    if native_instruction_sets() is None:
        warnings.warn(
            "lowbit was installed without its native kernels (no C++17 compiler was found), so every layer runs on the "
            "reference engine, which simulates low precision and is slower than fp32. Install a compiler and reinstall",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_model(model: nn.Module) -> None:
    check_type("model", model, nn.Module)
    for name, module in model.named_modules():
        where = f"{name!r}" if name else "the model"
        # If the compiler was never imported, nothing can be compiled, and importing it takes a second.
        compiler = sys.modules.get("torch._dynamo")
        if module._compiled_call_impl is not None or (compiler and isinstance(module, compiler.OptimizedModule)):
            raise UsageError(f"{where} is compiled: convert the plain model first, then compile it")
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{where} is a TorchScript module: convert the plain model instead")
        if _is_sharded(module):
            raise UsageError(f"{where} is sharded by fully_shard: convert the plain model first, then shard it")


def _is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` made a subclass of the module's class, with a class of its own before it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and fsdp.FSDPModule in type(module).__bases__


def _check_skipping(plans: Sequence[Plan]) -> None:
    """Raise if a recipe names layers that skip `grad_weight`, and none of those that it converts has such a name."""
    for skip in {plan.recipe.skip for plan in plans if plan.recipe is not None and plan.recipe.skip is not None}:
        names = [plan.name for plan in plans if plan.recipe is not None and plan.recipe.skip == skip]
        if not any(map(skip.takes, names)):
            raise UsageError(
                f"skip_layers={skip.skip_layers!r} matches the whole name of no converted layer: they are {some(names)}"
            )


def _check_autocast(plans: Sequence[Plan]) -> None:
    """Raise if layers are to train in different autocasts: a forward runs in one."""
    asked = autocast_of([plan.recipe for plan in plans if plan.twin is not None and plan.recipe is not None])
    if len(asked) > 1:
        raise UsageError(
            f"recipes of this model ask for {' and for '.join(map(str, asked))}: a forward runs in one, so give rules "
            "recipes with the same autocast or none"
        )


def _notes(clock: Clock) -> tuple[str, ...]:
    """What holds for many layers at once."""
    notes = []
    kept = sum(site.input_format.running is not None for site in clock.sites)
    if kept:
        notes.append(
            f"evaluation takes the running input range of {kept} layers, or its batch's until training recorded one"
        )
    for recipe in dict.fromkeys(site.recipe for site in clock.sites if site.recipe.is_dynamic):
        notes.append(
            f"{recipe.changes} of {recipe.name} change during training: make a "
            "lowbit.PrecisionController.from_recipe(model, ...)"
        )
    for recipe in dict.fromkeys(site.recipe for site in clock.sites if site.recipe.phases):
        switches = ", ".join(f"{phase.name} from {phase.start}" for phase in recipe.phases)
        notes.append(f"the table shows the first phase of {recipe.name}; later ones: {switches}")
    for recipe in dict.fromkeys(site.recipe for site in clock.sites):
        if recipe.autocast is None:
            continue
        scaler = ", and scale the loss by lowbit.amp.GradScaler.from_recipe(model)" if recipe.autocast.scaling else ""
        notes.append(
            f"{recipe.name} trains in {recipe.autocast.dtype} autocast: put forward and loss into "
            f"lowbit.amp.autocast(model){scaler}"
        )
    if skipping := [site.name for site in clock.sites if site.may_skip]:
        notes.append(f"{some(skipping)} skip grad_weight, always or in some steps: their weights then stay as they are")
    return tuple(notes)


def _call_notes(plans: Sequence[Plan]) -> list[str]:
    """Where products in functions are looked for, if a layer depends on it."""
    names = [plan.name for plan in plans if plan.called]
    if not names:
        return []
    return [
        f"the first forward finds the products in the forwards of {some(names)}; lowbit.verify names them. A product "
        "outside every module's forward is not found"
    ]


@checked
def restore_(model: nn.Module) -> None:
    """Make every converted layer of a model plain again, in place; parameters stay the same objects.

    Raises:
        UsageError: nothing in the model is converted.
    """
    layers, watched = list(converted_layers(model).values()), callers(model)
    if not layers and not watched:
        raise UsageError("restore_: nothing in this model is converted")
    _check_controllers(layers)
    release(model)
    altered: list[tuple[str, nn.Module]] = [(layer.sites()[0].name, layer) for layer in layers if layer.is_altered]
    altered += [(name, caller) for name, caller in watched.items() if is_altered(caller)]
    if changed := [(name, module) for name, module in altered if not _is_sharded(module)]:
        name, module = changed[0]
        raise UsageError(
            f"restore_: {name or 'the model'} is a {type(module).__name__} since its conversion: undo that first"
        )
    for caller in watched.values():
        _undo(caller, partial(stop_watching, caller))
    for layer in layers:
        if not isinstance(layer, QuantCall):
            _undo(layer, layer.undo)
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Clock) and not owner.sites and not owner.callers:
                owner.detach(module)
        containers.restore(module)


def _undo(layer: nn.Module, undo: Callable[[], None]) -> None:
    """Make a layer plain again; a sharded one stays sharded, with the class that `fully_shard` gives the plain one."""
    kind, sharded = type(layer), _is_sharded(layer)
    undo()
    if sharded:
        own = {name: value for name, value in vars(kind).items() if name not in ("__module__", "__doc__")}
        changed: Any = layer
        changed.__class__ = type(f"FSDP{type(layer).__name__}", (kind.__bases__[0], type(layer)), own)


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
