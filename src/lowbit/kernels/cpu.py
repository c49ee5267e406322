"""The native kernels on torch tensors: the one doorway into native code.

`_memory` says of every tensor where it lies, what its numbers are and how many; the native function then checks that
the call stays inside, before it reads or writes anything. Functions raise TypeError for a tensor of another type, in
other memory or with gaps in it, and ValueError for one of another length or one that overlaps what is written.

Notation: x real value, q code, S scale, z zero point. Views are (outer, channels, inner, channels last): a tensor whose
memory is outer x channels x inner, or with channels last outer x inner x channels.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Types of numbers as native code counts them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 4, torch.int64: 5}

View = tuple[int, int, int, bool]
Memory = tuple[int, int, int]


def _load() -> Any:
    """The native module; None in an install without a compiler."""
    if importlib.util.find_spec("lowbit.kernels._cpu") is None:
        return None
    return importlib.import_module("lowbit.kernels._cpu")


_cpu = _load()


def instruction_sets() -> list[str] | None:
    """Instruction sets that native kernels use here, e.g. ``["avx2", "avx512", "avx512vnni"]``; None without them."""
    return None if _cpu is None else list(_cpu.instruction_sets())


def runs(x: Tensor) -> bool:
    """Whether the native passes over memory take this tensor where it is dense: float32 or bfloat16 on the CPU."""
    stored = x.is_cpu and not x.is_neg() and not x._is_zerotensor()
    return _cpu is not None and stored and x.dtype in (torch.float32, torch.bfloat16)


def _memory(x: Tensor | None, name: str) -> Memory:
    """Where a tensor lies as native code takes it: address, type, how many numbers; of None a type that is none.

    Raises:
        TypeError: it is of a type that native code does not know, is not on the CPU, has gaps or has the negative bit.
        ValueError: its storage was resized below what its shape needs.
    """
    if x is None:
        return 0, -1, 0
    kind = _TYPES.get(x.dtype)
    if kind is None or not x.is_cpu or x.is_neg() or not (x.is_contiguous() or is_channels_last(x)):
        bit = " with the negative bit" if x.is_neg() else ""
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
        raise TypeError(
            f"{name} is {x.dtype}{bit} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}: give a dense "
            f"tensor on the CPU of {known}"
        )
    check_storage(x, name)
    return x.data_ptr(), kind, x.numel()


def check_storage(x: Tensor, name: str) -> None:
    """Raise a ValueError where the memory of a tensor on the CPU ends before its last number: sharding frees it."""
    if not x.is_cpu or x.layout is not torch.strided or not x.numel() or x._is_zerotensor():
        return
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    needed, there = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
    if there < needed:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} needs {needed} bytes, and its storage was resized to {there}: give it "
            "its memory back first"
        )


def in_memory(x: Tensor) -> Tensor:
    """`x` with its numbers in memory as they count: not a negative view, nor a zero tensor, which has no memory."""
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


def all_in_memory(x: Tensor, w: Tensor, bias: Tensor | None, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """`in_memory` of the three tensors of a layer.

    Raises:
        ValueError: the storage of one was resized below what its shape needs.
    """
    for name, t in (("input", x), ("weight", w), ("bias", bias)):
        if t is not None and t.untyped_storage().nbytes() < (t.storage_offset() + t.numel()) * t.element_size():
            check_storage(t, f"{layer}: {name}")  # an expanded tensor has less storage too
    if x.is_neg() or w.is_neg() or x._is_zerotensor() or w._is_zerotensor():
        x, w = in_memory(x), in_memory(w)
    if bias is not None and (bias.is_neg() or bias._is_zerotensor()):
        bias = in_memory(bias)
    return x, w, bias


def _memories(*tensors: Tensor | None, names: tuple[str, ...]) -> list[Memory]:
    """`_memory` of several, which dense tensors on the CPU are told apart from in one place."""
    found = []
    for x, name in zip(tensors, names, strict=True):
        if x is None:
            found.append((0, -1, 0))
        elif x.is_cpu and x.is_contiguous() and not x.is_neg() and x.dtype in _TYPES:
            if x.untyped_storage().nbytes() < (x.storage_offset() + x.numel()) * x.element_size():
                check_storage(x, name)
            found.append((x.data_ptr(), _TYPES[x.dtype], x.numel()))
        else:
            found.append(_memory(x, name))
    return found


def _floats(*shape: int) -> Tensor:
    """Memory that a kernel fills, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def is_channels_last(x: Tensor) -> bool:
    """Whether memory is (B, *size, C) without gaps."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() > 1 and x.movedim(1, -1).is_contiguous()


def memory_view(x: Tensor, view: tuple[int, ...], dims: tuple[int, ...]) -> View | None:
    """(outer, channels, inner, channels last) of x's memory, channels being what has a scale each; None if neither."""
    kept = [d for d in range(len(view)) if d not in dims]
    if kept and kept != list(range(kept[0], kept[-1] + 1)):
        return None
    first, last = (kept[0], kept[-1] + 1) if kept else (0, 0)
    sizes = math.prod(view[:first]), math.prod(view[first:last]), math.prod(view[last:])
    if x.is_contiguous():
        return *sizes, False
    if not kept:
        return (x.shape[0], x.shape[1], math.prod(x.shape[2:]), True) if is_channels_last(x) else None
    return (*sizes, True) if is_channels_last(x) and sizes[:2] == tuple(x.shape[:2]) else None


def extremes(x: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel, float32 ``(channels,)``; nan where a nan is.

    Args:
        x: dense float32 or bfloat16 with at least one element, its memory as `view` says.
        view: see the top of this file.
    """
    lo, hi = _floats(view[1]), _floats(view[1])
    _cpu.extremes(_memory(x, "extremes: x"), view, _memory(lo, "lo"), _memory(hi, "hi"))
    return lo, hi


def observe(
    x: Tensor, samples: int, running: Tensor, *, momentum: float, first: bool, training: bool
) -> tuple[Tensor, Tensor]:
    """`lowbit.numerics.ranges.observed_extremes` in one pass: lo and hi, float32 ``(1,) * x.dim()``.

    Args:
        x: dense float32 or bfloat16 with at least one element, its samples one after the other in memory.
        samples: whose extremes are averaged; 1 for those of the whole tensor.
        running: float32 ``(3,)``, changed in place in training.
        momentum: weight of the old range.
        first: whether the first batch is taken whole.
        training: whether the batch is recorded and used, or what was recorded before.
    """
    shape = (1,) * x.dim()
    lo, hi = _floats(*shape), _floats(*shape)
    _cpu.observe(
        _memory(x, "observe: x"), samples, _memory(running, "observe: running"), momentum, first, training,
        _memory(lo, "lo"), _memory(hi, "hi"),
    )  # fmt: skip
    return lo, hi


def quantize(
    x: Tensor,
    view: View,
    *,
    symmetric: bool,
    floor: float,
    levels: float,
    samples: int | None,
    observed: tuple[Tensor, Tensor] | None = None,
    key: tuple[int, int] | None = None,
    taps: int = 1,
) -> tuple[Tensor, Tensor, int]:
    """Range, grid and codes of a tensor at once.

    Args:
        x: as for `extremes`.
        view: see the top of this file.
        symmetric: int8 codes without a zero point; else uint8 codes with one.
        floor: the smallest scale; 0 replaces only a zero scale, by 1.
        levels: the largest code.
        samples: one grid, whose range is the mean of so many samples' extremes; None: one for each channel.
        observed: float lo and hi in place of those of `x`, one each where there is one grid.
        key: as of `Grid`.
        taps: as for `encode`.

    Returns:
        Codes, flat; their scales, float32 ``(1,)`` or ``(channels,)``; the zero point of the only grid, 0 where the
        range is not finite.

    Raises:
        ValueError: an observed range is not one number, or there is a grid for each channel.
    """
    codes = torch.empty(x.numel(), dtype=torch.int8 if symmetric else torch.uint8, device="cpu")
    scale = torch.empty(view[1] if samples is None else 1, dtype=torch.float32, device="cpu")
    lo, hi = (None, None) if observed is None else (observed[0].float(), observed[1].float())
    if lo is not None and hi is not None and not (lo.numel() == hi.numel() == scale.numel() == 1):
        raise ValueError(f"an observed range of {lo.numel()} numbers for {scale.numel()} grids: give one for one")
    m = _memories(x, lo, hi, codes, scale, names=_QUANTIZE)
    zero: int = _cpu.quantize(m[0], view, (symmetric, levels, floor, samples or 0, m[1], m[2], key), taps, m[3], m[4])
    return codes, scale, zero


_QUANTIZE = ("quantize: x", "quantize: lo", "quantize: hi", "codes", "scale")


def sums(x: Tensor, width: int) -> Tensor:
    """The sum of each column of dense memory of rows of `width` numbers, float32 ``(width,)``."""
    to = _floats(width)
    _cpu.sums(_memory(x, "sums: x"), _memory(to, "sums"))
    return to


@dataclass(frozen=True, kw_only=True)
class Codes:
    """uint8 codes of rows by channels, ``x = (q - zero) * scale``; `scale` is float32 ``(1,)``."""

    q: Tensor
    scale: Tensor
    zero: int

    def arguments(self) -> tuple[Any, ...]:
        """As the native functions take it."""
        return _memory(self.q, "codes"), _memory(self.scale, "scale of codes"), self.zero


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one batch says of each channel of codes in K chunks of rows.

    Args:
        mean: float32 ``(C,)``.
        sigma: float32 ``(C,)``, the sum over chunks of their range times their slope.
        total: int64 ``(C,)``, sums of codes; None, and all below, where mean and sigma were given.
        argmax: int32 ``(K, C)``, the first row of each chunk that has its largest code.
        argmin: likewise of the smallest.
        slopes: float32 ``(K,)``.
    """

    mean: Tensor
    sigma: Tensor
    total: Tensor | None = None
    argmax: Tensor | None = None
    argmin: Tensor | None = None
    slopes: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        """As the native functions take it."""
        return (
            _memory(self.total, "total"), _memory(self.mean, "mean"), _memory(self.sigma, "sigma"),
            _memory(self.argmax, "argmax"), _memory(self.argmin, "argmin"), _memory(self.slopes, "slopes"),
        )  # fmt: skip


def code_statistics(codes: Codes, channels: int, starts: list[int], slopes: Tensor) -> Statistics:
    """Mean and range estimate of each channel, in one pass over memory and a look for the extremes in the cache.

    Args:
        codes: two rows or more by channels.
        channels: numbers in a row.
        starts: the first row of each chunk, then the number of rows.
        slopes: float32 ``(K,)``, the weight of each chunk's range in sigma.
    """
    shape = (len(starts) - 1, channels)
    to = Statistics(
        mean=_floats(channels),
        sigma=_floats(channels),
        total=torch.empty(channels, dtype=torch.int64, device="cpu"),
        argmax=torch.empty(shape, dtype=torch.int32, device="cpu"),
        argmin=torch.empty(shape, dtype=torch.int32, device="cpu"),
        slopes=slopes,
    )
    _cpu.code_statistics(codes.arguments(), channels, starts, to.arguments())
    return to


def normalize(
    codes: Codes,
    stats: Statistics,
    *,
    eps: float,
    narrowest: bool,
    inside: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    rectify: bool,
    y: Tensor,
) -> Tensor:
    """Write ``gamma (x - mean) / d + beta`` of the codes' values into `y`, and return d, float32 ``(C,)``.

    Args:
        codes: rows by channels.
        stats: float32 mean and sigma.
        eps: added to the divisor: ``d = sqrt(sigma**2 + eps)`` or ``sigma + eps``.
        narrowest: whether a sigma of 0 that comes from the codes counts as that of ranges of one step.
        inside: which of them.
        gamma: float32 ``(C,)``, or None for 1.
        beta: float32 ``(C,)``, or None for 0.
        rectify: whether y is to be 0 where it would be less.
        y: float32 or bfloat16 of the memory order of the codes.
    """
    channels = stats.mean.numel()
    d = _floats(channels)
    _cpu.normalize(
        codes.arguments(), stats.arguments(), eps, narrowest, inside, _memory(gamma, "normalize: gamma"),
        _memory(beta, "normalize: beta"), rectify, _memory(d, "d"), _memory(y, "normalize: y"),
    )  # fmt: skip
    return d


def rectify_backward(
    g: Tensor,
    codes: Codes,
    stats: Statistics,
    *,
    gamma: Tensor | None,
    beta: Tensor | None,
    d: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of what `normalize` rectified: `g` where y was more than 0 (or nan), else 0.

    Args:
        g: float32 or bfloat16 of the memory order of the codes.
        codes: as for `normalize`, like the rest.
        stats: what `normalize` got.
        gamma: what it got.
        beta: what it got.
        d: what it returned.
        dtype: of y.
    """
    to = torch.empty_like(g)
    _cpu.rectify_backward(
        codes.arguments(), stats.arguments(), _memory(gamma, "rectify_backward: gamma"),
        _memory(beta, "rectify_backward: beta"), _memory(d, "rectify_backward: d"), _TYPES[dtype],
        _memory(g, "rectify_backward: g"), _memory(to, "rectify_backward: the result"),
    )  # fmt: skip
    return to


def normalize_backward(
    g: Codes, codes: Codes, stats: Statistics, *, inside: bool, gamma: Tensor | None, d: Tensor, dx: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of gamma and beta, float32 ``(C,)``, and that of x into `dx`.

    Args:
        g: codes of the output's gradient.
        codes: as for `normalize`, like the rest.
        stats: what `normalize` got.
        inside: whether eps is under the root.
        gamma: float32 ``(C,)``, or None for 1.
        d: what `normalize` returned.
        dx: float32 or bfloat16 of the memory order of the codes.
    """
    channels = d.numel()
    grad_gamma, grad_beta = _floats(channels), _floats(channels)
    _cpu.normalize_backward(
        g.arguments(), codes.arguments(), stats.arguments(), inside, _memory(gamma, "normalize_backward: gamma"),
        _memory(d, "normalize_backward: d"), _memory(grad_gamma, "grad_gamma"), _memory(grad_beta, "grad_beta"),
        _memory(dx, "normalize_backward: dx"),
    )  # fmt: skip
    return grad_gamma, grad_beta


def code_sums(a: Tensor, b: Tensor | None, channels: int) -> tuple[Tensor, Tensor]:
    """Sums of codes of each channel, int64 ``(channels,)``: of `a`, and of `a` times `b` (zeros without `b`)."""
    total, product = torch.zeros(2, channels, dtype=torch.int64, device="cpu").unbind()
    _cpu.code_sums(
        _memory(a, "code_sums: a"), _memory(b, "code_sums: b"), _memory(total, "sums"), _memory(product, "products")
    )
    return total, product


def affine(q: Tensor, a: Tensor, b: Tensor, y: Tensor) -> None:
    """Write ``a q + b`` of each channel into `y`, float32 or bfloat16, of the memory order of `q`.

    Args:
        q: uint8 codes of rows by channels.
        a: float32 ``(channels,)``.
        b: float32 ``(channels,)``.
        y: as many numbers as `q`.
    """
    _cpu.affine(
        _memory(q, "affine: q"), _memory(a, "affine: a"), _memory(b, "affine: b"), False, _memory(y, "affine: y")
    )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where codes lie: ``q = clamp(round(x / S) + z, low, high)``, with `offset` ``q = round(clamp((x - o) / S))``.

    Args:
        scale: S, float32 contiguous, one or one for each channel.
        zero: z, or o with `offset`; the shape of `scale`, or None for 0.
        low: the smallest code.
        high: the largest code.
        offset: whether `zero` is a float offset.
        key: the two words of the noise field, for stochastic rounding; None rounds to nearest.
    """

    scale: Tensor
    zero: Tensor | None
    low: float
    high: float
    offset: bool = False
    key: tuple[int, int] | None = None

    def arguments(self) -> tuple[Any, ...]:
        """As the native functions take it."""
        low, high = float(self.low), float(self.high)
        return _memory(self.scale, "scale"), _memory(self.zero, "zero"), low, high, self.offset, self.key


def encode(x: Tensor, view: View, grid: Grid, *, signed: bool, taps: int = 1) -> Tensor:
    """Codes as bytes, uint8 or int8, in the memory order of `x`.

    Args:
        x: as for `extremes`.
        view: see the top of this file.
        grid: scales and limits; codes must fit in a byte of the wanted sign.
        signed: whether the bytes are int8.
        taps: more than 1 transposes each record of (channels, taps) numbers to (taps, channels); a record is one
            index of `outer`, or one channel where `outer` is 1 and each channel has a scale.

    Returns:
        A flat tensor of ``x.numel()`` codes.
    """
    codes = torch.empty(x.numel(), dtype=torch.int8 if signed else torch.uint8, device="cpu")
    _cpu.encode(_memory(x, "encode: x"), view, grid.arguments(), taps, _memory(codes, "codes"))
    return codes


def fake_quantize(x: Tensor, view: View, grid: Grid) -> Tensor:
    """The values of the codes in the dtype, shape and memory order of `x`."""
    y = torch.empty_like(x)
    _cpu.fake_quantize(_memory(x, "fake_quantize: x"), view, grid.arguments(), _memory(y, "fake_quantize: the result"))
    return y


def round_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16 of each number, halves to even, float32 in the shape and memory order of `x`.

    Args:
        x: dense float32 on the CPU, its memory in the order of its axes or channels last.
    """
    y = torch.empty_like(x)
    _cpu.round_bf16(_memory(x, "round_bf16: x"), _memory(y, "round_bf16: the result"))
    return y


def noise(count: int, key: tuple[int, int]) -> Tensor:
    """The noise of elements 0 to count - 1, float32, as `lowbit.numerics.rounding.uniform_noise` makes it."""
    u = _floats(count)
    _cpu.noise(*key, _memory(u, "noise"))
    return u


@dataclass(frozen=True, kw_only=True)
class Window:
    """How rows unfold a convolution, always with three spatial axes.

    Args:
        position: batch and sizes of the side that rows count.
        size: of the side that the taps reach for.
        kernel: taps along each axis.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        transposed: False: rows are output positions and taps reach for the input; True the other way.
        channels: numbers at one place, of one group.
    """

    position: tuple[int, int, int, int]
    size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    transposed: bool
    channels: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One side of a product as rows in memory.

    Args:
        data: codes (uint8, int8) or float32 or bfloat16.
        first: number of the element that the first row starts at.
        rows: number of rows.
        width: numbers in a row.
        stride: elements between rows, or with a window between places.
        along: whether a row runs along the index that is summed; else each row is one such index.
        fold: more than 0: row r is at ``r % fold * (rows / fold) + r / fold``.
        zero: the code of a real zero.
        window: how rows are found in a convolution.
    """

    data: Tensor
    first: int = 0
    rows: int
    width: int
    stride: int
    along: bool
    fold: int = 0
    zero: int = 0
    window: Window | None = None


def _numbers(*sides: Rows) -> list[list[int]]:
    """All of sides but their data, as the operators take it; `_places` reads it."""
    found = []
    for side in sides:
        w = side.window
        numbers = [side.first, side.rows, side.width, side.stride, side.fold, side.zero, side.along]
        if w is not None:
            places = (*w.position, *w.size, *w.kernel, *w.stride, *w.padding, *w.dilation)
            numbers += [*places, w.transposed, w.channels]
        found.append(numbers)
    return found


def _places(*sides: list[int]) -> list[tuple[Any, ...]]:
    """Where sides of a product lie, as the native function takes it, from their `_numbers`."""
    found = []
    for first, rows, width, stride, fold, zero, along, *w in sides:
        window = None
        if w:
            window = (w[:4], w[4:7], w[7:10], w[10:13], w[13:16], w[16:19], bool(w[19]), w[20])
        found.append((first, rows, width, stride, fold, zero, window, bool(along)))
    return found


def multiply(
    a: Rows,
    b: Rows,
    out: Tensor,
    *,
    first: int,
    stride: int,
    taps: int,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    codes: bool,
) -> None:
    """Write ``out (m, n) = sum_k A B`` times the scales plus bias, into `out`.

    Args:
        a: the left side, whose rows are m, or k where not `along`.
        b: the right side, whose rows are n, or k where not `along`.
        out: float32 or bfloat16 memory.
        first: number of the element of `out` that the result starts at.
        stride: elements of `out` between rows.
        taps: more than 1: columns (tap, channel) are written as (channel, tap).
        scales: float32 of each row (one or m) and of each column (one, n or n / taps).
        bias: float32 ``(n,)``.
        codes: True multiplies bytes and sums in int32; False rounds both sides to bf16, codes to ``q - z``, and sums
            in float32.
    """
    for x in (a.data, b.data, out, *scales, bias):
        if x is not None and (not x.is_cpu or x.is_neg()):  # of these the dispatcher would make something else
            _memory(x, "multiply: a tensor")
    operator = _OPERATORS[codes]
    lhs, rhs = _numbers(a, b)
    operator(a.data, lhs, b.data, rhs, out, [first, stride, taps], scales[0], scales[1], bias)


_SIDE = "a side of a product"
_MULTIPLY = ("multiply: out", _SIDE, _SIDE, "multiply: row scales", "multiply: column scales", "multiply: bias")


def _multiply(codes: bool) -> Callable[..., None]:
    """The kernel of the operator ``lowbit::multiply_codes``, or of ``lowbit::multiply_halves``."""

    def kernel(
        lhs: Tensor,
        lhs_rows: list[int],
        rhs: Tensor,
        rhs_rows: list[int],
        out: Tensor,
        place: list[int],
        row_scale: Tensor,
        column_scale: Tensor,
        bias: Tensor | None,
    ) -> None:
        to, a, b, rows, columns, added = _memories(out, lhs, rhs, row_scale, column_scale, bias, names=_MULTIPLY)
        left, right = _places(lhs_rows, rhs_rows)
        _cpu.multiply(codes, (a, *left), (b, *right), (to, *place, rows, columns, added))

    return kernel


def _fake(*_: object) -> None:
    """Without values there is nothing to write: the shape of `out` was known before."""


def _flops(_lhs: object, lhs_rows: list[int], _rhs: object, rhs_rows: list[int], *_: object, **__: object) -> int:
    """Two for each multiply-accumulate: ``2 m n k``, as `torch.utils.flop_counter` counts."""
    (_, rows, width, _, _, _, window, _), (_, other_rows, other_width, _, _, _, _, along) = _places(lhs_rows, rhs_rows)
    if window is not None:
        (batch, *_), size, *_, transposed, _ = window
        if transposed:  # most taps of the larger side reach for nothing
            rows = batch * math.prod(size)
    return 2 * int(rows * width * (other_rows if along else other_width))


# The products are operators of torch, so that its profiler shows them and its counter of operations counts them.
_LIBRARY = torch.library.Library("lowbit", "DEF")
for _name, _codes in (("multiply_codes", True), ("multiply_halves", False)):
    _LIBRARY.define(
        f"{_name}(Tensor lhs, int[] lhs_rows, Tensor rhs, int[] rhs_rows, Tensor(a!) out, int[] place, "
        "Tensor row_scale, Tensor column_scale, Tensor? bias) -> ()"
    )
    _LIBRARY.impl(_name, _multiply(_codes), "CPU")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.lowbit, _name))(_flops)
_OPERATORS = {True: torch.ops.lowbit.multiply_codes.default, False: torch.ops.lowbit.multiply_halves.default}
