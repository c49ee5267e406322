"""What the twins of batch normalisation have in common, whatever they compute."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import QuantLayer


class NormTwin(QuantLayer, nn.modules.batchnorm._BatchNorm):
    """A normalisation with the parameters and buffers of the plain layer, and without a product.

    Attributes:
        norm: what the recipe says of it.
    """

    is_seen_in_calls: ClassVar[bool] = False
    norm: Any

    @classmethod
    def refusal(cls, layer: Any, recipe: Recipe) -> str:  # noqa: ARG003 - always so
        """It does not refuse anything."""
        return ""

    @classmethod
    def operator(cls, layer: Any) -> None:
        """None: it lacks a product."""

    @classmethod
    def weights(cls, layer: Any) -> list[Tensor]:  # noqa: ARG003 - always so
        """An empty list: gamma multiplies each channel separately."""
        return []

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """C."""
        return int(layer.num_features)

    def undo(self) -> None:
        """Become the plain layer again."""
        del self.norm
        super().undo()

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, momentum: float | None) -> None:
        """Move the running statistics; momentum None is the cumulative mean, as in the plain layer."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        weight = 1.0 / self.num_batches_tracked.to(self.running_mean) if momentum is None else momentum
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_(variance.to(self.running_var), weight)
