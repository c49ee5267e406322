"""The native kernels of attention: which calls they take, and how they are called."""

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.attention.definition import Call
from lowbit.engines.int8 import missing
from lowbit.kernels import operators
from lowbit.methods.attention import Attention
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import BF16, Format
from lowbit.numerics.parts import Listed, unlisted
from lowbit.numerics.scales import Float32, MinMax, Scale
from lowbit.numerics.transforms import NoTransform

# The positions of a tile.
TILE = 64

# The formats that the kernel computes in full; any other is refused.
_TAKEN: Listed = {
    Format: {"rounding": ("nearest",)},
    Integer: {"bits": range(2, 9), "zero": ("symmetric",)},
    Scale: {"granularity": ("kept-channel",), "running_start": ("first", "zero"), "floor": (0.0,)},
    MinMax: {},
    Float32: {},
    NoTransform: {},
}
_SHARES: Listed = {**_TAKEN, Integer: {"bits": range(2, 9), "zero": ("symmetric", "integer")}}


@lru_cache(maxsize=256)
def refusal(formats: Attention) -> str:
    """Why the kernel does not compute attention in these formats on this machine; empty if it does."""
    if formats.tile != TILE:
        return f"tiles of {formats.tile} positions: its tiles have {TILE}"
    for name in ("q", "k", "p", "v", "grad_output", "ds"):
        if why := unlisted(getattr(formats, name), _SHARES if name == "p" else _TAKEN):
            return f"{name}: {why}"
    if formats.dp != BF16:
        return f"dp: {formats.dp} has no kernel here, only bf16"
    return missing("int8") or missing("bf16")


def takes(q: Tensor, call: Call) -> bool:
    """Whether the kernel computes this call: memory and types, a mask without a gradient, noise with words."""
    if not q.is_cpu or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    if call.mask is not None and call.mask.requires_grad:
        return False
    return not call.dropout or call.noise is None or call.noise.words("attention", "dropout") is not None


def _flat(x: Tensor) -> tuple[Tensor, list[int]]:
    """The memory of a tensor (B, H, length, size) from its first number on, and the steps of its first three axes."""
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return _memory(x), list(x.stride()[:3])


def _memory(x: Tensor) -> Tensor:
    """One axis from the first number of a tensor to its last."""
    if not x.numel():
        return x.new_empty(0)
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach,), (1,))


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, list[int]]:
    """The memory of a mask, as bytes where it is boolean, and its four steps."""
    if mask is None:
        return None, [0, 0, 0, 0]
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    elif mask.dtype not in (torch.float32, torch.bfloat16):
        mask = mask.float()
    wide = mask.expand(shape)
    return _memory(wide), list(wide.stride())


def _arguments(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[object, ...]:
    """What both operators take first."""
    f = call.formats
    words = call.noise_of("dropout").words("attention", "dropout") if call.dropout else None
    sizes = [q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]]
    levels = [float(fmt.code_range[1]) for fmt in (f.q, f.k, f.p, f.v, f.grad_output, f.ds)]
    mask = _mask(call.mask, (*q.shape[:3], k.shape[2]))
    flags = call.scale, call.causal, f.smooth_k, call.dropout, None if words is None else list(words)
    return (*_flat(q), *_flat(k), *_flat(v), *mask, sizes, levels, *flags)


def _like_torch(x: Tensor, width: int) -> Tensor:
    """Memory for (B, H, length, width) as (B, length, H, width), so that heads are joined without a copy."""
    batch, heads, length, _ = x.shape
    return x.new_empty((batch, length, heads, width)).transpose(1, 2)


class Native:
    """The kernels as an engine."""

    engine = "int8"
    forward_kernel = "lowbit::attention_forward"
    backward_kernel = "lowbit::attention_backward"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The output, in the dtype of `q`, and the log-sum-exp."""
        out = _like_torch(q, v.shape[3])
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
        operators.attention_forward(*_arguments(q, k, v, call), *_flat(out), lse)
        return out, lse

    def backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of q, k and v."""
        dq, dk, dv = (_like_torch(x, x.shape[3]) for x in (q, k, v))
        to = (part for grad in (dq, dk, dv) for part in _flat(grad))
        operators.attention_backward(*_flat(g), *_arguments(q, k, v, call), *_flat(out), lse, *to)
        return dq, dk, dv, None
