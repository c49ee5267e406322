"""Products of two matrices of int8 codes, with scales, zero points and bias where the result is written.

Notation: a, b codes with zero points z_a, z_b; ``out (m, n) = sum over k``. A side lies *along* k if its rows do: its
memory is then (m, k) or (n, k), otherwise (k, m) or (k, n).
"""

import triton
import triton.language as tl

from lowbit.kernels.triton.device_rounding import in_type

# Arguments whose values do not select another compilation, so that what is compiled is what was proven.
SIZES = ["m", "n", "k", "first", "until", "each_a", "each_b", "zeros_a", "zeros_b", "biased"]
BLOCK_SIZES = ["m", "n", "k", "biased"]


@triton.jit
def _corner(m, n, block_m: tl.constexpr, block_n: tl.constexpr):
    """The first row and column of this program's tile: tiles go in bands of 8 rows of tiles, which share the cache."""
    down, across = tl.cdiv(m, block_m), tl.cdiv(n, block_n)
    program = tl.program_id(0)
    band = program // (8 * across)
    size = tl.minimum(down - band * 8, 8)
    inside = program % (8 * across)
    return (band * 8 + inside % size) * block_m, inside // size * block_n


@triton.jit
def _load(side, width, depth, i, kk, until, along: tl.constexpr):
    """A tile (width, depth) of one side; zeros beyond its ends."""
    here = (i < width)[:, None] & (kk < until)[None, :]
    if along:
        at = i[:, None].to(tl.int64) * depth + kk[None, :]
    else:
        at = kk[None, :].to(tl.int64) * width + i[:, None]
    return tl.load(side + at, mask=here, other=0)


@triton.jit
def _load_turned(side, width, depth, i, kk, until, along: tl.constexpr):
    """The same tile as (depth, width)."""
    here = (kk < until)[:, None] & (i < width)[None, :]
    if along:
        at = i[None, :].to(tl.int64) * depth + kk[:, None]
    else:
        at = kk[:, None].to(tl.int64) * width + i[None, :]
    return tl.load(side + at, mask=here, other=0)


@triton.jit(do_not_specialize=SIZES)
def int8_mm(
    a, b, out, scale_a, scale_b, zero_a, zero_b, sums_a, sums_b, bias,
    m, n, k, first, until, each_a, each_b, zeros_a, zeros_b, biased,
    a_along: tl.constexpr, b_along: tl.constexpr, aligned: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """``out = S_a S_b sum_k (a - z_a)(b - z_b) + bias``: exact sums in int32, each scaled in float32.

    Args:
        a: int8 codes.
        b: int8 codes.
        out: float32 or bfloat16 ``(m, n)``.
        scale_a: float32 ``(m,)`` or ``(1,)``.
        scale_b: float32 ``(n,)`` or ``(1,)``.
        zero_a: int32 ``(1,)``.
        zero_b: int32 ``(1,)``.
        sums_a: int32 ``(m,)``, sums of a's codes from `first` to `until`; read if b has a zero point.
        sums_b: int32 ``(n,)``, likewise of b.
        bias: float32 ``(n,)``.
        m: rows of the result.
        n: its columns.
        k: numbers that are summed, in memory.
        first: the first of them here, a multiple of 16.
        until: the one after the last.
        each_a: 1 if each row has a scale, else 0.
        each_b: likewise for columns.
        zeros_a: 1 if a has a zero point, else 0.
        zeros_b: likewise.
        biased: 1 if there is a bias, else 0.
        a_along: see the top of this file.
        b_along: likewise.
        aligned: whether n, and k (m where a does not lie along it), are multiples of 16.
        block_m: rows of a tile.
        block_n: its columns.
        block_k: numbers that are summed at once.
    """
    if aligned:  # says that they are divisible, so that memory is read and written in wide words
        n = n // 16 * 16
        if a_along:
            k, first, until = k // 16 * 16, first // 16 * 16, until // 16 * 16
        else:
            m = m // 16 * 16
    row, column = _corner(m, n, block_m, block_n)
    i, j, step = row + tl.arange(0, block_m), column + tl.arange(0, block_n), tl.arange(0, block_k)
    sums = tl.zeros((block_m, block_n), tl.int32)
    for start in range(first, until, block_k):
        left = _load(a, m, k, i, start + step, until, a_along)
        right = _load_turned(b, n, k, j, start + step, until, b_along)
        sums = tl.dot(left, right, sums)
    rows, columns = i < m, j < n
    if zeros_a:
        sums -= tl.load(zero_a) * tl.load(sums_b + j, mask=columns, other=0)[None, :]
    if zeros_b:
        sums -= tl.load(zero_b) * tl.load(sums_a + i, mask=rows, other=0)[:, None]
    if zeros_a * zeros_b:
        sums += (until - first) * tl.load(zero_a) * tl.load(zero_b)
    y = sums.to(tl.float32) * tl.load(scale_a + i * each_a, mask=rows, other=0.0)[:, None]
    y = y * tl.load(scale_b + j * each_b, mask=columns, other=0.0)[None, :]
    if biased:
        y = y + tl.load(bias + j, mask=columns, other=0.0)[None, :]
    at = i[:, None].to(tl.int64) * n + j[None, :]
    tl.store(out + at, in_type(y, out.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@triton.jit(do_not_specialize=BLOCK_SIZES)
def int8_mm_blocks(
    a, b, out, scale_a, scale_b, bias, m, n, k, biased,
    a_along: tl.constexpr, b_along: tl.constexpr, aligned: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """``out = sum over blocks of S_a S_b sum_k a b, + bias``: blocks in int32, their sum in float32, in order.

    Args:
        a: as for `int8_mm`, like all arguments with the same names.
        b: see there.
        out: see there.
        scale_a: float32 ``(blocks, m)``.
        scale_b: float32 ``(blocks, n)``.
        bias: see there.
        m: see there.
        n: see there.
        k: see there.
        biased: see there.
        a_along: see there.
        b_along: see there.
        aligned: see there.
        block_m: see there.
        block_n: see there.
        block_k: numbers that share a scale.
    """
    if aligned:
        n = n // 16 * 16
        if a_along:
            k = k // 16 * 16
        else:
            m = m // 16 * 16
    row, column = _corner(m, n, block_m, block_n)
    i, j, step = row + tl.arange(0, block_m), column + tl.arange(0, block_n), tl.arange(0, block_k)
    rows, columns = i < m, j < n
    y = tl.zeros((block_m, block_n), tl.float32)
    at_a, at_b = scale_a + i, scale_b + j
    for start in range(0, k, block_k):
        left = _load(a, m, k, i, start + step, k, a_along)
        right = _load_turned(b, n, k, j, start + step, k, b_along)
        part = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
        s, t = tl.load(at_a, mask=rows, other=0.0), tl.load(at_b, mask=columns, other=0.0)
        y += part * s[:, None] * t[None, :]
        at_a += m
        at_b += n
    if biased:
        y = y + tl.load(bias + j, mask=columns, other=0.0)[None, :]
    at = i[:, None].to(tl.int64) * n + j[None, :]
    tl.store(out + at, in_type(y, out.dtype.element_ty), mask=rows[:, None] & columns[None, :])
