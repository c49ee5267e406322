"""Delayed scaling: a step's scale comes from the largest magnitudes of the steps before it.

Notation: a largest magnitude of a tensor in one step, m the one that the scale of this step is made from, L how many
steps are remembered. A history is float32 ``(1 + L,)``: m (0: none yet), then a of this step and of those before it.

Source: TransformerEngine at d0067d0da, its recipe of delayed scaling.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.numerics.formats import Format
from lowbit.numerics.scales import Delayed


def new_history(length: int) -> Tensor:
    """A history of so many steps that has not seen any."""
    return torch.zeros(1 + length, dtype=torch.float32, device="cpu")


def advance(history: Tensor, rule: Delayed) -> None:
    """Begin a step, in place: m is chosen anew, and the oldest magnitude is forgotten.

    If what is chosen is 0, inf or nan, m stays as it is.
    """
    seen = history[1 : 1 + rule.history]
    chosen = seen.amax() if rule.choice == "max" else seen[0]
    history[0] = torch.where(chosen.isfinite() & (chosen > 0), chosen, history[0])
    history[1:] = history[1:].roll(1)
    history[1] = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Histories:
    """The histories of a layer's operands, as a forward and its backward use them.

    Args:
        kept: by operand.
        records: whether what is seen enters them, in place.
    """

    kept: Mapping[str, Tensor]
    records: bool

    def observe(self, operand: str, x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
        """The range that the scale of an operand is made from, of shape ``(1,) * x.dim()``.

        It is ``-2**margin m`` to ``2**margin m``, and that of S = 1 as long as there is no m. It is nan if x has an inf
        or nan, which would otherwise be clipped to a number.
        """
        history, rule = self.kept[operand], fmt.delay
        assert rule is not None
        x = x.detach()
        a = x.abs().amax().float() if x.numel() else history.new_zeros(()).to(x.device)
        if self.records:
            history[1] = torch.maximum(history[1], a.to(history.device))  # nan stays nan
        m = history[0].to(a)
        largest = torch.where(m > 0, m * 2.0**rule.margin, fmt.code_range[1])
        hi = largest.where(a.isfinite(), torch.nan).to(x.dtype).reshape((1,) * x.dim())
        return -hi, hi
