"""The state of a converted model that its own `state_dict()` lacks, saved and loaded."""

import math
import re
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowbit.engines.choice import ENGINES, in_words
from lowbit.errors import UsageError, shown, unknown
from lowbit.inputs.checks import check_keys, check_type, check_whole, checked, is_like, is_whole
from lowbit.methods.recipe import Recipe
from lowbit.nn.calls.call import Calls, QuantCall
from lowbit.nn.calls.caller import callers
from lowbit.nn.calls.readers import OPERATORS
from lowbit.nn.layers import QuantLayer, sites_of
from lowbit.nn.site import Clock, Site
from lowbit.numerics.ranges import new_running_range

# The largest seed and step: noise is a hash of 64 bits of each, and a larger one would give another's noise.
MOST_SEED = 2**64 - 1
_MOST_STEPS = 2**63 - 1


def clocks(model: nn.Module) -> list[Clock]:
    """The clocks of a model's converted layers and watched modules, each once, in order."""
    found = [site.clock for site in sites_of(model)]
    return list(dict.fromkeys([*found, *(caller.lowbit_calls.clock for caller in callers(model).values())]))


def replaced(model: nn.Module) -> dict[Site, str]:
    """The sites of layers that were converted with this model and are no longer in it, and what stands there now.

    This leaves out a layer whose place a converted one has taken, and a layer of a model that this one is a part of.
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
    """The state that `model.state_dict()` lacks: seed, step, recipes, bits, ranges and histories, engines.

    It holds the layers in `model`, which may be a part of a converted model. If converted layers were replaced since, a
    warning names them, and they are forgotten: later states lack them, and `verify` no longer misses them.

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


# What is saved of a site, and what is saved besides if a controller sets its bits.
_SITE = ("recipe", "formats", "engine", "uses", "bits", "running_range")
_CONTROLLED = "evaluation_bits"
# What is saved besides where the recipe has phases.
_PHASED = ("phase", "engines")
# What is saved besides where scales are delayed.
_REMEMBERED = ("histories", "remembered_step")


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
                **(_memory(site) if site.remembers else {}),
                **({"phase": site.phase, "engines": list(site.engines)} if site.recipe.phases else {}),
            }
            for site in _of(clock, here)
        },
    }


def _memory(site: Site) -> dict[str, Any]:
    return {"histories": site.histories.detach().cpu().clone(), "remembered_step": site.remembered_step}


def _of(clock: Clock, here: Mapping[Site, QuantLayer]) -> list[Site]:
    """The sites of a clock that are here, in the order of the conversion."""
    return [site for site in clock.sites if site in here]


def _fingerprint(recipe: Recipe) -> int:
    """A number that distinguishes recipes of one name: a CRC of all their fields.

    How a range test finds the lowest bits is left out: the state of the controller has it, and some runs are older than
    this setting of recipes.
    """
    # As before recipes had these fields.
    text = repr(recipe)
    for late in (", synchronized=False", ", attention=None", ", autocast=None", ", update=None"):
        text = text.replace(f"{late})", ")")
    text = text.replace(", phases=(), skip=None", "")
    if recipe.schedule is not None:
        forward = recipe.schedule.forward
        text = text.replace(repr(forward.settings), repr(forward.of_the_class))
    return zlib.crc32(text.encode())


@checked
def load_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Give a converted model the state that `state_dict` returned; if any part does not fit, nothing changes.

    A model converted with ``engine="auto"`` takes the saved engines too, whatever it chose itself: the run goes on as
    it began, even if this machine was measured since. If a controller set the bits of the saved model, this one needs a
    controller too before it trains, made before or after. It evaluates at the saved evaluation bits.

    Raises:
        UsageError: the state is damaged, or of another version, model or recipe; or its engine is not the one that was
            asked for at conversion, or cannot run a layer here.
    """
    groups = clocks(model)
    if not isinstance(state, dict) or not is_whole(state.get("version")) or state["version"] != 1:
        raise UsageError("load_state_dict: this is not a lowbit.state_dict of version 1")
    check_keys("load_state_dict: the state", state, ("version", "groups"))
    if not isinstance(state["groups"], list) or len(groups) != len(state["groups"]):
        saved = len(state["groups"]) if isinstance(state["groups"], list) else shown(state["groups"])
        raise UsageError(f"load_state_dict: {saved} conversions saved, the model has {len(groups)}")
    made = [calls for clock, saved in zip(groups, state["groups"], strict=True) for calls in _expected(clock, saved)]
    here = sites_of(model)
    try:
        for clock, saved in zip(groups, state["groups"], strict=True):
            _check_group(clock, here, saved)
            for site in _saved(clock, here, saved):
                _check_site(site, saved["sites"][site.name])
            if clock.free:
                _check_engines(clock, saved["sites"], here)
    except Exception:
        for calls, layer in made:
            calls.forget(layer)
        raise
    for clock, saved in zip(groups, state["groups"], strict=True):
        _give(clock, here, saved)


def _give(clock: Clock, here: Mapping[Site, QuantLayer], saved: dict[str, Any]) -> None:
    """Give a clock, and those of its sites that are here, a saved group that was checked."""
    clock.seed, clock.has_state, clock.lacks_state = saved["seed"], True, False
    clock.set_step(saved["step"])
    for site in _of(clock, here):
        if site.name not in saved["sites"]:  # a product in a function that had not run when the state was saved
            site.uses = 0
            site.running_range.copy_(new_running_range())
            site.histories.zero_()
            site.remembered_step = 0
    for site in _saved(clock, here, saved):
        entry = saved["sites"][site.name]
        site.engines = entry.get("engines", [entry["engine"]])
        site.set_phase(entry.get("phase", 0))
        site.uses = entry["uses"]
        site.set_bits(entry["bits"].tolist(), entry.get(_CONTROLLED, entry["bits"]).tolist())
        site.lost_controller = site.controller is None and _CONTROLLED in entry
        site.running_range.copy_(entry["running_range"])
        if site.remembers:
            site.histories.copy_(entry["histories"])
            site.remembered_step = entry["remembered_step"]
    for controller in {id(site.controller): site.controller for site in _of(clock, here)}.values():
        if controller is not None:
            controller.write()


def _expected(clock: Clock, saved: Any) -> list[tuple[Calls, QuantCall]]:
    """Make the calls that a saved group has, and that have not run here yet."""
    entries = saved.get("sites") if isinstance(saved, dict) else None
    known = {site.name for site in clock.sites}
    by_module = {calls.module: calls for calls in clock.callers}
    made = []
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        found = _CALL.fullmatch(name) if isinstance(name, str) and name not in known else None
        calls = by_module.get(found[1] or "") if found else None
        if found is None or calls is None or not isinstance(entry, dict):
            continue
        engines = entry.get("engines", [entry.get("engine")])
        layer = calls.expect(found[2], engines) if isinstance(engines, list) else None
        if layer is not None:
            made.append((calls, layer))
    return made


# The name of a call: that of its module, and the operator with its number.
_CALL = re.compile(rf"(?:(.*)\.)?((?:{'|'.join(OPERATORS)})\.\d+)")


def _saved(clock: Clock, here: Mapping[Site, QuantLayer], saved: Any) -> list[Site]:
    """The sites of a clock that a saved group has."""
    return [site for site in _of(clock, here) if site.name in saved["sites"]]


def _check_group(clock: Clock, here: Mapping[Site, QuantLayer], saved: Any) -> None:
    """Raise unless a saved group has a seed, a step, and the sites of this clock, with the same recipes and engines.

    A clock that may choose its engines takes any.
    """
    check_keys("load_state_dict: a conversion", saved, ("seed", "step", "sites"))
    check_whole("load_state_dict: seed", saved["seed"], 0, MOST_SEED)
    check_whole("load_state_dict: step", saved["step"], 0, _MOST_STEPS)
    if not isinstance(saved["sites"], dict):
        raise UsageError(f"load_state_dict: sites is {shown(saved['sites'])}: expected a dict by the layers' names")
    there = {name: _identity(name, entry, clock) for name, entry in saved["sites"].items()}
    own = {name: _identity(name, entry, clock) for name, entry in _state_of(clock, here)["sites"].items()}
    new = {site.name for site, layer in here.items() if isinstance(layer, QuantCall)} - there.keys()
    different = [name for name in dict.fromkeys([*own, *there]) if name not in new and own.get(name) != there.get(name)]
    if different:
        name = different[0]
        raise UsageError(
            f"load_state_dict: {len(different)} layers differ, first {shown(name)}: saved {there.get(name, 'none')}, "
            f"here {own.get(name, 'none')}. Convert the same model in the same way first"
        )


def _identity(name: str, entry: object, clock: Clock) -> str:
    """What must agree between a saved site and one here."""
    controlled = isinstance(entry, Mapping) and _CONTROLLED in entry
    phased = _PHASED if isinstance(entry, Mapping) and "phase" in entry else ()
    remembered = _REMEMBERED if isinstance(entry, Mapping) and "histories" in entry else ()
    keys = (*_SITE, *((_CONTROLLED,) if controlled else ()), *phased, *remembered)
    check_keys(f"load_state_dict: the state of {shown(name)}", entry, keys)
    assert isinstance(entry, Mapping)
    check_type(f"load_state_dict: recipe of {shown(name)}", entry["recipe"], str)
    check_whole(f"load_state_dict: formats of {shown(name)}", entry["formats"], 0, 2**32 - 1)
    check_type(f"load_state_dict: engine of {shown(name)}", entry["engine"], str)
    if entry["engine"] not in ENGINES:
        raise unknown(f"engine of {shown(name)} in load_state_dict", entry["engine"], ENGINES)
    engines = entry.get("engines", [entry["engine"]])
    check_type(f"load_state_dict: engines of {shown(name)}", engines, list[str])
    for each in engines:
        if each not in ENGINES:
            raise unknown(f"engine of {shown(name)} in load_state_dict", each, ENGINES)
    engine = "any" if clock.free else " and ".join(engines)
    return f"recipe {entry['recipe']} ({entry['formats']:08x}), engine {engine}"


def _check_site(site: Site, entry: dict[str, Any]) -> None:
    """Raise unless the saved values of a site are values that it can have."""
    what = f"load_state_dict: {site.name or 'the model'}"
    check_whole(f"{what}: uses", entry["uses"], 0, _MOST_STEPS)
    phase, engines = entry.get("phase", 0), entry.get("engines", [entry["engine"]])
    check_whole(f"{what}: phase", phase, 0, len(site.recipes) - 1)
    if len(engines) != len(site.recipes) or engines[phase] != entry["engine"]:
        raise UsageError(f"{what}: engines={shown(engines)} of {len(site.recipes)} phases, now {entry['engine']!r}")
    widths = [name for name in ("bits", _CONTROLLED) if name in entry]
    remembered = [name for name in ("histories",) if name in entry]
    for name in (*widths, "running_range", *remembered):
        own, saved = getattr(site, name), entry[name]
        if not is_like(saved, own):
            raise UsageError(f"{what}: {name} is {shown(saved)}: expected {own.dtype} of shape {tuple(own.shape)}")
    if ("histories" in entry) != site.remembers:
        raise UsageError(f"{what}: histories are {'missing' if site.remembers else 'given'}: another recipe saved this")
    if site.remembers:
        check_whole(f"{what}: remembered_step", entry["remembered_step"], 0, _MOST_STEPS)
        if not (entry["histories"][:, 0].isfinite().all() and (entry["histories"].nan_to_num() >= 0).all()):
            raise UsageError(f"{what}: histories has a negative magnitude, or a scale of one that is not finite")
    for bits, (product, operand, fmt) in (
        pair for name in widths for pair in zip(entry[name].tolist(), site.formats(phase), strict=True)
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
        if site.name not in saved:
            continue
        entry, layer = saved[site.name], layers[site]
        engines = entry.get("engines", [entry["engine"]])
        for engine, own, recipe in zip(engines, site.engines, site.recipes, strict=True):
            if engine in ("reference", own):
                continue
            refused = layer.engine_refusals(layer, recipe, engine)
            if len(refused) == len(layer.formats(recipe)):
                raise UsageError(
                    f"load_state_dict: {site.name!r} was saved on the {engine} engine, which cannot run it here: "
                    f"{in_words(refused)}. Continue on the machine where it began; another engine gives other last "
                    "digits"
                )
