"""Quantised multi-head attention: its four projections, and its core where a recipe has formats for attention.

Notation: B samples, L queries, S keys, E embedding, H heads. Elsewhere the products between queries, keys and values
stay in full precision, and so they do where the caller asks for the attention weights; `lowbit.verify` lists them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import functional
from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import SeveralProducts
from lowbit.nn.site import Clock, product_site, runs_eagerly

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
# The site of the products between queries, keys and values.
CORE = "attention"


class QuantMultiheadAttention(SeveralProducts, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose query, key, value and output projections run a recipe.

    The plain layer multiplies by `in_proj_weight` and `out_proj` in one functional call that bypasses its modules.
    This one computes each projection as a separate product, in training and in evaluation.
    """

    plain = nn.MultiheadAttention
    owns_modules = True  # it reads the parameters of the module that holds its output projection

    @classmethod
    def input_channels(cls, layer: Any) -> int:
        """E."""
        return int(layer.embed_dim)

    @property
    def sample_axis(self) -> int:
        """The first axis, or the second, after positions."""
        return 0 if self.batch_first else 1

    def site_names(self) -> list[str]:
        """The four projections."""
        return list(PROJECTIONS)

    def attach(self, *, name: str, recipe: Recipe, clock: Clock, engine: str) -> None:
        """A site for each projection, and one for the core if a phase of the recipe has formats for it."""
        super().attach(name=name, recipe=recipe, clock=clock, engine=engine)
        if any(phase.attention is not None for phase in recipe.in_phases()):
            self.site[CORE] = product_site(name=name, part=CORE, recipe=recipe, clock=clock, engine=engine, leads=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`; `is_causal` only hints at `attn_mask`, which decides."""
        if is_causal and attn_mask is None:
            raise ValueError(f"{self.sites()[0].name}: is_causal is a hint about attn_mask, and attn_mask is missing")
        batched = query.dim() == 3
        q, k, v = (self._as_batch(x, batched) for x in (query, key, value))
        weights, biases = self._in_projections()
        q, k, v = (
            self.product(projection, x, w, b)
            for projection, x, w, b in zip(PROJECTIONS, (q, k, v), weights, biases, strict=False)
        )
        mask = _merged_mask(attn_mask, key_padding_mask, q, k, self.num_heads)
        k, v, mask = self._with_extra_keys(k, v, mask)
        q, k, v = (_split_heads(x, self.num_heads) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        heads, shares = (
            (self._attend(q, k, v, mask, dropout), None)
            if self._has_core() and not need_weights
            else attend(q, k, v, mask=mask, dropout=dropout, need_weights=need_weights)
        )
        out = self.product("out_proj", heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if shares is not None and average_attn_weights:
            shares = shares.mean(1)
        if not batched:
            return out.squeeze(0), None if shares is None else shares.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1).contiguous(), shares

    def _has_core(self) -> bool:
        """Whether the recipe of this phase has formats for the core."""
        return CORE in self.site and self._site(CORE).present.attention is not None

    @runs_eagerly
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """`attend` in the recipe's formats."""
        return functional.attention(q, k, v, mask, dropout=dropout, setting=self._site(CORE).setting_now(q))

    def _as_batch(self, x: Tensor, batched: bool) -> Tensor:
        """The input as (B, length, E)."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _in_projections(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases of q, k and v, however the layer keeps them."""
        if self.in_proj_weight is not None:
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [getattr(self, f"{name}_proj_weight") for name in "qkv"]
        return weights, [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))

    def _with_extra_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with the learned bias and the zero that the layer may add; no mask hides them."""
        batch, embedding = k.shape[0], k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, embedding).to(k.dtype)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, embedding).to(v.dtype)], 1)
            mask = None if mask is None else F.pad(mask, (0, 1))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, length, E) as (B, H, length, E/H)."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; a boolean mask hides where it is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, heads: int) -> Tensor | None:
    """Both masks as one that broadcasts against (B, H, L, S), or None."""
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    mask = None
    if attn_mask is not None:
        allowed = ((length, keys), (batch * heads, length, keys))
        if attn_mask.shape not in allowed:
            raise ValueError(f"attn_mask of shape {tuple(attn_mask.shape)}: expected {allowed[0]} or {allowed[1]}")
        each = (batch, heads) if attn_mask.dim() == 3 else (1, 1)
        mask = _additive(attn_mask, q.dtype).reshape(*each, length, keys)
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
        if padding.shape != (batch, keys):
            raise ValueError(f"key_padding_mask of shape {tuple(padding.shape)}: expected {(batch, keys)}")
        hidden = _additive(padding, q.dtype)[:, None, None, :]
        mask = hidden.expand(batch, 1, length, keys) if mask is None else mask + hidden
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """``softmax(q k^T / sqrt(D) + mask) v`` for ``(B, H, length, D)``, and the softmax if it is needed.

    The softmax is returned after dropout, as torch does.
    """
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    shares = torch.softmax(scores if mask is None else scores + mask, -1)
    shares = F.dropout(shares, dropout) if dropout else shares
    return shares @ v, shares
