"""The native kernels on torch tensors: what each makes and takes, around the calls of `lowbit.kernels.operators`.

Notation: x real value, q code, S scale, z zero point. Views are as in `lowbit.kernels.memory`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels import operators
from lowbit.kernels.memory import TYPES, View


def runs(x: Tensor) -> bool:
    """Whether the native passes over memory take this tensor where it is dense: float32 or bfloat16 on the CPU."""
    stored = x.is_cpu and not x.is_neg() and not x._is_zerotensor()
    return operators.INSTALLED and stored and x.dtype in (torch.float32, torch.bfloat16)


def _floats(*shape: int) -> Tensor:
    """Memory that a kernel fills, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def extremes(x: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel, float32 ``(channels,)``; nan where a nan is.

    Args:
        x: dense float32 or bfloat16 with at least one element, its memory as `view` says.
        view: see the top of this file.
    """
    lo, hi = _floats(view[1]), _floats(view[1])
    operators.extremes(x, view, lo, hi)
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
    operators.observe(x, samples, running, momentum, first, training, lo, hi)
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
    zero = None if symmetric else torch.empty(1, dtype=torch.int32, device="cpu")
    operators.quantize(x, view, symmetric, levels, floor, samples or 0, lo, hi, key, taps, codes, scale, zero)
    return codes, scale, 0 if zero is None else int(zero)


def sums(x: Tensor, width: int) -> Tensor:
    """The sum of each column of dense memory of rows of `width` numbers, float32 ``(width,)``."""
    to = _floats(width)
    operators.sums(x, to)
    return to


def row_sums(q: Tensor, width: int) -> Tensor:
    """The sum of each row of `width` uint8 codes in dense memory, float32 ``(rows,)``."""
    to = _floats(q.numel() // max(width, 1))
    operators.row_sums(q, width, to)
    return to


def add_offsets(y: Tensor, u: Tensor, o: Tensor, t: Tensor) -> None:
    """Add ``u o + t`` to rows by channels, in place.

    Args:
        y: float32, its memory rows by channels.
        u: float32 ``(rows, groups)``, a factor for each row and group of channels.
        o: float32 ``(channels,)``.
        t: float32 ``(period, channels)``, which repeats over the rows; empty for none.
    """
    operators.add_offsets(y, u, o, t)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """uint8 codes of rows by channels, ``x = (q - zero) * scale``; `scale` is float32 ``(1,)``."""

    q: Tensor
    scale: Tensor
    zero: int

    def arguments(self) -> tuple[Any, ...]:
        """As the operators take it."""
        return self.q, self.scale, self.zero


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
        """As the operators take it."""
        return self.total, self.mean, self.sigma, self.argmax, self.argmin, self.slopes


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
    operators.code_statistics(*codes.arguments(), channels, starts, slopes, *to.arguments()[:-1])
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
    operators.normalize(
        *codes.arguments(), *stats.arguments(), eps, narrowest, inside, gamma, beta, rectify, d, y
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
    operators.rectify_backward(*codes.arguments(), *stats.arguments(), gamma, beta, d, TYPES[dtype], g, to)
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
    operators.normalize_backward(
        *g.arguments(), *codes.arguments(), *stats.arguments(), inside, gamma, d, grad_gamma, grad_beta, dx
    )  # fmt: skip
    return grad_gamma, grad_beta


def code_sums(a: Tensor, b: Tensor | None, channels: int) -> tuple[Tensor, Tensor]:
    """Sums of codes of each channel, int64 ``(channels,)``: of `a`, and of `a` times `b` (zeros without `b`)."""
    total, product = torch.zeros(2, channels, dtype=torch.int64, device="cpu").unbind()
    operators.code_sums(a, b, total, product)
    return total, product


def affine(q: Tensor, a: Tensor, b: Tensor, y: Tensor) -> None:
    """Write ``a q + b`` of each channel into `y`, float32 or bfloat16, of the memory order of `q`.

    Args:
        q: uint8 codes of rows by channels.
        a: float32 ``(channels,)``.
        b: float32 ``(channels,)``.
        y: as many numbers as `q`.
    """
    operators.affine(q, a, b, False, y)


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
        """As the operators take it."""
        return self.scale, self.zero, float(self.low), float(self.high), self.offset, self.key


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
    operators.encode(x, view, *grid.arguments(), taps, codes)
    return codes


def encode_blocks(
    x: Tensor,
    block: tuple[int, int],
    *,
    levels: float,
    floor: float,
    floor_power: bool,
    key: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """Codes of a matrix in blocks, int8 in its shape, and their scales, float32, one for each block.

    Args:
        x: contiguous float32 or bfloat16 ``(R, C)``, not empty.
        block: rows and columns of a block; the last ones are shorter.
        levels: the largest code, at most 127.
        floor: the smallest scale; 0 for none.
        floor_power: whether scales are powers of two that are rounded down, 2**-127 at least.
        key: as for `Grid`.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
    scale = _floats(*(-(-n // max(size, 1)) for n, size in zip(x.shape, block, strict=True)))
    operators.encode_blocks(x, columns, list(block), levels, floor, floor_power, key, codes, scale)
    return codes, scale


def hadamard(x: Tensor, *, along: bool, size: int, signs: Tensor | None) -> Tensor:
    """``H D x / sqrt(size)`` of blocks of a matrix, as `lowbit.numerics.transforms.Hadamard` has it.

    Args:
        x: contiguous float32 ``(R, C)``, whose axis is whole blocks.
        along: whether blocks lie along the last axis; else along the first.
        size: of a block, a power of two from 2 to 1024.
        signs: float32 ``(size,)``, the diagonal of D; None for ones.
    """
    _, width = x.shape
    y = torch.empty_like(x)
    operators.hadamard(x, width, along, signs, size, max(size, 1) ** -0.5, y)
    return y


def fake_quantize(x: Tensor, view: View, grid: Grid) -> Tensor:
    """The values of the codes in the dtype, shape and memory order of `x`."""
    y = torch.empty_like(x)
    operators.fake_quantize(x, view, *grid.arguments(), y)
    return y


def round_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16 of each number, halves to even, float32 in the shape and memory order of `x`.

    Args:
        x: dense float32 on the CPU, its memory in the order of its axes or channels last.
    """
    y = torch.empty_like(x)
    operators.round_bf16(x, y)
    return y


def noise(count: int, key: tuple[int, int]) -> Tensor:
    """The noise of elements 0 to count - 1, float32, as `lowbit.numerics.rounding.uniform_noise` makes it."""
    u = _floats(count)
    operators.noise(key, u)
    return u


def encode_book(
    x: Tensor, block: int, values: Tensor, limits: Tensor, starts: Tensor, key: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks of numbers, as `lowbit.numerics.codebooks.encode` defines them.

    Args:
        x: dense float32 or bfloat16; blocks follow its memory.
        block: numbers that share a scale.
        values: float32 ``(2, 256)``, sorted numbers with and without a sign.
        limits: float32 ``(2, 256)``: the code of a number beyond limit i is larger than i.
        starts: int32 ``(2, 65536)``: by the upper 16 bits of a float32, the code of the smallest number that has them.
        key: of noise, or None to round to nearest.

    Returns:
        uint8 codes, flat; float32 scales ``(blocks,)``.
    """
    codes = torch.empty(x.numel(), dtype=torch.uint8, device="cpu")
    scales = _floats(-(-x.numel() // block))
    operators.encode_book(x, block, values, limits, starts, key, codes, scales)
    return codes, scales


def decode_book(codes: Tensor, scales: Tensor, block: int, values: Tensor) -> Tensor:
    """The values of codes, float32, flat: ``values[row, code] * |scale|``, the second row where a scale is negative."""
    y = _floats(codes.numel())
    operators.decode_book(codes, scales, block, values, y)
    return y


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
    """All of sides but their data, as the operators take it."""
    found = []
    for side in sides:
        w = side.window
        numbers = [side.first, side.rows, side.width, side.stride, side.fold, side.zero, int(side.along)]
        if w is not None:
            places = (*w.position, *w.size, *w.kernel, *w.stride, *w.padding, *w.dilation)
            numbers += [*places, int(w.transposed), w.channels]
        found.append(numbers)
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
    operator = operators.multiply_codes if codes else operators.multiply_halves
    lhs, rhs = _numbers(a, b)
    operator(a.data, lhs, b.data, rhs, out, [first, stride, taps], *scales, bias)


def multiply_blocks(
    a: Rows, b: Rows, out: Tensor, *, block: int, scales: tuple[Tensor, Tensor], bias: Tensor | None
) -> None:
    """Write the sum over blocks of k of ``S_a S_b sum_k A B``, plus bias, into `out`; each block is summed in int32.

    Args:
        a: int8 codes, as for `multiply`, without a window, a fold or a zero point.
        b: likewise.
        out: float32 or bfloat16 ``(m, n)``.
        block: numbers of k in a block, a multiple of 4 up to 32,768.
        scales: float32 ``(blocks, m)`` and ``(blocks, n)``.
        bias: float32 ``(n,)``.
    """
    lhs, rhs = _numbers(a, b)
    operators.multiply_blocks(a.data, lhs, b.data, rhs, out, block, *scales, bias)
