"""What torch's operators multiply, from their arguments and result: one formula for each kind.

One fused multiply-add is one multiply-accumulate (MAC). Operators are known by name, so that a torch
that lacks some of them works.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.products.operators import Convolution, Linear, Matmul, Op

Arguments = Mapping[str, Any]


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
        counted: multiply-accumulates of one, where they do not follow from the operator and the shapes.
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


Formula = Callable[[Arguments, Any], list[Multiplication]]


def total_macs(found: Sequence[Multiplication]) -> int:
    """Multiply-accumulates of all of them."""
    return sum(what.macs * what.times for what in found)


def multiplication(
    op: Op,
    a: Tensor,
    b: Tensor,
    output: Sequence[int],
    *,
    shapes: tuple[Sequence[int], Sequence[int]] | None = None,
    needs: tuple[bool, bool] | None = None,
    bits: tuple[int, int] | None = None,
    times: int = 1,
    counted: int | None = None,
) -> Multiplication:
    """The product of two tensors; `shapes` gives theirs if they are not multiplied as they are."""
    first, second = (a.shape, b.shape) if shapes is None else shapes
    return Multiplication(
        op=op,
        input=torch.Size(first),
        weight=torch.Size(second),
        output=torch.Size(output),
        bits=(8 * a.element_size(), 8 * b.element_size()) if bits is None else bits,
        needs=(a.requires_grad, b.requires_grad) if needs is None else needs,
        times=times,
        counted=counted,
    )


def _matmul(first: str, second: str) -> Formula:
    """An operator whose factors, ``(..., M, K)`` and ``(..., K, N)``, are arguments of these names."""

    def found(args: Arguments, _: Any) -> list[Multiplication]:
        a, b = args[first], args[second]
        return [multiplication(Matmul(), a, b, (*a.shape[:-1], b.shape[-1]))]

    return found


def _scaled(args: Arguments, _: Any) -> list[Multiplication]:
    """Floats of 8 bits or fewer, ``(M, K)`` and ``(K, N)``; of 4 bits a byte holds two of them along K."""
    a, b = args["self"], args["mat2"]
    pair = 2 if a.dtype == getattr(torch, "float4_e2m1fn_x2", None) else 1
    shapes = (a.shape[0], pair * a.shape[1]), (pair * b.shape[0], b.shape[1])
    bits = 8 * a.element_size() // pair, 8 * b.element_size() // pair
    return [multiplication(Matmul(), a, b, (a.shape[0], b.shape[1]), shapes=shapes, bits=bits)]


def _grouped(args: Arguments, _: Any) -> list[Multiplication]:
    """Each group's rows, or its part of what is summed, with that group's matrix; every row is in a group.

    One factor is cut into groups along an axis, so that together they multiply as one matrix. If both factors have an
    axis of groups, it is a batched product.
    """
    a, b = args["self"], args["mat2"]
    groups = (a.shape[0],) if a.dim() == b.dim() == 3 else ()
    return [multiplication(Matmul(), a, b, (*groups, a.shape[-2], b.shape[-1]))]


def _pairs(args: Arguments, _: Any) -> list[Multiplication]:
    """Lists of matrices, multiplied pair by pair."""
    pairs = zip(args["self"], args["mat2"], strict=True)
    return [multiplication(Matmul(), a, b, (*a.shape[:-1], b.shape[-1])) for a, b in pairs]


def _linear(first: str, second: str) -> Formula:
    """``(..., K)`` with a weight ``(N, K)``."""

    def found(args: Arguments, out: Tensor) -> list[Multiplication]:
        return [multiplication(Linear(), args[first], args[second], out.shape)]

    return found


def _packed(args: Arguments, out: Tensor) -> list[Multiplication]:
    """``(..., K)`` with a weight of 4 bits whose own shape is that of its memory."""
    x, w = list(args.values())[:2]
    k, bits = x.shape[-1], (8 * x.element_size(), 4)
    return [multiplication(Linear(), x, w, out.shape, shapes=(x.shape, (out.shape[-1], k)), bits=bits)]


def _vector(first: str, second: str) -> Formula:
    """A matrix ``(M, K)`` or vector ``(K,)`` times a vector."""

    def found(args: Arguments, _: Any) -> list[Multiplication]:
        a, b = args[first], args[second]
        rows = a.shape[0] if a.dim() == 2 else 1
        shapes = (rows, a.shape[-1]), (b.shape[0], 1)
        return [multiplication(Matmul(), a, b, (rows, 1), shapes=shapes)]

    return found


def _outer(args: Arguments, out: Tensor) -> list[Multiplication]:
    a, b = args["vec1"], args["vec2"]
    return [multiplication(Matmul(), a, b, out.shape, shapes=((a.shape[0], 1), (1, b.shape[0])))]


def _convolution(transposed: bool = False) -> Formula:
    """Any operator of a convolution."""

    def found(args: Arguments, out: Tensor) -> list[Multiplication]:
        x, w = next(iter(args.values())), args["weight"]
        return [multiplication(_window(args, transposed), x, w, out.shape)]

    return found


def _window(args: Arguments, transposed: bool = False) -> Convolution:
    """The convolution that an operator's arguments describe."""
    axes = args["weight"].dim() - 2

    def each(name: str, default: int) -> tuple[int, ...]:
        values = args.get(name) or [default]
        return tuple(values) if len(values) == axes else tuple(values) * axes

    return Convolution(
        stride=each("stride", 1),
        padding=each("padding", 0),
        dilation=each("dilation", 1),
        groups=args.get("groups", 1),
        transposed=args.get("transposed", transposed),
        output_padding=each("output_padding", 0),
    )


def _time_first(args: Arguments, out: Tensor) -> list[Multiplication]:
    """A convolution of ``(T, B, C)`` with a weight ``(taps, C, O)``."""
    x, w = args["self"], args["weight"]
    return [multiplication(Matmul(), x, w, out.shape, counted=out.numel() * math.prod(w.shape[:2]))]


def _distances(args: Arguments, out: Tensor) -> list[Multiplication]:
    """``|x - y|`` of all pairs by one product: the squares are two more columns of each factor."""
    x, y = args["x1"], args["x2"]
    return [multiplication(Matmul(), x, y, out.shape, counted=out.numel() * (x.shape[-1] + 2))]


def _attention(args: Arguments, _: Any) -> list[Multiplication]:
    """Queries times keys, and their softmax times values; a fused backward computes the scores once more."""
    q, k, v = list(args.values())[:3]
    scores = (*q.shape[:-1], k.shape[-2])
    keys = (*k.shape[:-2], k.shape[-1], k.shape[-2])
    return [
        multiplication(Matmul(), q, k, scores, shapes=(q.shape, keys)),
        multiplication(
            Matmul(),
            q,
            v,
            (*q.shape[:-1], v.shape[-1]),
            shapes=(scores, v.shape),
            needs=(q.requires_grad or k.requires_grad, v.requires_grad),
        ),
    ]


def _recurrent(args: Arguments, _: Any) -> list[Multiplication]:
    """One layer and direction of the fused LSTM of oneDNN: the input product of all steps, a recurrent one of each."""
    x, w_input, w_recurrent = list(args.values())[:3]
    steps, samples, gates = x.shape[0], x.shape[1], w_input.shape[0]
    hidden = (samples, w_recurrent.shape[1])
    learned = x.requires_grad or w_input.requires_grad or w_recurrent.requires_grad
    return [
        multiplication(Linear(), x, w_input, (*x.shape[:-1], gates)),
        multiplication(
            Linear(),
            x,
            w_recurrent,
            (samples, gates),
            shapes=(hidden, w_recurrent.shape),
            needs=(learned, w_recurrent.requires_grad),
            times=steps,
        ),
    ]


def _recurrent_of_all(args: Arguments, _: Any) -> list[Multiplication]:
    """All layers and directions of a fused RNN: each weight matrix multiplies a row for every step and sample."""
    x, matrices = args["input"], [w for w in args["weight"] if w.dim() == 2]
    rows = x.shape[:-1].numel()
    learned = x.requires_grad or any(w.requires_grad for w in matrices)
    return [
        multiplication(
            Linear(), x, w, (rows, w.shape[0]), shapes=((rows, w.shape[1]), w.shape), needs=(learned, w.requires_grad)
        )
        for w in matrices
    ]


def named(text: str, namespace: str = "aten") -> list[str]:
    """The operators of these names, with their namespace."""
    return [f"{namespace}::{name}" for name in text.split()]


# Operators of the forward pass and what they multiply, from their arguments and result. An operator in place, such as
# addmm_, is known by its name without the underscore.
FORWARD: dict[str, Formula] = {
    "aten::linear": _linear("input", "weight"),
    "aten::mm": _matmul("self", "mat2"),
    "aten::bmm": _matmul("self", "mat2"),
    "aten::addmm": _matmul("mat1", "mat2"),
    "aten::_addmm_activation": _matmul("mat1", "mat2"),
    "aten::baddbmm": _matmul("batch1", "batch2"),
    "aten::addbmm": _matmul("batch1", "batch2"),
    "aten::_int_mm": _matmul("self", "mat2"),
    **dict.fromkeys(named("_scaled_mm _scaled_mm_v2"), _scaled),
    **dict.fromkeys(named("_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"), _grouped),
    "aten::_foreach_mm": _pairs,
    "aten::_weight_int8pack_mm": _linear("self", "mat2"),
    **dict.fromkeys(
        named(
            "_weight_int4pack_mm _weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros "
            "_dyn_quant_matmul_4bit"
        ),
        _packed,
    ),
    "aten::mv": _vector("self", "vec"),
    "aten::addmv": _vector("mat", "vec"),
    "aten::dot": _vector("self", "tensor"),
    "aten::vdot": _vector("self", "other"),
    "aten::addr": _outer,
    **dict.fromkeys(
        named(
            "convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution "
            "cudnn_convolution_relu cudnn_convolution_add_relu miopen_convolution miopen_convolution_relu "
            "miopen_convolution_add_relu miopen_depthwise_convolution _conv_depthwise2d conv_depthwise3d "
            "_slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d "
            "_nnpack_spatial_convolution _mps_convolution"
        ),
        _convolution(),
    ),
    **dict.fromkeys(
        named(
            "cudnn_convolution_transpose miopen_convolution_transpose _mps_convolution_transpose "
            "slow_conv_transpose2d slow_conv_transpose3d"
        ),
        _convolution(transposed=True),
    ),
    "aten::conv_tbc": _time_first,
    "aten::_euclidean_dist": _distances,
    **dict.fromkeys(
        named(
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
            "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps "
            "_triton_scaled_dot_attention"
        ),
        _attention,
    ),
    "aten::mkldnn_rnn_layer": _recurrent,
    **dict.fromkeys(named("_cudnn_rnn miopen_rnn"), _recurrent_of_all),
}


def _backward_of_convolution(args: Arguments) -> int:
    """One product like the forward's for the input, one for the weight."""
    x, w, g = args["input"] if "input" in args else args["self"], args["weight"], args["grad_output"]
    return int(sum(args["output_mask"][:2])) * _window(args).macs(x.shape, w.shape, g.shape)


def _backward_of_attention(args: Arguments) -> int:
    """Three products over the width of queries and two over that of values, for every pair of positions."""
    q, k, v = args["query"], args["key"], args["value"]
    return int(q.shape[:-1].numel() * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1]))


def _backward_of_layer(args: Arguments) -> int:
    """Twice the forward."""
    return 2 * total_macs(_recurrent(args, None))


def _backward_of_all(args: Arguments) -> int:
    """The forward once for the input and the states, and once for the weights."""
    mask = args["output_mask"]
    return (any(mask[:3]) + bool(mask[3])) * total_macs(_recurrent_of_all(args, None))


# Operators of the backward pass, and their MACs from their arguments.
BACKWARD: dict[str, Callable[[Arguments], int]] = {
    **dict.fromkeys(
        named("convolution_backward convolution_backward_overrideable _slow_conv2d_backward"),
        _backward_of_convolution,
    ),
    **dict.fromkeys(
        named(
            "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward "
            "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward "
            "_scaled_dot_product_fused_attention_overrideable_backward"
        ),
        _backward_of_attention,
    ),
    "aten::mkldnn_rnn_layer_backward": _backward_of_layer,
    **dict.fromkeys(named("_cudnn_rnn_backward miopen_rnn_backward"), _backward_of_all),
}
