"""The layers that a controller writes: what the bits of each follow, and where they lie in its sites.

Notation: t step (the batch counted from 0); forward bits are those of `input` and `weight`, backward bits those of
`grad_output`.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from lowbit.conversion.rules import Matcher, matches, may_mean_calls
from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import is_whole
from lowbit.methods.recipe import Recipe
from lowbit.nn.calls.call import QuantCall
from lowbit.nn.calls.caller import callers
from lowbit.nn.layers import QuantLayer, converted_layers
from lowbit.nn.site import Site
from lowbit.numerics.formats import check_bits
from lowbit.schedules import Called, Constant, Layerwise, Rule, Schedule, Source
from lowbit.tables import text_table

Bits = Schedule | Rule | int
EvalBits = int | Literal["highest", "current"]
# Which layers, and their (forward, backward) bits; None for either leaves the recipe's own.
LayerRule = tuple[Matcher | Callable[[nn.Module], bool], tuple[Bits | None, Bits | None] | None]
# (forward, backward) bits; None leaves the recipe's own.
Widths = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlledLayer:
    """One controlled layer: where its bits come from, and which numbers of its sites they are.

    Args:
        name: in the model.
        sites: all sites of the layer; they have the same formats.
        forward: what its forward bits follow; None: the recipe's own.
        backward: what its backward bits follow; None: what `forward` says, or the recipe's own.
        has_rule: whether a rule decided, so that bits for all layers do not apply here.
        called: whether it is a product in a function, which is known once it ran.
    """

    name: str
    sites: tuple[Site, ...]
    forward: Source | None
    backward: Source | None
    has_rule: bool = False
    called: bool = False

    @property
    def own(self) -> tuple[int, ...]:
        """The recipe's bits of a site in its present phase; all sites of a layer have the same."""
        return self._in_phases[self.sites[0].phase][0]

    @property
    def places(self) -> tuple[frozenset[int], frozenset[int]]:
        """The places of forward and of backward bits among the bits of a site."""
        return self._in_phases[self.sites[0].phase][1]

    @cached_property
    def _in_phases(self) -> list[tuple[tuple[int, ...], tuple[frozenset[int], frozenset[int]]]]:
        """`own` and `places` in each phase."""
        site, found = self.sites[0], []
        for phase in range(len(site.recipes)):
            own = tuple(fmt.bits for _, _, fmt in site.formats(phase))
            wide, back = site.slots("input", "weight", phase=phase), site.slots("grad_output", phase=phase)
            found.append((own, (frozenset(wide), frozenset(back))))
        return found

    @property
    def gated(self) -> bool:
        """Whether a gate chooses the bits for each sample."""
        return self.sites[0].gated

    def training(self, step: int) -> Widths:
        """The bits of a training forward at a step; beyond the end of a schedule, those of its last step."""
        backward = bits_at(self.backward, step)
        if self.backward is None and self.forward is not None:
            backward = self.forward.grad_at(step)
        return bits_at(self.forward, step), backward

    def evaluation(self, step: int, eval_bits: EvalBits) -> Widths:
        """The bits of an evaluation at a step."""
        forward, backward = self.training(step)
        if self.forward is None or eval_bits == "current":
            return forward, backward
        own = isinstance(eval_bits, str) or self.has_rule
        return self.forward.max_bits if own else int(eval_bits), backward

    def values(self, widths: Widths) -> list[int]:
        """All bits of a site; None stands for the recipe's own."""
        wide, back = self.places
        given = [widths[0] if i in wide else widths[1] if i in back else None for i in range(len(self.own))]
        return [own if bits is None else bits for own, bits in zip(self.own, given, strict=True)]

    def first(self, widths: Widths) -> Widths:
        """The first forward and the first backward bits that can be set; None if none can, or a gate chooses."""
        values = self.values(widths)
        places = [None if self.gated else min(places, default=None) for places in self.places]
        forward, backward = (None if place is None else values[place] for place in places)
        return forward, backward

    def write(self, training: Widths, evaluation: Widths) -> None:
        """Write the bits of both modes into the sites, in place; nothing else writes bits in a run."""
        for site in self.sites:
            site.set_bits(self.values(training), self.values(evaluation))


def bits_at(source: Source | None, step: int) -> int | None:
    """The forward bits of a source at a step; beyond its end, those of its last step. None without a source."""
    if source is None:
        return None
    return source.at(step if source.total_steps is None else min(step, source.total_steps - 1))


def as_source(what: str, given: Any) -> Source | None:
    """A number as a constant schedule, a callable as a source; a UsageError if it cannot give bits."""
    if given is None or isinstance(given, Source):
        return given
    if isinstance(given, Schedule):
        return Called(schedule=given)
    if is_whole(given):
        return Constant(bits=given)
    raise UsageError(
        f"{what}={shown(given)}: give a number of bits, a schedule, or a rule such as schedules.Progressive"
    )


def quantized_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """The converted layers of a model with their names, in order; then products in functions, in that of their runs."""
    layers = list(converted_layers(model).items())
    calls = [pair for pair in layers if isinstance(pair[1], QuantCall)]
    calls.sort(key=lambda pair: pair[1].sites()[0].clock.sites.index(pair[1].sites()[0]))
    found = [*(pair for pair in layers if not isinstance(pair[1], QuantCall)), *calls]
    if not found and not callers(model):
        raise UsageError("nothing in this model is converted: call lowbit.convert_(model, recipe) first")
    return found


def recipe_of(layer: nn.Module) -> Recipe:
    """The recipe of a converted layer."""
    assert isinstance(layer, QuantLayer)
    return layer.sites()[0].recipe


def controlled_layers(
    model: nn.Module, forward: Source | Layerwise | None, backward: Source | None, rules: Sequence[LayerRule]
) -> list[ControlledLayer]:
    """What each converted layer of a model follows: the first rule that matches it, or `forward` and `backward`.

    A rule that gives each layer its own bits does so for layers with products whose forward bits can be set.

    Raises:
        UsageError: a layer has a controller, or a rule decides nothing or follows the loss.
    """
    planned, used = [], set()
    for name, layer in quantized_layers(model):
        if taken := [site for site in layer.sites() if site.controller is not None]:
            raise UsageError(
                f"{taken[0].name or 'the model'} has a PrecisionController already, and a model can have one: call "
                "remove() on the first, or give its layers other bits by rules"
            )
        index, controlled = controlled_layer(name, layer, forward, backward, rules)
        used.add(index)
        planned.append(controlled)
    modules = {caller.lowbit_calls.module: caller for caller in callers(model).values()}
    for index, (which, _) in enumerate(rules):
        if index not in used and not (isinstance(which, str | re.Pattern) and may_mean_calls(which, modules)):
            called = which.pattern if isinstance(which, re.Pattern) else getattr(which, "__name__", which)
            raise UsageError(f"rule {index + 1}, {called!r}, decided no converted layer that an earlier rule did not")
    return planned


def controlled_layer(
    name: str,
    layer: QuantLayer,
    forward: Source | Layerwise | None,
    backward: Source | None,
    rules: Sequence[LayerRule],
) -> tuple[int | None, ControlledLayer]:
    """The number of the first rule that matches a layer, None if none does, and what the layer follows."""
    index = next((i for i, (which, _) in enumerate(rules) if _matches(which, name, layer)), None)
    everywhere = _for_layer(forward, name, layer) if isinstance(forward, Layerwise) else forward
    own = (everywhere, backward) if index is None else _sources_of_rule(index, rules[index][1])
    sites = tuple(layer.sites())
    return index, ControlledLayer(
        name=name,
        sites=sites,
        forward=own[0],
        backward=own[1],
        has_rule=index is not None,
        called=isinstance(layer, QuantCall),
    )


def _for_layer(rule: Layerwise, name: str, layer: QuantLayer) -> Source | None:
    """What a layer follows of a rule that gives each its own bits; None if it has no products, or no bits to set."""
    settable = layer.operator(layer) is not None and layer.sites()[0].slots("input", "weight")
    return rule.of(name) if settable else None


def _sources_of_rule(index: int, pair: tuple[Bits | None, Bits | None] | None) -> tuple[Source | None, Source | None]:
    """The sources of a rule's pair; a UsageError if one follows the loss."""
    forward, backward = (as_source(f"rule {index + 1}", bits) for bits in pair or (None, None))
    if isinstance(forward, Rule) or isinstance(backward, Rule):
        raise UsageError(
            f"rule {index + 1}: what follows the loss goes into `forward`; a rule takes schedules and numbers"
        )
    return forward, backward


def _matches(which: Matcher | Callable[[nn.Module], bool], name: str, layer: nn.Module) -> bool:
    if callable(which) and not isinstance(which, type):
        return bool(which(layer))
    return matches(which, name, layer)


def sources_of(layers: Iterable[ControlledLayer]) -> list[Source]:
    """What the layers follow, each once."""
    every = [source for layer in layers for source in (layer.forward, layer.backward) if source is not None]
    return list({id(source): source for source in every}.values())


def checked_sources(
    layers: Sequence[ControlledLayer], eval_bits: EvalBits, *, needs_bits: bool = True
) -> dict[int, str]:
    """What identifies each source of the layers in a saved state, by the id of the source.

    Args:
        layers: what is controlled.
        eval_bits: as for the controller.
        needs_bits: whether to raise if no layer has bits to set.

    Raises:
        UsageError: a format cannot have the bits that it would get, or no layer has bits to set.
    """
    widths = {id(source): source.widths() for source in sources_of(layers)}
    everywhere = () if isinstance(eval_bits, str) else (eval_bits,)
    found = False
    for layer in layers:
        follows_forward = layer.backward is None and layer.forward is not None
        grads = layer.forward.grad_widths() if follows_forward and layer.forward is not None else ()
        for source, operands, more in (
            (layer.forward, ("input", "weight"), () if layer.has_rule else everywhere),
            (layer.backward, ("grad_output",), grads),
        ):
            for site in layer.sites:
                phases = (site.slots(*operands, phase=phase) for phase in range(len(site.recipes)))
                for fmt in (fmt for slots in phases for fmt in slots.values()):
                    found = True
                    for bits in {*widths.get(id(source), ()), *more}:
                        _check_width(site, bits, fmt.zero)
    if needs_bits and not found:
        raise UsageError(
            "no layer here has an integer format, so there are no bits to set: convert the model with a recipe of "
            "integer formats, e.g. sbm8-cpt"
        )
    return {
        id(source): f"{source.title} {zlib.crc32(repr(widths[id(source)]).encode()):08x}"
        for source in sources_of(layers)
    }


def _check_width(site: Site, bits: int, zero: Any) -> None:
    try:
        check_bits(bits, zero)
    except UsageError as error:
        raise UsageError(f"{site.name or 'the model'} of recipe {site.recipe.name!r}: {error}") from error


def table(layers: Iterable[ControlledLayer], step: int) -> str:
    """The layers, their bits at a step and where these come from, as text."""
    rows = [
        [
            layer.name or "(model)",
            *("-" if b is None else str(b) for b in layer.first(layer.training(step))),
            "a gate" if layer.gated else _shown(layer.forward),
        ]
        for layer in layers
    ]
    return text_table(["layer", "forward", "backward", "from"], rows)


def _shown(source: Source | None) -> str:
    if source is None:
        return "the recipe"
    return f"{source.bits} bits" if isinstance(source, Constant) else source.title
