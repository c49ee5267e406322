"""Which layers a recipe is for: rules, and the plan of what becomes of each layer of a model."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from lowbit.errors import UsageError, shown
from lowbit.methods.names import recipes
from lowbit.methods.recipe import Recipe
from lowbit.nn import kinds
from lowbit.nn.kinds import plain_type
from lowbit.nn.layers import QuantLayer

RecipeLike = Recipe | str
Matcher = str | re.Pattern[str] | type
Rule = tuple[Matcher, RecipeLike | None]

LeftBy = Literal["rule", "recipe", "conversion"]

_WHICH = "give a name, a compiled regular expression, or a module type"


@dataclass(frozen=True)
class Plan:
    """One layer of the walk and what is to become of it; `called` is the recipe of what its forward calls."""

    name: str
    layer: nn.Module
    twin: type[QuantLayer] | None
    recipe: Recipe | None
    reason: str
    left_by: LeftBy | None = None
    called: Recipe | None = None


def plan_layers(
    model: nn.Module, recipe: Recipe, rules: Sequence[tuple[Matcher, Recipe | None]], strict: bool, calls: bool
) -> list[Plan]:
    """What is to become of each layer of a model; `calls` says whether products in functions are converted.

    Raises:
        UsageError: a rule decided no layer, or, where `strict`, a layer cannot be converted or is converted already.
    """
    layers = list(kinds.walk(model))
    with_products = [layer for _, layer in layers if kinds.multiplies(layer)]
    ends = {
        "first": with_products[0] if with_products and recipe.first == "leave" else None,
        "last": with_products[-1] if with_products and recipe.last == "leave" else None,
    }
    plans: list[Plan] = []
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
        called: Recipe | None = None
        if kinds.is_watched(layer):
            reason, left_by = "its calls are converted already", "conversion"
        elif isinstance(layer, QuantLayer):
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
            if twin is None and calls and reason != kinds.WITHOUT_PRODUCT and kinds.is_called(layer):
                called, reason, refused = chosen, kinds.in_calls(layer), False
            if refused:
                refusals.append((name, f"{name or 'the model'} ({type_name(layer)}): {reason}"))
        plans.append(Plan(name, layer, twin, chosen if twin else None, reason, left_by, called))
    _check_rules(model, {plan.name for plan in plans}, rules, used, calls)
    if strict and converted:
        raise UsageError(
            f"{len(converted)} of {len(plans)} layers are converted already: {some(converted)}. Call lowbit.restore_ "
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


def _check_rules(
    model: nn.Module, layers: set[str], rules: Sequence[tuple[Matcher, Recipe | None]], used: set[int], calls: bool
) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {module: name for name, module in reversed(list(modules.items()))}
    for i, (which, _) in enumerate(rules):
        if i in used or (calls and may_mean_calls(which, modules)):
            continue
        shown = which.pattern if isinstance(which, re.Pattern) else getattr(which, "__name__", which)
        hint = "no layer has that name or type"
        if which in layers or not isinstance(which, str):
            hint = "no layer has that name or type that an earlier rule did not decide"
        elif which in modules and first_names[modules[which]] in layers:
            hint = f"that layer is shared, and its first name {first_names[modules[which]]!r} counts"
        elif which in modules:
            hint = f"{which!r} is not a layer but holds some: use re.compile(r'{re.escape(which)}\\..*')"
        raise UsageError(f"rule {i + 1}, {shown!r}, decided nothing: {hint}")


def matches(which: Matcher, name: str, layer: nn.Module) -> bool:
    """Whether a rule means this layer: by its exact name, a pattern of its whole name, or its exact plain type."""
    return plain_type(layer) is which if isinstance(which, type) else is_named(which, name)


def is_named(which: Matcher, name: str) -> bool:
    """Whether a rule by name means this one."""
    return which == name if isinstance(which, str) else isinstance(which, re.Pattern) and bool(which.fullmatch(name))


def may_mean_calls(which: Matcher, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a rule can mean products in functions of these modules, before any has run."""
    if isinstance(which, type):
        return any(plain_type(module) is which for module in modules.values())
    return any(is_named(which, call) for name in modules for call in kinds.possible_calls(name))


def as_recipe(given: object) -> Recipe:
    """A recipe as it is, or the one of a name or file."""
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        return Recipe.find(given)
    raise UsageError(
        f"recipe {shown(given)}: give a lowbit.Recipe, a file that ends in .toml, or a name: {', '.join(recipes())}"
    )


def as_rules(rules: object) -> list[Rule]:
    """The rules as they are; a UsageError unless each is a pair whose first entry can match."""
    if not isinstance(rules, list | tuple):
        raise UsageError(f"rules={shown(rules)}: rules are pairs (which layers, recipe or None) in a list")
    for rule in rules:
        if not isinstance(rule, tuple) or len(rule) != 2:
            raise UsageError(f"rule {shown(rule)}: rules are pairs (which layers, recipe or None) in a list")
        if not isinstance(rule[0], str | re.Pattern | type):
            raise UsageError(f"rule for {shown(rule[0])}: {_WHICH}")
    return list(rules)


def _pattern(names: Sequence[str]) -> str:
    """Python text for a rule that means these layers: the part of the model that holds them, or their names."""
    if len(names) == 1:
        return repr(names[0])
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    part = [level[0] for level in itertools.takewhile(lambda level: len({*level}) == 1, levels)]
    text = re.escape(".".join(part)) + r"\..*" if part else "|".join(map(re.escape, names))
    return f"re.compile(r'{text}')"


def _mark_shared_parameters(plans: list[Plan]) -> None:
    """Add to the remark of a layer that it shares a parameter with an earlier one."""
    owner: dict[Tensor, str] = {}
    for i, plan in enumerate(plans):
        shared = {owner[p] for p in plan.layer.parameters(recurse=False) if p in owner}
        for p in plan.layer.parameters(recurse=False):
            owner.setdefault(p, plan.name)
        if shared:
            remark = "; ".join(filter(None, [plan.reason, f"shares a parameter with {', '.join(sorted(shared))}"]))
            plans[i] = replace(plan, reason=remark)


def type_name(layer: nn.Module) -> str:
    """The name of a layer's type before conversion."""
    return plain_type(layer).__name__


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name or "the model" for name in names[:3]) + more
