"""What a conversion says of products in functions: which modules are watched, and what their calls get."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.attention.function import refusal as refusal_of_attention
from lowbit.conversion.calibration import Table
from lowbit.conversion.choice import choose_for
from lowbit.conversion.rules import Matcher, Plan, is_named
from lowbit.engines.choice import in_words, refusal_of_tensor, refusals
from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe
from lowbit.nn import kinds
from lowbit.nn.calls.attention import Attention
from lowbit.nn.calls.call import Calls
from lowbit.nn.calls.caller import is_watchable, watch_forwards
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Clock
from lowbit.products.operators import Op


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """The recipe and the engines of every call of a model.

    Args:
        default: the recipe of calls that no rule decides.
        rules: as for `convert_`.
        left: names of the modules whose calls stay in full precision.
        engine: as for `convert_`.
        table: what was measured on this machine; None: nothing.
    """

    default: Recipe
    rules: tuple[tuple[Matcher, Recipe | None], ...]
    left: frozenset[str]
    engine: str
    table: Table | None

    def recipe(self, module: str, kind: type[nn.Module], call: str) -> Recipe | None:
        """The recipe of a call: that of the first rule that matches it, its module or the module's type."""
        if module in self.left:
            return None
        for which, recipe in self.rules:
            if which is kind or is_named(which, call) or is_named(which, module):
                return recipe
        return self.default

    def engines(self, call: str, op: Op, recipe: Recipe, weight: Tensor) -> list[str]:
        """What runs a call in each phase of its recipe.

        Raises:
            UsageError: formats that the operator does not take, or an engine was asked for that cannot run it.
        """
        leave = f"Leave it in full precision with rules=[({call!r}, None)]"
        if self.engine == "reference":
            return ["reference"] * len(recipe.in_phases())
        if op == Attention():
            return [self._of_attention(call, phase, leave) for phase in recipe.in_phases()]
        wanted = "int8" if self.engine == "auto" else self.engine
        engines = []
        for phase in recipe.in_phases():
            dim = 2 if op.geometry is None else 2 + len(op.geometry.stride)
            refused = refusals(op, phase, dim=dim, engine=wanted)
            if why := refusal_of_tensor(weight, wanted):
                refused = dict.fromkeys(self._products(phase), why)
            shape = weight.shape if op.geometry is not None else torch.Size((1, *weight.shape)[-2:])
            chosen = choose_for(op, shape, phase, self.engine, self.table, refused, len(self._products(phase)))
            if chosen.why and self.engine != "auto":
                raise UsageError(f"{call}: the {wanted} engine cannot run {in_words(refused)}. {leave}")
            engines.append(chosen.engine)
        return engines

    def _of_attention(self, call: str, phase: Recipe, leave: str) -> str:
        """What runs attention in one phase."""
        wanted = "int8" if self.engine == "auto" else self.engine
        why = refusal_of_attention(phase, wanted)
        if why and self.engine != "auto":
            raise UsageError(f"{call}: the {wanted} engine cannot run attention: {why}. {leave}")
        return "reference" if why else wanted

    @staticmethod
    def _products(recipe: Recipe) -> dict[str, None]:
        return dict.fromkeys(product for product, _, _ in recipe.operands())


def names_of_left(plans: Sequence[Plan]) -> frozenset[str]:
    """The layers whose products stay as they are: those that a rule or the recipe leaves, and those refused."""
    others = [plan for plan in plans if plan.twin is None and plan.called is None]
    return frozenset(plan.name for plan in others if plan.left_by is not None or kinds.multiplies(plan.layer))


def watch_calls(model: nn.Module, plans: Sequence[Plan], plan: CallPlan, clock: Clock) -> None:
    """Watch the forward of every module that may multiply in functions, or whose products must be left alone."""
    called = {p.layer for p in plans if p.called is not None}
    known = called | {p.layer for p in plans if kinds.multiplies(p.layer)}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLayer) or not (is_watchable(module) or _has_torch_forward(module, known)):
            continue
        watch_forwards(
            module,
            Calls(
                module=name, kind=type(module), plan=plan, clock=clock, owns=module in called, left=name in plan.left
            ),
        )


def _has_torch_forward(module: nn.Module, known: Iterable[nn.Module]) -> bool:
    """Whether a module multiplies in a forward of torch's own, which is watched too."""
    return module in known and "forward" not in module.__dict__ and not kinds.is_watched(module)
