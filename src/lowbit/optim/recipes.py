"""The update that a converted model's recipe asks for, applied to an optimiser."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import checked
from lowbit.methods.update import Update
from lowbit.nn.calls.caller import callers
from lowbit.nn.layers import converted_layers, sites_of
from lowbit.optim.rounded import RoundedSGD
from lowbit.optim.wrapper import LowBitOptimizer


@checked
def from_recipe(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int = 0, **settings: Any
) -> torch.optim.Optimizer:
    """An optimiser in place of another that rounds as the recipe of a converted model says in its `[update]`.

    SGD with momentum becomes a `RoundedSGD`, whose order of roundings is that of the publications; any other optimiser
    a `LowBitOptimizer`. Parameters of layers that multiply and were left unconverted are not rounded. A recipe that
    lacks an `[update]` leaves the optimiser as it is, unless `settings` ask for more.

    Args:
        model: the converted model.
        optimizer: of its parameters, before its first step; use the returned one in its place.
        seed: of stochastic rounding.
        settings: of `LowBitOptimizer`, e.g. ``states="dynamic8"``, which is then made for SGD too; states stay as they
            are by default here.

    Raises:
        UsageError: nothing in the model is converted, its layers disagree about the update, or the optimiser cannot
            be wrapped.
    """
    sites = sites_of(model)
    if not sites:
        raise UsageError("from_recipe: nothing in this model is converted; call lowbit.convert_ first")
    update, *others = dict.fromkeys(site.recipe.update for site in sites)
    if others:
        raise UsageError("from_recipe: layers of this model have recipes with different updates: give them one")
    for clock in {site.clock for site in sites}:
        clock.loop.done("update")
    asked = bool(settings)
    settings = {"states": "fp32", "seed": seed, **settings}
    if update is None:
        return LowBitOptimizer(optimizer, **settings) if asked else optimizer
    left = _left(model)
    if type(optimizer) is torch.optim.SGD and not asked:
        return _rounded(optimizer, update, left, seed)
    return LowBitOptimizer(optimizer, update=update, leave=left, **settings)


def _left(model: nn.Module) -> list[Tensor]:
    """The parameters of layers that are not converted and have a matrix or a kernel: they may multiply."""
    layers = converted_layers(model).values()
    inside = {id(p) for layer in layers for p in (*layer.parameters(), *layer.weights(layer))}
    unseen = [name for name, module in callers(model).items() if module.lowbit_calls.is_unknown]
    if unseen:
        warnings.warn(
            f"from_recipe: {shown(unseen)} may multiply in functions and did not run yet, so its weights are left "
            "as they are: run a forward of the model first",
            UserWarning,
            stacklevel=3,
        )
    found: list[Tensor] = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(p.dim() > 1 and id(p) not in inside for p in own):
            found += [p for p in own if id(p) not in inside]
    return found


def _rounded(optimizer: torch.optim.SGD, update: Update, left: list[Tensor], seed: int) -> RoundedSGD:
    """The groups of an SGD in a RoundedSGD."""
    if optimizer.state:
        raise UsageError("from_recipe: the optimizer has made steps: give a new one, and load a saved state afterwards")
    skipped = {id(p) for p in left}
    groups = []
    for group in optimizer.param_groups:
        for setting in ("nesterov", "dampening", "maximize", "differentiable"):
            if group[setting]:
                raise UsageError(f"from_recipe: SGD with {setting}={group[setting]} has no rounded form: leave it out")
        for rounded in (True, False):
            params = [p for p in group["params"] if (id(p) not in skipped) is rounded]
            if params:
                names = ("lr", "momentum", "weight_decay")
                groups.append({"params": params, "rounded": rounded} | {name: group[name] for name in names})
    return RoundedSGD(groups, update=update, seed=seed)
