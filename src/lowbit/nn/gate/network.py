"""The network of the gates: pooled inputs, one LSTM step, and the choice of the largest probability.

Notation: as in `lowbit.nn.gate`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _StraightThrough(torch.autograd.Function):
    """The largest of each row as one-hot, the first of a tie; its gradient goes to the row unchanged."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)

    @staticmethod
    def backward(ctx: Any, grad_mask: Tensor) -> Tensor:  # noqa: ARG004
        return grad_mask


class RecurrentGate(nn.Module):
    """One LSTM step and a projection: ``p = softmax(W h + b)``, of which the largest is chosen.

    Args:
        features: inputs of the LSTM.
        state: its hidden units.
        choices: K.
    """

    def __init__(self, *, features: int, state: int, choices: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(features, state)
        self.projection = nn.Linear(state, choices)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map ``(B, features)`` and the previous block's state (None: zeros) to ``(B, K)`` one-hot and the new state.

        The gradient of the one-hot mask is passed to p unchanged, without noise or temperature.
        """
        state = self.cell(x, state)
        mask: Tensor = _StraightThrough.apply(torch.softmax(self.projection(state[0]), 1))
        return mask, state


def pooled(x: Tensor, *, channels_last: bool) -> Tensor:
    """The mean over all axes but samples and channels: ``(B, C)`` in float32."""
    x = x.float()
    if channels_last:
        return x.flatten(1, -2).mean(1) if x.dim() > 2 else x
    return x.flatten(2).mean(2) if x.dim() > 2 else x
