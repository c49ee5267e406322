"""What the recipes of a converted model ask of the training loop, and warnings where a loop does not do it."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal, Self

import torch
from torch import nn

from lowbit.methods.recipe import Autocast, Recipe

Part = Literal["update", "scaling"]

_MISSING: dict[Part, str] = {
    "update": "rounds updates too, which no optimizer does here: make it with lowbit.optim.from_recipe(model, "
    "optimizer)",
    "scaling": "scales the loss, which no scaler of lowbit does here: use lowbit.amp.GradScaler.from_recipe(model) as "
    "torch's",
}


def autocast_of(recipes: Sequence[Recipe]) -> list[Autocast]:
    """The different autocasts that recipes ask for, those without one left out: one at most if they fit together."""
    return list(dict.fromkeys(recipe.autocast for recipe in recipes if recipe.autocast is not None))


class Loop:
    """What is asked of the training loop of one conversion, and has not been seen yet.

    Args:
        asked: the names of the recipes that ask for each part.
        autocast: what the forward should run in.
        written: how often the weights were written, before the last training forward.
    """

    def __init__(
        self, asked: dict[Part, list[str]] | None = None, autocast: Autocast | None = None, written: int = 0
    ) -> None:
        self.asked = asked or {}
        self.autocast = autocast
        self.written = written

    @classmethod
    def of(cls, model: nn.Module, recipes: Sequence[Recipe]) -> Self:
        """What recipes ask for, before the first step of a model."""
        parts: dict[Part, list[Recipe]] = {
            "update": [recipe for recipe in recipes if recipe.update is not None],
            "scaling": [r for r in recipes if r.autocast is not None and r.autocast.scaling is not None],
        }
        asked = {part: list(dict.fromkeys(r.name for r in of)) for part, of in parts.items() if of}
        return cls(asked, next(iter(autocast_of(recipes)), None), _written(model))

    def done(self, part: Part) -> None:
        """Note that something was made that does a part."""
        self.asked.pop(part, None)

    def check(self, model: nn.Module, *, first: bool) -> None:
        """Warn once of each part that is missing at the beginning of a training forward.

        An optimizer or scaler is missing where the weights have changed since the last one without it.

        Args:
            model: the converted model.
            first: whether it has not trained before.
        """
        if self.autocast is not None:
            autocast, self.autocast = self.autocast, None
            _check_autocast(autocast, device_of(model))
        if not self.asked:
            return
        before, self.written = self.written, _written(model)
        if first or before == self.written:
            return
        asked, self.asked = self.asked, {}
        for part, names in asked.items():
            _warn(f"the weights of this model change, and recipe {', '.join(names)} {_MISSING[part]}")


def _check_autocast(asked: Autocast, device: str) -> None:
    """Warn where the present autocast is not the one asked for, or its type is only simulated."""
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != asked.torch_dtype:
        _warn(
            f"the recipe of this model trains in {asked.dtype} autocast, and its forward runs outside it: put forward "
            "and loss into `with lowbit.amp.autocast(model):`"
        )
    if device == "cpu" and asked.dtype == "fp16" and not has_fp16_units():
        _warn_of_simulation()


@cache
def _warn_of_simulation() -> None:
    """Say once in a process what fp16 is on a CPU without its units."""
    _warn(
        "this CPU has no fp16 units, so training in fp16 is a simulation here: converted products round to fp16 and "
        "multiply in float32, and fp16 operations of torch are slow. The recipe amp-bf16 is not a simulation"
    )


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)


def device_of(model: nn.Module) -> str:
    """The type of device whose autocast counts; the meta device, where runs are planned, has none of its own."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    return "cpu" if kind == "meta" else kind


def _written(model: nn.Module) -> int:
    """How often the parameters were written in place."""
    return sum(p._version for p in model.parameters())


def has_fp16_units() -> bool:
    """Whether this CPU multiplies in fp16."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
