"""Attention that functions of torch ask for, computed in the formats that a recipe has for it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import functional
from lowbit.methods.recipe import Recipe
from lowbit.nn.calls.products import Settings
from lowbit.products.operators import Matmul

FUNCTION: Any = F.scaled_dot_product_attention
OPERATOR = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Attention(Matmul):
    """The products of attention, which `lowbit.functional.attention` computes as one."""

    kind: str = field(default="attention", init=False)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What a call of torch's function asks for."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None

    def compute(self, settings: Settings) -> Tensor:
        """The function's result."""
        return functional.attention(
            self.query,
            self.key,
            self.value,
            self.mask,
            causal=self.causal,
            dropout=self.dropout,
            scale=self.scale,
            setting=settings(self.query),
        )


def read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended | None:
    """What the arguments of torch's function ask for; None where torch must answer, with its own error or by copies."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) >= 2 or q[:-3] != k[:-3] or k[:-1] != v[:-1] or q[-1] != k[-1]:
        return None
    if len(q) > 2 and q[-3] != k[-3] and not (enable_gqa and k[-3] and q[-3] % k[-3] == 0):
        return None
    if (attn_mask is not None and is_causal) or not 0 <= dropout_p < 1:
        return None
    if attn_mask is not None and not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        return None
    return Attended(query=query, key=key, value=value, mask=attn_mask, dropout=dropout_p, causal=is_causal, scale=scale)


def has_formats(recipe: Recipe | None) -> bool:
    """Whether a recipe says how attention is computed."""
    return recipe is not None and recipe.attention is not None
