"""The call: one product in a function of a module, as a layer of its own with a site.

A call is named after the module in whose forward it runs, the operator and its number there: the first `addmm` with a
weight in a forward of ``h.0.attn.c_attn`` is ``h.0.attn.c_attn.addmm.0``. Numbers begin anew with each forward of the
module, so that a product has one name in every step.
"""

import threading
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Clock, product_site
from lowbit.products.operators import Linear, Op

_LOCK = threading.Lock()


class Planning(Protocol):
    """What a conversion says of the calls of a model."""

    def recipe(self, module: str, kind: type[nn.Module], call: str) -> Recipe | None:
        """The recipe of a call by the names of its module and of itself; None leaves it in full precision."""

    def engines(self, call: str, op: Op, recipe: Recipe, weight: Tensor) -> list[str]:
        """What runs it, in each phase of the recipe."""


class ProductInFunction(nn.Module):
    """What a converted call stands for in reports: a product in a function, which is no module of torch."""


class QuantCall(QuantLayer):
    """A product in a function of a module, in the formats of a recipe.

    It is no module of the model: it takes no arguments, and it does not own the weight that it multiplies by.

    Attributes:
        op: what multiplies; a matrix product until it first ran.
        multiplied: the parameters that the weight of its last run was made of.
    """

    plain: ClassVar[type[nn.Module]] = ProductInFunction

    def __init__(self, *, name: str, recipe: Recipe, clock: Clock, engines: Sequence[str], op: Op) -> None:
        nn.Module.__init__(self)
        self.op = op
        self.multiplied: tuple[Tensor, ...] = ()
        self.site = product_site(name=name, recipe=recipe, clock=clock, engine=engines[0])
        self.site.engines = list(engines)

    @classmethod
    def operator(cls, layer: Any) -> Op:
        """`op`."""
        op: Op = layer.op
        return op

    @classmethod
    def weights(cls, layer: Any) -> list[Tensor]:
        """`multiplied`."""
        return list(layer.multiplied)

    def undo(self) -> None:
        """Leave the clock; the module that the call runs in forgets it."""
        self.site.clock.sites.remove(self.site)


class Calls:
    """The calls of one module.

    Args:
        module: its name, fixed at conversion.
        kind: its type.
        plan: what recipes and engines its calls get.
        clock: seed and step of the model.
        owns: whether the module has weights that are no layer's.
        left: whether all its products stay in full precision.

    Attributes:
        layers: the converted calls by operator and number, e.g. ``"addmm.0"``.
        seen: for training and for evaluation, whether a forward of the module has run to its end.
        foreign: parameters of layers that a rule or the recipe leaves: products by them stay as they are.
        needed: whether a product in another module was found by what this module did with its parameters.
    """

    def __init__(
        self, *, module: str, kind: type[nn.Module], plan: Planning, clock: Clock, owns: bool, left: bool
    ) -> None:
        self.module, self.kind, self.plan, self.clock, self.owns, self.left = module, kind, plan, clock, owns, left
        self.layers: dict[str, QuantCall] = {}
        self.seen = {True: False, False: False}
        self.needed = False
        self.foreign: list[Tensor] = []
        clock.callers.append(self)

    def recipe(self) -> Recipe | None:
        """The recipe of calls of this module that no rule by a call's name decides."""
        return self.plan.recipe(self.module, self.kind, self.module)

    @property
    def is_unknown(self) -> bool:
        """Whether the module has weights of its own that it may multiply by, and has not run."""
        return self.owns and not self.left and not self.layers and not any(self.seen.values())

    def is_settled(self, training: bool) -> bool:
        """Whether a forward has run to its end and no product was found, so that the next one is not watched."""
        return self.seen[training] and not self.layers and not self.needed

    def interrupts(self, training: bool) -> bool:
        """Whether a compiled model runs the module eagerly: a compiler cannot follow what looks functions up.

        A module without weights of its own does so only if a forward that was not compiled found products in it.
        """
        return not self.left and (self.owns or bool(self.layers) or self.needed) and not self.is_settled(training)

    def layer(self, call: str, op: Op, weight: Tensor, *, training: bool) -> QuantCall | None:
        """The call of that operator and number, made if it is new; None if it stays in full precision."""
        layer = self.layers.get(call)
        if layer is not None:
            layer.op = op
            return layer if layer.site.running_range.device == weight.device else layer.to(weight.device)
        with _LOCK:  # the model may run in several threads
            return self.layers.get(call) or self._new(call, op, weight, training=training)

    def _new(self, call: str, op: Op, weight: Tensor, *, training: bool) -> QuantCall | None:
        """A call that runs for the first time, announced if it did not run in the first forward."""
        recipe = self.plan.recipe(self.module, self.kind, self._name(call))
        if recipe is None:
            return None
        if self.seen[training]:
            warnings.warn(
                f"{self._name(call)}: this product did not run in the first forward of {self.module or 'the model'}. "
                f"It runs {recipe.name} from now on",
                UserWarning,
                stacklevel=2,
            )
        layer = self.add(call, recipe, self.plan.engines(self._name(call), op, recipe, weight), op)
        layer.train(training)
        if training:
            self.clock.check_controlled()
        return layer.to(weight.device)

    def add(self, call: str, recipe: Recipe, engines: Sequence[str], op: Op | None = None) -> QuantCall:
        """A new call."""
        with torch.inference_mode(mode=False):  # for tensors that training changes in place
            made = QuantCall(name=self._name(call), recipe=recipe, clock=self.clock, engines=engines, op=op or Linear())
        self.layers[call] = made
        if self.clock.controller is not None:
            self.clock.controller.take(made)
        return made

    def expect(self, call: str, engines: Sequence[str]) -> QuantCall | None:
        """A call that a saved state has, made before it runs; None if it stays in full precision."""
        recipe = self.plan.recipe(self.module, self.kind, self._name(call))
        if recipe is None:
            return None
        return self.add(call, recipe, engines)

    def forget(self, layer: QuantCall) -> None:
        """Undo a call."""
        self.layers = {name: other for name, other in self.layers.items() if other is not layer}
        layer.undo()

    def undo(self) -> None:
        """Forget all calls."""
        for layer in self.layers.values():
            layer.undo()
        self.layers.clear()
        self.clock.callers.remove(self)

    def _name(self, call: str) -> str:
        return f"{self.module}.{call}" if self.module else call
