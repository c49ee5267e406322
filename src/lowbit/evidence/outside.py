"""Products outside converted layers: which torch operators multiply, and how much.

`lowbit.verify` lists them as they are dispatched, forward and backward; `lowbit.Meter` counts those of the forward
pass and what their backward will be.

Every operator of torch whose name looks like a product (`LOOKS_LIKE_A_PRODUCT`) is in one of four groups: those in
`FORWARD` and `BACKWARD` have a formula, those in `UNCOUNTED` are listed without a count, composite ones are seen as the
operators they call, and `NO_PRODUCTS` says why the rest are not products.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lowbit.evidence.formulas import BACKWARD, FORWARD, Arguments, Multiplication, multiplication, named, total_macs
from lowbit.products.operators import Matmul

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

# Operators that multiply, but whose MACs do not follow from shapes, or that few people meet: listed without a count.
UNCOUNTED = frozenset(
    [
        *named("_transformer_encoder_layer_fwd _native_multi_head_attention _triton_multi_head_attention"),
        *named("_trilinear _cdist_forward _cdist_backward _pdist_forward _pdist_backward"),
        # Attention of sequences of several lengths.
        *named("_flash_attention_forward _flash_attention_forward_no_dropout_inplace _flash_attention_backward"),
        *named("_efficient_attention_forward _efficient_attention_backward"),
        *named("_cudnn_attention_forward _cudnn_attention_backward"),
        # Sparse factors.
        *named("_sparse_addmm _sparse_mm_reduce_impl _sparse_mm_reduce_impl_backward _sparse_sparse_matmul hspmm"),
        *named("_sparse_semi_structured_addmm _sparse_semi_structured_linear _sparse_semi_structured_mm"),
        *named("_cslt_sparse_mm _cslt_sparse_mm_search sparse_sampled_addmm sspaddmm"),
        *named("_triton_bsr_dense_mm_out _triton_bsr_dense_addmm_out", "triton"),
        # Packed or opaque weights.
        *named("_mixed_dtypes_linear mkldnn_linear mkldnn_linear_backward mkldnn_linear_backward_input"),
        *named("mkldnn_linear_backward_weights quantized_gru quantized_lstm"),
        *named("_wrapped_quantized_linear_prepacked fbgemm_linear_fp16_weight fbgemm_linear_int8_weight"),
        *named("fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight_fp32_activation"),
        *named("_convolution_pointwise _convolution_transpose_pointwise _linear_pointwise", "mkldnn"),
        *named("_mkl_linear", "mkl"),
        *named("conv2d_run", "mkldnn_prepacked"),
        *named("conv2d_clamp_run conv2d_transpose_clamp_run linear_clamp_run", "prepacked"),
        *named("_mm_plus_mm", "inductor"),
        *named("qconv_pointwise qconv1d_pointwise qconv2d_pointwise qconv3d_pointwise qlinear_pointwise", "onednn"),
        *named("linear_dynamic_fp16 linear_relu_dynamic_fp16", "onednn"),
        *named("qlinear qlinear_dynamic qlinear_relu qlinear_relu_dynamic", "sparse"),
        *named("conv2d conv2d_relu conv3d conv3d_relu conv_transpose1d conv_transpose2d linear", "_quantized"),
        *named("linear_dynamic wrapped_quantized_linear wrapped_fbgemm_linear_fp16_weight", "_quantized"),
        *named("_wrapped_quantized_linear_prepacked", "_quantized"),
        *named("conv1d conv1d_dynamic conv1d_relu conv2d conv2d_add conv2d_add_relu conv2d_dynamic", "quantized"),
        *named("conv2d_relu conv3d conv3d_dynamic conv3d_relu conv_transpose1d conv_transpose2d", "quantized"),
        *named("conv_transpose3d conv_transpose1d_dynamic conv_transpose2d_dynamic matmul", "quantized"),
        *named("conv_transpose3d_dynamic int4mm_packed_weight_cpu linear linear_dynamic", "quantized"),
        *named("linear_dynamic_fp16 linear_dynamic_fp16_unpacked_weight linear_leaky_relu linear_relu", "quantized"),
        *named("linear_relu_dynamic linear_relu_dynamic_fp16 linear_tanh quantized_gru_cell_dynamic", "quantized"),
        *named("quantized_lstm_cell_dynamic quantized_rnn_relu_cell_dynamic", "quantized"),
        *named("quantized_rnn_tanh_cell_dynamic", "quantized"),
        *named("linear_with_input_q_dq_qweight_dq_output_fp32", "quantized"),
        *named("linear_with_input_q_dq_qweight_dq_relu_output_fp32", "quantized"),
        # Other devices, nested tensors, several processes.
        *named("linear_backward matmul_backward _lstm_mps lstm_mps_backward"),
        *named("mps_convolution_backward mps_convolution_transpose_backward"),
        *named("_async_input_mm fused_all_gather_matmul fused_matmul_reduce_scatter", "symm_mem"),
        *named("fused_all_gather_scaled_matmul fused_scaled_matmul_reduce_scatter", "symm_mem"),
        # Operators of another library.
        *named("deform_conv2d _deform_conv2d_backward", "torchvision"),
    ]
)

LOOKS_LIKE_A_PRODUCT = re.compile(
    r"mm(?!a|i|etric)|matmul|gemm|conv(?!ert)|linear|attention|attn|rnn|lstm|gru(?!l)|dot|addr|mv(?!l)|einsum|dist(?!rib)|inner|"
    r"outer|(^|_)ger$|kron|transformer|multi_head|matrix|linalg|chol|inverse|solve|svd|(^|_)qr(?!oi)|(?<!w)eig|(^|_)lu_|lstsq|"
    r"geqrf|orgqr|ormqr|(^|_)det$|correlat"
)

# Why operators that look like a product are not one, by patterns of whole names.
NO_PRODUCTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"lowbit::attention_(forward|backward)"),
        "attention in a recipe's formats, whose products the call itself counts and shows",
    ),
    (
        re.compile(
            r"aten::_?linalg_(check_errors|_powsum|cholesky_ex|cross|det|eigh?|eigvals|householder_product|inv_ex|ldl_solve|"
            r"ldl_factor_ex|lstsq|lu|lu_factor_ex|lu_solve|matrix_exp|matrix_sqrth|pinv|polar|qr|slogdet|solve_ex|"
            r"solve_triangular|svd|vector_norm)|prims::svd|aten::(_compute_linear_combination|_spsolve|\w*cholesky\w*|"
            r"geqrf|lu_unpack|ormqr|qr|slice_inverse|triangular_solve)"
        ),
        "a function, a decomposition or a norm of one matrix, or a solution of equations: no layer is made of them",
    ),
    (re.compile(r"\w+::\w*(prepack|unpack|_reorder_\w+|pack_gemm|flatten_weight)(_\w+)?"), "packs weights"),
    (re.compile(r"\w+::\w*upsample_\w*linear\w*"), "interpolates"),
    (re.compile(r"aten::_thnn_\w+"), "the gates of a recurrent cell, element by element"),
    (re.compile(r"aten::dist"), "the norm of a difference"),
    (re.compile(r"_native::\w+"), "a kernel behind an operator of aten, which is seen itself"),
    (re.compile(r"export::\w+|aten::_nested_get_jagged_dummy"), "takes tensors apart"),
)


def why_no_product(name: str) -> str:
    """Why an operator does not multiply although its name looks like it; empty if nothing is known."""
    return next((why for pattern, why in NO_PRODUCTS if pattern.fullmatch(name)), "")


def is_composite(name: str) -> bool:
    """Whether an operator, named with its overload, calls others on dense tensors, which are then seen in its place."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def name_of(func: Any) -> str:
    """The operator's name without its overload and the underscore of in-place ones, e.g. ``"aten::addmm"``."""
    name: str = func._schema.name
    return name.rstrip("_")


def arrives_whole(func: Any) -> bool:
    """Whether a dispatch mode is shown a composite operator in place of its parts, as happens in inference mode."""
    return torch.is_inference_mode_enabled() and is_composite(func.name()) and name_of(func) not in FORWARD


def call_parts(func: Any, args: Sequence[Any], kwargs: Arguments) -> Any:
    """Execute a composite operator that arrived whole, so that an active mode sees its parts."""
    return func._op_dk(_COMPOSITE, *args, **kwargs)


def multiplies(func: Any) -> bool:
    """Whether an operator multiplies: counted or not."""
    name = name_of(func)
    return name in FORWARD or name in BACKWARD or name in UNCOUNTED or func._overloadpacket in flop_registry


def multiplications(func: Any, args: Sequence[Any], kwargs: Arguments, out: Any) -> list[Multiplication] | None:
    """What an operator of the forward pass multiplies; None if it does not multiply, or if no formula is known.

    Args:
        func: the operator, e.g. ``torch.ops.aten.mm.default``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: its result.
    """
    name = name_of(func)
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    if name in BACKWARD or name in UNCOUNTED or any(t.layout != torch.strided for t in tensors):
        return None
    if name in FORWARD:
        return FORWARD[name](_by_name(func, args, kwargs), out)
    out = out if isinstance(out, Tensor) else next(iter(out), None) if isinstance(out, tuple) else None
    if func._overloadpacket not in flop_registry or len(tensors) < 2 or not isinstance(out, Tensor):
        return None
    counted = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2
    return [multiplication(Matmul(), tensors[0], tensors[1], out.shape, counted=counted)]


def macs(func: Any, args: Sequence[Any], kwargs: Arguments, out: Any) -> int | None:
    """Multiply-accumulates of an operator that multiplies, forward or backward; None if there is no formula."""
    name = name_of(func)
    if name in BACKWARD:
        return BACKWARD[name](_by_name(func, args, kwargs))
    found = multiplications(func, args, kwargs, out)
    return None if found is None else total_macs(found)


def _by_name(func: Any, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """All arguments in the order of the schema, those that were left out at their defaults."""
    rest = {a.name: kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :]}
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | rest
