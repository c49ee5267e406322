"""Mixed precision as a recipe asks for it: torch's autocast around the forward, and a scaled loss.

With a recipe that asks for neither, both do nothing, so one training loop serves every recipe.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from lowbit.errors import RunError, UsageError
from lowbit.inputs.checks import check_keys, checked
from lowbit.methods.autocast import Autocast, LossScaling
from lowbit.nn.layers import sites_of
from lowbit.nn.loop import autocast_of, device_of

_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


@checked
def autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The autocast that the recipe of a converted model asks for, as a context for forward and loss.

    The context does nothing where the recipe asks for none.

    Raises:
        UsageError: nothing in the model is converted.
    """
    asked = _asked("autocast", model)
    return nullcontext() if asked is None else torch.autocast(device_of(model), asked.torch_dtype)


class ScaleError(RunError):
    """The scale of the loss fell below its minimum."""


class GradScaler(torch.amp.GradScaler):
    """torch's scaler of losses with the settings of a recipe, and an end where the scale becomes too small.

    Args:
        scaling: the settings; None: losses stay as they are, and `step` is the optimiser's.
        device: type of the device of the losses.
        model: whose parameters the reason for an end names; None: it names none.

    Source: Micikevicius et al. 2018, arXiv:1710.03740.
    """

    @checked
    def __init__(self, scaling: LossScaling | None, *, device: str = "cpu", model: nn.Module | None = None) -> None:
        settings = scaling or LossScaling()
        super().__init__(
            device,
            init_scale=settings.start,
            growth_factor=settings.growth,
            backoff_factor=settings.backoff,
            growth_interval=settings.interval,
            enabled=scaling is not None,
        )
        self.minimum = settings.minimum
        self.model = model

    @classmethod
    @checked
    def from_recipe(cls, model: nn.Module, *, device: str | None = None) -> Self:
        """The scaler that the recipe of a converted model asks for.

        Args:
            model: the converted model.
            device: type of the device where it trains; None: where it is now.

        Raises:
            UsageError: nothing in the model is converted.
        """
        asked = _asked("GradScaler", model)
        for clock in {site.clock for site in sites_of(model)}:
            clock.loop.done("scaling")
        return cls(None if asked is None else asked.scaling, device=device or device_of(model), model=model)

    def update(self, new_scale: Any = None) -> None:
        """Set the scale of the next step, see `torch.amp.GradScaler`.

        Raises:
            ScaleError: it fell below the minimum.
        """
        super().update(new_scale)
        scale = self.get_scale()
        if self.is_enabled() and scale < self.minimum:
            raise ScaleError(
                f"the loss scale fell to {scale}, below its minimum of {self.minimum}: {self._why()}. The weights are "
                "those of the last step with finite gradients. Either the gradients are beyond the range of fp16, so "
                "lower the learning rate or train in bf16, or they have a nan, which lowbit.tripwire(model) finds"
            )

    def _why(self) -> str:
        """Whose gradients are not finite."""
        named = [] if self.model is None else list(self.model.named_parameters())
        grads = {name: p.grad for name, p in named if p.grad is not None}
        bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
        if not bad:
            return "gradients were not finite, step after step"
        return f"gradients of {len(bad)} of {len(grads)} parameters are not finite, first that of {bad[0]}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state that `state_dict` gave.

        Raises:
            UsageError: it is not the state of a scaler that scales, or of one that does not.
        """
        check_keys("GradScaler.load_state_dict: the state", state_dict, _KEYS if self.is_enabled() else ())
        super().load_state_dict(state_dict)


def _asked(what: str, model: nn.Module) -> Autocast | None:
    """What the recipes of a model's layers ask for."""
    sites = sites_of(model)
    if not sites:
        raise UsageError(f"{what}: nothing in this model is converted; call lowbit.convert_ first")
    asked = autocast_of([site.recipe for site in sites])
    if len(asked) > 1:
        raise UsageError(f"{what}: layers of this model ask for {' and for '.join(map(str, asked))}: give them one")
    return asked[0] if asked else None
