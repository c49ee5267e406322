"""Products outside converted layers: which torch operators multiply, what they multiply, and how much.

`lowbit.verify` lists them as they are dispatched, forward and backward; `lowbit.Meter` counts those of the forward
pass and what their backward will be. One fused multiply-add is one multiply-accumulate (MAC).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lowbit.products import Convolution, Linear, Matmul, Op

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Multiplication:
    """One product of two tensors that a plain operator computes in the forward pass.

    Args:
        op: what is multiplied.
        input: shape of the first factor.
        weight: shape of the second factor.
        output: shape of the result.
        bits: widths of both factors in bits.
        needs: whether the first and the second factor need a gradient, where gradients are recorded.
        times: how often the operator computes it.
        counted: multiply-accumulates of one, where torch's own counter knows the operator and this file does not.
    """

    op: Op
    input: torch.Size
    weight: torch.Size
    output: torch.Size
    bits: tuple[int, int]
    needs: tuple[bool, bool]
    times: int = 1
    counted: int | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one."""
        return self.op.macs(self.input, self.weight, self.output) if self.counted is None else self.counted


def _multiplication(
    op: Op,
    a: Tensor,
    b: Tensor,
    output: Sequence[int],
    *,
    shapes: tuple[Sequence[int], Sequence[int]] | None = None,
    needs: tuple[bool, bool] | None = None,
    times: int = 1,
) -> Multiplication:
    """The product of two tensors, in `shapes` where they are not multiplied as they are."""
    first, second = (a.shape, b.shape) if shapes is None else shapes
    return Multiplication(
        op=op,
        input=torch.Size(first),
        weight=torch.Size(second),
        output=torch.Size(output),
        bits=(8 * a.element_size(), 8 * b.element_size()),
        needs=(a.requires_grad, b.requires_grad) if needs is None else needs,
        times=times,
    )


def _matmul(first: int) -> Callable[[Sequence[Any], Any], list[Multiplication]]:
    """An operator whose factors are the arguments `first` and the next, ``(..., M, K)`` and ``(..., K, N)``."""

    def found(args: Sequence[Any], _: Any) -> list[Multiplication]:
        a, b = args[first], args[first + 1]
        return [_multiplication(Matmul(), a, b, (*a.shape[:-1], b.shape[-1]))]

    return found


def _linear(args: Sequence[Any], out: Tensor) -> list[Multiplication]:
    return [_multiplication(Linear(), args[0], args[1], out.shape)]


def _vector(first: int) -> Callable[[Sequence[Any], Any], list[Multiplication]]:
    """A matrix ``(M, K)`` or vector ``(K,)`` times a vector."""

    def found(args: Sequence[Any], _: Any) -> list[Multiplication]:
        a, b = args[first], args[first + 1]
        rows = a.shape[0] if a.dim() == 2 else 1
        shapes = (rows, a.shape[-1]), (b.shape[0], 1)
        return [_multiplication(Matmul(), a, b, (rows, 1), shapes=shapes)]

    return found


def _outer(args: Sequence[Any], out: Tensor) -> list[Multiplication]:
    _, a, b = args[:3]
    return [_multiplication(Matmul(), a, b, out.shape, shapes=((a.shape[0], 1), (1, b.shape[0])))]


def _convolution(args: Sequence[Any], out: Tensor) -> list[Multiplication]:
    x, w, _, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    axes = w.dim() - 2

    def each(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values) if len(values) == axes else tuple(values) * axes

    op = Convolution(
        stride=each(stride),
        padding=each(padding),
        dilation=each(dilation),
        groups=groups,
        transposed=transposed,
        output_padding=tuple(output_padding),
    )
    return [_multiplication(op, x, w, out.shape)]


def _attention(args: Sequence[Any], _: Any) -> list[Multiplication]:
    """Queries times keys, and their softmax times values; a fused backward computes the scores once more."""
    q, k, v = args[:3]
    scores = (*q.shape[:-1], k.shape[-2])
    keys = (*k.shape[:-2], k.shape[-1], k.shape[-2])
    return [
        _multiplication(Matmul(), q, k, scores, shapes=(q.shape, keys)),
        _multiplication(
            Matmul(),
            q,
            v,
            (*q.shape[:-1], v.shape[-1]),
            shapes=(scores, v.shape),
            needs=(q.requires_grad or k.requires_grad, v.requires_grad),
        ),
    ]


def _recurrent(args: Sequence[Any], _: Any) -> list[Multiplication]:
    """One layer and direction of the fused LSTM of oneDNN: the input product of all steps, a recurrent one of each."""
    x, w_input, w_recurrent = args[:3]
    steps, samples, gates = x.shape[0], x.shape[1], w_input.shape[0]
    hidden = (samples, w_recurrent.shape[1])
    learned = x.requires_grad or w_input.requires_grad or w_recurrent.requires_grad
    return [
        _multiplication(Linear(), x, w_input, (*x.shape[:-1], gates)),
        _multiplication(
            Linear(),
            x,
            w_recurrent,
            (samples, gates),
            shapes=(hidden, w_recurrent.shape),
            needs=(learned, w_recurrent.requires_grad),
            times=steps,
        ),
    ]


# Operators of the forward pass and what they multiply, from their arguments and result.
_FORWARD: dict[Any, Callable[[Sequence[Any], Any], list[Multiplication]]] = {
    _aten.linear: _linear,
    _aten.mm: _matmul(0),
    _aten.bmm: _matmul(0),
    _aten.addmm: _matmul(1),
    _aten._addmm_activation: _matmul(1),
    _aten.baddbmm: _matmul(1),
    _aten.addbmm: _matmul(1),
    _aten.mv: _vector(0),
    _aten.addmv: _vector(1),
    _aten.dot: _vector(0),
    _aten.vdot: _vector(0),
    _aten.addr: _outer,
    _aten.convolution: _convolution,
    _aten.mkldnn_rnn_layer: _recurrent,
    **{
        getattr(_aten, name): _attention
        for name in (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        )
        if hasattr(_aten, name)
    },
}
# Operators that multiply inside and have no formula: listed without a count.
UNCOUNTED = {
    getattr(_aten, name)
    for name in (
        "_transformer_encoder_layer_fwd",
        "_native_multi_head_attention",
        "_int_mm",
        "_trilinear",
        "_cudnn_rnn",
        "_cdist_forward",
    )
    if hasattr(_aten, name)
}


def multiplications(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Multiplication] | None:
    """What an operator of the forward pass multiplies; None for one that does not, or that nobody has a formula for.

    Args:
        packet: the operator, e.g. ``torch.ops.aten.mm``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: its result.
    """
    if packet in _FORWARD:
        return _FORWARD[packet](args, out)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if packet not in flop_registry or len(tensors) < 2 or not isinstance(out, Tensor):
        return None
    a, b = tensors[:2]
    return [
        Multiplication(
            op=Matmul(),
            input=a.shape,
            weight=b.shape,
            output=out.shape,
            bits=(8 * a.element_size(), 8 * b.element_size()),
            needs=(a.requires_grad, b.requires_grad),
            counted=flop_registry[packet](*args, **kwargs, out_val=out) // 2,
        )
    ]
