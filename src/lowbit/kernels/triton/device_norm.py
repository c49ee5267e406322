"""The passes of Range Batch-Norm over int8 codes, rows by channels: what they read and write is a byte a number.

Notation: q code, a and b float32 of each channel, y = a q + b.
"""

import triton
import triton.language as tl

from lowbit.kernels.triton.device_codes import tile, whole_codes
from lowbit.kernels.triton.device_rounding import in_type, magnitude_bits

# Arguments whose values do not select another compilation, so that what is compiled is what was proven.
CHUNK_SIZES = ["channels", "longer", "short"]
NORMALIZE_SIZES = ["rows", "channels", "rectify"]
CODE_SIZES = ["rows", "channels", "rectify", "key_0", "key_1", "symmetric"]
SUM_SIZES = ["rows", "channels"]


@triton.jit(do_not_specialize=CHUNK_SIZES)
def chunk_statistics(
    q, largest, smallest, at_largest, at_smallest, total, channels, longer, short,
    aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Extremes, the first rows that have them, and sums, of each channel in each chunk of rows.

    Args:
        q: int8 codes.
        largest: int32 ``(chunks, channels)``, like all below.
        smallest: of codes.
        at_largest: the number of a row.
        at_smallest: likewise.
        total: the sum of codes.
        channels: numbers in a row.
        longer: how many chunks, the first ones, have a row more than `short`.
        short: rows of the other chunks.
        aligned: whether channels are a multiple of 16.
        height: rows that are read at once.
        width: channels of a program.
    """
    if aligned:
        channels = channels // 16 * 16
    across = tl.cdiv(channels, width)
    chunk = tl.program_id(0) // across
    j = tl.program_id(0) % across * width + tl.arange(0, width)
    columns = j < channels
    first = chunk * short + tl.minimum(chunk, longer)
    length = short + tl.where(chunk < longer, 1, 0)
    high, low = tl.full((width,), -1000, tl.int32), tl.full((width,), 1000, tl.int32)
    at_high, at_low = tl.zeros((width,), tl.int32), tl.zeros((width,), tl.int32)
    sums = tl.zeros((width,), tl.int32)
    for start in range(0, length, height):
        i = start + tl.arange(0, height)
        here = (i < length)[:, None] & columns[None, :]
        v = tl.load(q + (first + i)[:, None].to(tl.int64) * channels + j[None, :], mask=here, other=0).to(tl.int32)
        up, down = tl.where(here, v, -1000), tl.where(here, v, 1000)
        top, bottom = tl.max(up, 0), tl.min(down, 0)
        at_top = tl.min(tl.where(up == top[None, :], i[:, None], length), 0)
        at_bottom = tl.min(tl.where(down == bottom[None, :], i[:, None], length), 0)
        at_high, at_low = tl.where(top > high, at_top, at_high), tl.where(bottom < low, at_bottom, at_low)
        high, low = tl.maximum(high, top), tl.minimum(low, bottom)
        sums += tl.sum(v, 0)
    to = chunk.to(tl.int64) * channels + j
    tl.store(largest + to, high, mask=columns)
    tl.store(smallest + to, low, mask=columns)
    tl.store(at_largest + to, first + at_high, mask=columns)
    tl.store(at_smallest + to, first + at_low, mask=columns)
    tl.store(total + to, sums, mask=columns)


@triton.jit
def _values(q, a, b, rows, channels, rectify, height: tl.constexpr, width: tl.constexpr, aligned: tl.constexpr):
    """The values y of this program's tile, 0 beyond its ends; where they lie, and which of them are there."""
    i, j, channels = tile(channels, height, width, aligned)
    here = (i < rows)[:, None] & (j < channels)[None, :]
    index = i[:, None].to(tl.int64) * channels + j[None, :]
    slope, shift = tl.load(a + j, mask=j < channels, other=0.0), tl.load(b + j, mask=j < channels, other=0.0)
    y = tl.load(q + index, mask=here, other=0).to(tl.float32) * slope[None, :] + shift[None, :]
    y = tl.where((rectify != 0) & (y <= 0.0), 0.0, y)
    return tl.where(here, y, 0.0), index, here


@triton.jit(do_not_specialize=NORMALIZE_SIZES)
def normalize(
    q, a, b, y, of_all, rows, channels, rectify,
    aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Write y, and raise the largest magnitudes of values above and below 0 to those of y as it was written.

    Args:
        q: int8 codes.
        a: float32 ``(channels,)``.
        b: likewise.
        y: float32 or bfloat16 of the shape of `q`.
        of_all: int32 ``(2,)``, as for `lowbit.kernels.triton.device_codes.ranges`.
        rows: of codes.
        channels: numbers in a row.
        rectify: 1 if y is 0 where it would be less, else 0.
        aligned: whether channels are a multiple of 16.
        height: rows of a tile.
        width: channels of a tile.
    """
    v, index, here = _values(q, a, b, rows, channels, rectify, height, width, aligned)
    written = in_type(v, y.dtype.element_ty)
    tl.store(y + index, written, mask=here)
    v = written.to(tl.float32)
    bits, odd = magnitude_bits(v), v != v
    tl.atomic_max(of_all, tl.max(tl.max(tl.where((v > 0.0) | odd, bits, 0), 1), 0))
    tl.atomic_max(of_all + 1, tl.max(tl.max(tl.where((v < 0.0) | odd, bits, 0), 1), 0))


@triton.jit(do_not_specialize=CODE_SIZES)
def normalized_codes(
    q, a, b, of_all, codes, scale, zero, rows, channels, levels, floor, rectify, key_0, key_1, symmetric,
    noisy: tl.constexpr, aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Codes of y, which is made anew from its own codes, with one scale for all.

    Args:
        q: as for `normalize`, like all arguments with the same names.
        a: see there.
        b: see there.
        of_all: see there.
        codes: int8; 128 less than the code where not `symmetric`.
        scale: float32 ``(1,)``.
        zero: int32 ``(1,)``: the code of a real zero, 128 less; 0 if `symmetric`.
        rows: see there.
        channels: see there.
        levels: the largest code, float32.
        floor: the smallest scale.
        rectify: see there.
        key_0: of the noise, int32.
        key_1: its second word.
        symmetric: 1 if codes lack a zero point, else 0.
        noisy: whether noise rounds them.
        aligned: see there.
        height: see there.
        width: see there.
    """
    v, index, here = _values(q, a, b, rows, channels, rectify, height, width, aligned)
    found, s, z = whole_codes(v, of_all, levels, floor, index, key_0, key_1, symmetric, noisy)
    tl.store(codes + index, found.to(tl.int8), mask=here)
    tl.store(scale, s)
    tl.store(zero, z)


@triton.jit(do_not_specialize=SUM_SIZES)
def code_sums(
    g, q, of_g, of_products, rows, channels, aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr
):
    """Add the sums of a channel's codes, and of the products of two tensors' codes: exact, in any order.

    Args:
        g: int8 codes.
        q: likewise.
        of_g: int64 ``(channels,)``, sums of g; zeros before.
        of_products: likewise, of g q.
        rows: of codes.
        channels: numbers in a row.
        aligned: whether channels are a multiple of 16.
        height: rows of a tile.
        width: channels of a tile.
    """
    i, j, channels = tile(channels, height, width, aligned)
    here = (i < rows)[:, None] & (j < channels)[None, :]
    index = i[:, None].to(tl.int64) * channels + j[None, :]
    v = tl.load(g + index, mask=here, other=0).to(tl.int32)
    w = tl.load(q + index, mask=here, other=0).to(tl.int32)
    tl.atomic_add(of_g + j, tl.sum(v, 0).to(tl.int64), mask=j < channels)
    tl.atomic_add(of_products + j, tl.sum(v * w, 0).to(tl.int64), mask=j < channels)
