"""Attention as autograd: check the arguments, ask an engine for the seven products, show them, return.

Notation: B samples, H heads of queries, G heads of keys, L queries, S keys, E head size, F size of values.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.attention import definition, native, shown
from lowbit.attention.definition import Call
from lowbit.errors import UsageError
from lowbit.kernels.memory import check_storage, in_memory
from lowbit.methods.recipe import Recipe
from lowbit.products import watch
from lowbit.products.setting import Setting


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    setting: Setting,
) -> Tensor:
    """``softmax(scale q k^T + mask) v``, its seven products in the formats of the recipe's `attention`.

    It takes what `torch.nn.functional.scaled_dot_product_attention` takes, and a query that sees no key gets zeros, as
    there. Beyond that, `causal` and `mask` may go together, and heads of keys may be fewer than those of queries
    without a further flag: query head h sees key head ``h // (H / G)``. No matrix of L x S is kept for the backward:
    it computes the scores again from the log-sum-exp.

    Args:
        q: float ``(..., H, L, E)``; ``(H, L, E)`` and ``(L, E)`` too.
        k: ``(..., G, S, E)`` with as many axes, H a multiple of G.
        v: ``(..., G, S, F)``.
        mask: broadcasts to ``(..., H, L, S)``. Boolean: True where a query sees a key; float: added to the scores.
        causal: whether query i sees the keys 0 to i alone, whatever L and S are.
        dropout: the probability that a share is dropped, from the counter-based noise of the setting.
        scale: the factor of the scores; None: ``1 / sqrt(E)``.
        setting: recipe, noise, engine. Its `bits` are those of layers: attention has constant bits.

    Returns:
        ``(..., H, L, F)``, in the dtype of `q`, or autocast's; its memory is that of ``(..., L, H, F)``.

    Raises:
        UsageError: the recipe says nothing of attention, or `dropout` is not in [0, 1).
        TypeError: dtypes are not floating point or differ outside autocast, or a mask is neither boolean nor float.
        RuntimeError: shapes that do not fit, or a backward with ``create_graph=True``.
        ValueError: there is no noise for dropout or for a format that rounds stochastically.
    """
    name = setting.layer or "attention"
    formats = setting.recipe.attention
    if formats is None:
        raise UsageError(
            f"{name}: recipe {setting.recipe.name!r} says nothing of attention: give one with [attention], e.g. "
            "'int8-attention'"
        )
    if not 0 <= dropout < 1:
        raise UsageError(f"{name}: dropout={dropout}: a probability from 0 to below 1")
    _check(name, q, k, v, mask)
    device = "cpu" if q.is_meta else q.device.type
    autocast = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else q.dtype
    q, k, v = (in_memory(t.to(dtype)) for t in (q, k, v))
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (_with_four_axes(t) for t in (q, k, v))
    call = Call(
        formats=formats,
        scale=1 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        causal=causal,
        dropout=float(dropout),
        mask=None if mask is None else _with_four_axes_of_mask(in_memory(mask), shape),
        noise=setting.noise,
        layer=name,
    )
    with torch.autocast(device, enabled=False):
        result: Tensor = _Attention.apply(q, k, v, call.mask, call, setting)
    return result.reshape(shape) if len(shape) != 4 else result


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise where dtypes, devices or shapes do not fit together."""
    autocast = torch.is_autocast_enabled("cpu" if q.is_meta else q.device.type)
    for what, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: {what} is {x.dtype}: give a floating-point tensor")
        if x.dtype != q.dtype and not autocast:
            raise TypeError(f"{name}: q is {q.dtype} and {what} is {x.dtype}: give one dtype, or use autocast")
        if x.device != q.device:
            raise RuntimeError(f"{name}: q is on {q.device} and {what} on {x.device}: give them on one device")
        check_storage(x, f"{name}: {what}")
    dim = q.dim()
    fits = dim >= 2 and k.dim() == v.dim() == dim
    fits = fits and q.shape[-1] == k.shape[-1] and k.shape[:-1] == v.shape[:-1] and q.shape[:-3] == k.shape[:-3]
    if dim >= 3:
        heads, groups = q.shape[-3], k.shape[-3]
        fits = fits and (heads == groups if not groups else heads % groups == 0)
    if not fits:
        raise RuntimeError(
            f"{name} cannot multiply q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: give "
            "(..., H, L, E), (..., G, S, E) and (..., G, S, F) with the same leading axes and H a multiple of G"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: the mask is {mask.dtype}: give a boolean or a floating-point tensor")
    wanted = (*q.shape[:-1], k.shape[-2])
    try:
        fits = torch.broadcast_shapes(mask.shape, wanted) == torch.Size(wanted)
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(f"{name}: a mask of shape {tuple(mask.shape)} does not broadcast to {wanted}")


def _with_four_axes(x: Tensor) -> Tensor:
    """(..., heads, length, size) as (B, heads, length, size)."""
    if x.dim() == 4:
        return x
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)


def _with_four_axes_of_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts against (B, H, L, S) where it did so against `shape`, that of the output."""
    if mask.dim() <= 4:
        return mask[(None,) * (4 - mask.dim())]
    lead = (*shape[:-3], *mask.shape[-3:]) if any(n > 1 for n in mask.shape[:-3]) else mask.shape
    return mask.expand(lead).flatten(0, -4)


class Engine(Protocol):
    """What computes attention: forward and backward, and how proofs name it."""

    engine: str
    forward_kernel: str
    backward_kernel: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The output, in the dtype of `q`, and the log-sum-exp."""

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of q, k, v and of a mask that requires one."""


def refusal(recipe: Recipe, engine: str = "int8") -> str:
    """Why an engine does not compute the attention of a recipe, which then runs on the reference; empty if it does."""
    if recipe.attention is None:
        return f"recipe {recipe.name!r} says nothing of attention"
    if engine == "reference":
        return ""
    return native.refusal(recipe.attention) if engine == "int8" else f"the {engine} engine has no kernel of attention"


def _engine(name: str, q: Tensor, call: Call) -> Engine:
    """What computes a call on the engine that was asked for: that, or the reference where it does not take the call."""
    if name == "int8" and not native.refusal(call.formats) and native.takes(q, call):
        return NATIVE
    return REFERENCE


NATIVE: Engine = native.Native()
REFERENCE: Engine = definition.Reference()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _: Tensor | None,  # the mask of `call`, for its gradient
        call: Call,
        setting: Setting,
    ) -> Tensor:
        ran = _engine(setting.engine, q, call)
        watch.thread.depth += 1
        try:
            out, lse = ran.forward(q, k, v, call)
            shown.forward(setting, call, ran.engine, ran.forward_kernel, q, k, v, out, ctx.needs_input_grad[:3])
        finally:
            watch.thread.depth -= 1
        ctx.call, ctx.setting, ctx.ran = call, setting, ran
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call, setting, ran = ctx.call, ctx.setting, ctx.ran
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{call.layer}: create_graph=True asks for a second derivative, and quantised products have none: "
                "rounding is differentiated once, straight through. Call backward without create_graph"
            )
        q, k, v, out, lse = ctx.saved_tensors
        g = in_memory(g)
        watch.thread.depth += 1
        try:
            with torch.autocast(g.device.type if not g.is_meta else "cpu", enabled=False):
                grads = ran.backward(g, q, k, v, out, lse, call)
                shown.backward(setting, call, ran.engine, ran.backward_kernel, g, q, k, v, out, lse, grads[:3])
        finally:
            watch.thread.depth -= 1
        dmask = grads[3] if grads[3] is None or call.mask is None else grads[3].to(call.mask.dtype)
        return (
            *(grad if needed else None for grad, needed in zip(grads[:3], ctx.needs_input_grad, strict=False)),
            (dmask),
            None,
            None,
        )
