"""What a recipe asks of the training loop: torch's autocast around the forward, and a scaled loss."""

from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.errors import UsageError
from lowbit.inputs.checks import check_fields, is_finite

Width = Literal["bf16", "fp16"]

_DTYPES: dict[Width, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LossScaling:
    """The loss is multiplied by S before the backward, and gradients are divided by S in float32 before the update.

    If a gradient is not finite, the step is skipped and S is multiplied by `backoff`. After `interval` steps in a row
    without that, S is multiplied by `growth`.

    Args:
        start: S of the first step.
        growth: above 1.
        backoff: between 0 and 1.
        interval: steps.
        minimum: training ends where S falls below it.

    Source: Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740; the defaults are those of
        `torch.amp.GradScaler`, which has no minimum.
    """

    start: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    minimum: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        numbers = (self.start, self.growth, self.backoff, self.minimum)
        if not all(map(is_finite, numbers)) or not 0 < self.minimum <= self.start:
            raise UsageError(
                f"scaling: minimum={self.minimum}, start={self.start}: give finite numbers, 0 < minimum <= start"
            )
        if not 0 < self.backoff < 1 < self.growth or self.interval < 1:
            raise UsageError(
                f"scaling: growth={self.growth}, backoff={self.backoff}, interval={self.interval}: give a growth above "
                "1, a backoff between 0 and 1, and 1 step or more"
            )


@dataclass(frozen=True, kw_only=True)
class Autocast:
    """Forward and loss run in torch's autocast: products give this type, and torch chooses that of other operations.

    Args:
        dtype: the 16-bit type.
        scaling: how the loss is scaled; None: it is not.
    """

    dtype: Width
    scaling: LossScaling | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        return _DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} autocast" + ("" if self.scaling is None else " with a scaled loss")
