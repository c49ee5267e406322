"""The native functions as operators of torch: the one doorway into native code.

A `Native` says of every tensor where it lies, what its numbers are and how many; the native function then checks that
the call stays inside, before it reads or writes anything. Calls raise TypeError for a tensor of another type, in other
memory or with gaps in it, and ValueError for one of another length or one that overlaps what is written.

Each is an operator ``lowbit::name`` too, with a schema and a fake kernel. A call goes through torch's dispatcher where
somebody looks on: a profiler, or a dispatch mode such as `FlopCounterMode`. Otherwise it goes straight to the same
native function, since the dispatcher takes longer than a small product.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowbit.kernels.memory import NOWHERE, TYPES, memory_of

INSTALLED = importlib.util.find_spec("lowbit.kernels._cpu") is not None
_CPU: Any = importlib.import_module("lowbit.kernels._cpu") if INSTALLED else None
_LIBRARY = torch.library.Library("lowbit", "DEF")


def instruction_sets() -> list[str] | None:
    """Instruction sets that native kernels use here, e.g. ``["avx2", "avx512", "avx512vnni"]``; None without them."""
    return list(_CPU.instruction_sets()) if INSTALLED else None


class Native:
    """A native function, which is an operator of torch.

    Args:
        name: of the function and of the operator.
        schema: of the operator, without its name; arguments count as the native function takes them.
    """

    def __init__(self, name: str, schema: str) -> None:
        self._native: Any = getattr(_CPU, name, None)
        _LIBRARY.define(name + schema)
        self.operator = getattr(torch.ops.lowbit, name).default
        arguments = self.operator._schema.arguments
        # The native function takes an address for each tensor, whose name messages say.
        self._tensors = [(i, f"{name}: {a.name}") for i, a in enumerate(arguments) if "Tensor" in str(a.type)]
        _LIBRARY.impl(name, partial(self.__call__, dispatched=True), "CPU")
        # Without values there is nothing to write; the caller made what is written.
        torch.library.register_fake(f"lowbit::{name}", lambda *_: None, lib=_LIBRARY)

    def __call__(self, *arguments: Any, dispatched: bool = False) -> None:
        """Run it.

        Args:
            arguments: those of the schema, in their order.
            dispatched: whether the call comes from torch's dispatcher.
        """
        if not dispatched and (torch.autograd.profiler._is_profiler_enabled or torch._C._len_torch_dispatch_stack()):
            self._dispatch(arguments)
            return
        given = list(arguments)
        for i, name in self._tensors:
            x = arguments[i]
            if x is None:
                given[i] = NOWHERE
                continue
            kind, count = TYPES.get(x.dtype), x.numel()
            dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
            plain = dense and kind is not None and x.is_cpu and not x.is_neg()
            if plain and x.untyped_storage().nbytes() >= (x.storage_offset() + count) * x.element_size():
                given[i] = x.data_ptr(), kind, count
            else:
                given[i] = memory_of(x, name)
        self._native(*given)

    def _dispatch(self, arguments: tuple[Any, ...]) -> None:
        for i, name in self._tensors:  # of others the dispatcher would make something else
            if arguments[i] is not None and (not arguments[i].is_cpu or arguments[i].is_neg()):
                memory_of(arguments[i], name)
        self.operator(*arguments)


_CODES = "Tensor codes, Tensor code_scale, int code_zero"
_STATISTICS = "Tensor? total, Tensor mean, Tensor sigma, Tensor? argmax, Tensor? argmin, Tensor? slopes"
_GRID = "Tensor scale, Tensor? zero, float low, float high, bool offset, int[]? key"
_SIDES = "Tensor lhs, int[] lhs_rows, Tensor rhs, int[] rhs_rows, Tensor(a!) out, int[] place"
_ADDED = "Tensor row_scale, Tensor column_scale, Tensor? bias"

extremes = Native("extremes", "(Tensor x, int[] view, Tensor(a!) lo, Tensor(b!) hi) -> ()")
observe = Native(
    "observe",
    "(Tensor x, int samples, Tensor(a!) running, float momentum, bool first, bool training, Tensor(b!) lo, "
    "Tensor(c!) hi) -> ()",
)
quantize = Native(
    "quantize",
    "(Tensor x, int[] view, bool symmetric, float levels, float floor, int samples, Tensor? lo, Tensor? hi, "
    "int[]? key, int taps, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? zero) -> ()",
)
sums = Native("sums", "(Tensor x, Tensor(a!) sums) -> ()")
row_sums = Native("row_sums", "(Tensor q, int width, Tensor(a!) sums) -> ()")
add_offsets = Native("add_offsets", "(Tensor(a!) y, Tensor u, Tensor o, Tensor t) -> ()")
code_statistics = Native(
    "code_statistics",
    f"({_CODES}, int channels, int[] starts, Tensor slopes, Tensor(a!) total, Tensor(b!) mean, Tensor(c!) sigma, "
    "Tensor(d!) argmax, Tensor(e!) argmin) -> ()",
)
normalize = Native(
    "normalize",
    f"({_CODES}, {_STATISTICS}, float eps, bool narrowest, bool inside, Tensor? gamma, Tensor? beta, bool rectify, "
    "Tensor(a!) d, Tensor(b!) y) -> ()",
)
rectify_backward = Native(
    "rectify_backward",
    f"({_CODES}, {_STATISTICS}, Tensor? gamma, Tensor? beta, Tensor d, int y_type, Tensor g, Tensor(a!) to) -> ()",
)
normalize_backward = Native(
    "normalize_backward",
    f"(Tensor g, Tensor g_scale, int g_zero, {_CODES}, {_STATISTICS}, bool inside, Tensor? gamma, Tensor d, "
    "Tensor(a!) grad_gamma, Tensor(b!) grad_beta, Tensor(c!) dx) -> ()",
)
code_sums = Native("code_sums", "(Tensor a, Tensor? b, Tensor(a!) sums, Tensor(b!) products) -> ()")
affine = Native("affine", "(Tensor q, Tensor a, Tensor b, bool rectify, Tensor(a!) y) -> ()")
encode = Native("encode", f"(Tensor x, int[] view, {_GRID}, int taps, Tensor(a!) codes) -> ()")
encode_blocks = Native(
    "encode_blocks",
    "(Tensor x, int width, int[] block, float levels, float floor, bool floor_power, int[]? key, Tensor(a!) codes, "
    "Tensor(b!) scale) -> ()",
)
hadamard = Native(
    "hadamard", "(Tensor x, int width, bool along, Tensor? signs, int size, float factor, Tensor(a!) y) -> ()"
)
fake_quantize = Native("fake_quantize", f"(Tensor x, int[] view, {_GRID}, Tensor(a!) y) -> ()")
round_bf16 = Native("round_bf16", "(Tensor x, Tensor(a!) y) -> ()")
encode_book = Native(
    "encode_book",
    "(Tensor x, int block, Tensor values, Tensor limits, Tensor starts, int[]? key, Tensor(a!) codes, "
    "Tensor(b!) scales) -> ()",
)
decode_book = Native("decode_book", "(Tensor codes, Tensor scales, int block, Tensor values, Tensor(a!) y) -> ()")
noise = Native("noise", "(int[] key, Tensor(a!) u) -> ()")
multiply_codes = Native("multiply_codes", f"({_SIDES}, {_ADDED}) -> ()")
multiply_halves = Native("multiply_halves", f"({_SIDES}, {_ADDED}) -> ()")
multiply_blocks = Native(
    "multiply_blocks",
    "(Tensor lhs, int[] lhs_rows, Tensor rhs, int[] rhs_rows, Tensor(a!) out, int block, Tensor row_scale, "
    "Tensor column_scale, Tensor? bias) -> ()",
)
_ATTENTION = (
    "Tensor q, int[] q_at, Tensor k, int[] k_at, Tensor v, int[] v_at, Tensor? mask, int[] mask_at, int[] sizes, "
    "float[] levels, float scale, bool causal, bool smooth_k, float dropout, int[]? key"
)
attention_forward = Native("attention_forward", f"({_ATTENTION}, Tensor(a!) out, int[] out_at, Tensor(b!) lse) -> ()")
attention_backward = Native(
    "attention_backward",
    f"(Tensor g, int[] g_at, {_ATTENTION}, Tensor out, int[] out_at, Tensor lse, Tensor(a!) dq, int[] dq_at, "
    "Tensor(b!) dk, int[] dk_at, Tensor(c!) dv, int[] dv_at) -> ()",
)


def _flops(_lhs: object, lhs: Sequence[int], _rhs: object, rhs: Sequence[int], *_: object, **__: object) -> int:
    """Two for each multiply-accumulate: ``2 m n k``, as `torch.utils.flop_counter` counts.

    Args:
        lhs: where the left side lies, as `lowbit.kernels.cpu.multiply` says it.
        rhs: likewise the right side.
    """
    rows, width, window = lhs[1], lhs[2], lhs[7:]
    if window and window[19]:  # transposed: most taps of the larger side reach for nothing
        rows = window[0] * math.prod(window[4:7])
    return 2 * rows * width * rhs[1 if rhs[6] else 2]


for _native in (multiply_codes, multiply_halves, multiply_blocks):
    register_flop_formula(_native.operator.overloadpacket)(_flops)


def _attention_flops(products: tuple[int, int], at: int) -> Callable[..., int]:
    """As torch counts its own attention: so many products over E and over F, of all pairs of positions.

    Args:
        products: how many of either.
        at: which argument has the sizes.
    """

    def flops(*arguments: Any, **_: object) -> int:
        batch, heads, _groups, queries, keys, size, width = arguments[at]
        return int(2 * batch * heads * queries * keys * (products[0] * size + products[1] * width))

    return flops


register_flop_formula(attention_forward.operator.overloadpacket)(_attention_flops((1, 1), 8))
register_flop_formula(attention_backward.operator.overloadpacket)(_attention_flops((3, 2), 10))
