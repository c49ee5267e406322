"""Which engine executes each converted layer: the one asked for, or with ``"auto"`` int8 where that is faster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lowbit.conversion.calibration import Shape, Table, Timing
from lowbit.conversion.rules import Plan, some, type_name
from lowbit.engines.choice import in_words
from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import QuantLayer
from lowbit.products.operators import Op
from lowbit.products.strides import suggests_channels_last

# A grouped convolution with fewer channels in a group leaves 32-wide tiles mostly idle: on a machine that was not
# measured, engine="auto" then takes the reference engine.
FEW_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a layer is executed: on the engine `wanted`, unless `why` is given; and the timing that ``"auto"`` used.

    Args:
        wanted: the engine.
        why: why the layer runs on the reference engine; empty if it runs on the wanted one.
        refused: products that run on the reference engine although the layer runs on the wanted one, and why.
        timing: what was measured.
        open: whether both engines could run it.
        later: the same for each later phase of the recipe.
    """

    wanted: str = "int8"
    why: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    timing: Timing | None = None
    open: bool = False
    later: tuple["Choice", ...] = ()

    @property
    def engine(self) -> str:
        """The engine of the layer."""
        return "reference" if self.why else self.wanted

    def engine_of(self, product: str) -> str:
        """The engine of one of its products."""
        return "reference" if product in self.refused else self.engine


def choose_all(plans: Sequence[Plan], engine: str, table: Table | None) -> dict[str, Choice]:
    """How each layer that is converted is to be executed.

    Raises:
        UsageError: an engine was asked for that cannot run a layer.
    """
    asked = Choice(why="it was asked for")
    choices = {}
    for plan in plans:
        if plan.twin is not None and plan.recipe is not None:
            first, *later = (
                asked if engine == "reference" else _choose(plan.layer, plan.twin, recipe, engine, table)
                for recipe in plan.recipe.in_phases()
            )
            choices[plan.name] = replace(first, later=tuple(later))
    refused = {
        name: next((why for c in (choice, *choice.later) if (why := c.why or in_words(c.refused))), "")
        for name, choice in choices.items()
    }
    refused = {name: why for name, why in refused.items() if why}
    if refused and engine not in ("auto", "reference"):
        types = {plan.name: type_name(plan.layer) for plan in plans}
        shown = [f"{n or 'the model'} ({types[n]}): the {engine} engine cannot run {why}" for n, why in refused.items()]
        raise UsageError(
            f"{len(refused)} of {len(choices)} layers cannot run as asked. {'; '.join(shown[:5])}. Leave them out with "
            "a rule, or let engine='auto' run the refused products on the reference engine"
        )
    return choices


def _choose(layer: nn.Module, twin: type[QuantLayer], recipe: Recipe, engine: str, table: Table | None) -> Choice:
    """What runs a layer: an engine that can, and with ``"auto"`` the faster one, by the table or else by a rule."""
    refused = twin.engine_refusals(layer, recipe, "int8" if engine == "auto" else engine)
    op, weight = twin.operator(layer), twin.largest_weight(layer)
    shape = None if weight is None else weight.shape
    return choose_for(op, shape, recipe, engine, table, refused, len(twin.formats(recipe)))


def choose_for(
    op: Op | None,
    weight: torch.Size | None,
    recipe: Recipe,
    engine: str,
    table: Table | None,
    refused: Mapping[str, str],
    products: int,
) -> Choice:
    """`_choose` for what multiplies by a weight of a shape, given the products that the engine refuses, of so many."""
    wanted = "int8" if engine == "auto" else engine
    why = in_words(refused) if len(refused) == products else ""
    if engine != "auto" or op is None or weight is None:
        return Choice(wanted=wanted, why=why, refused=refused)
    shape = Shape.of(op, weight)
    timing = None if table is None else table.nearest(shape, recipe)
    if why:
        return Choice(why=why, timing=timing)
    if timing is not None and timing.fastest == "reference":
        why = f"measured {timing.reference:.2g} ms against {timing.int8:.2g} on int8 units, as {timing.shape}"
    elif timing is None and shape.groups > 1 and (narrow := min(shape.inputs, shape.outputs)) < FEW_CHANNELS:
        why = f"{narrow} channels in a group, fewer than {FEW_CHANNELS}, leave int8 units mostly idle"
    return Choice(why=why, refused=refused, timing=timing, open=True)


def memory_notes(plans: Sequence[Plan], choices: dict[str, Choice]) -> list[str]:
    """A note that convolutions with contiguous weights make the int8 engine copy: it works in channels last."""
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
    return [f"model.to(memory_format=torch.channels_last) spares a copy of what goes into and out of {some(names)}"]


def choice_notes(choices: dict[str, Choice], found: str) -> list[str]:
    """What ``"auto"`` went by, and the layers that it leaves to the reference engine, a line for each reason."""
    lines = []
    if any(choice.timing is not None for choice in choices.values()):
        lines.append(f"engines chosen by {found}")
    elif any(choice.open for choice in choices.values()):
        lines.append(f"engines chosen by what the units take and by channels: {found}")
    later = sum(any(c.engine != choice.engine for c in choice.later) for choice in choices.values())
    if later:
        lines.append(f"{later} layers change the engine with the phase; the table shows that of the first phase")
    for why in dict.fromkeys(choice.why for choice in choices.values() if choice.why):
        names = [name for name, choice in choices.items() if choice.why == why]
        lines.append(f"reference engine for {some(names)}: {why}")
    for words in dict.fromkeys(in_words(choice.refused) for choice in choices.values() if not choice.why):
        names = [name for name, choice in choices.items() if not choice.why and in_words(choice.refused) == words]
        if words:
            lines.append(f"reference engine for some products of {some(names)}: {words}")
    return lines
