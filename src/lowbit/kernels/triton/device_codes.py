"""Matrices to codes: one read of the tensor finds every range, a second one writes every code.

Notation: as in `lowbit.kernels.triton.device_rounding`; x is ``(rows, columns)`` in dense rows, and a program works on
a tile of it.
"""

import triton
import triton.language as tl

from lowbit.kernels.triton.device_rounding import codes_of, magnitude_bits, power_scale_of, scale_of

# Arguments whose values do not select another compilation, so that what is compiled is what was proven.
RANGE_SIZES = ["rows", "columns"]
CODE_SIZES = ["rows", "columns", "row_key_0", "row_key_1", "column_key_0", "column_key_1", "symmetric"]
BLOCK_SIZES = ["rows", "columns", "key_0", "key_1", "power"]


@triton.jit
def tile(columns, height: tl.constexpr, width: tl.constexpr, aligned: tl.constexpr):
    """Row and column numbers of this program's tile, and the length of a row."""
    if aligned:
        columns = columns // 16 * 16  # says that it is divisible, so that memory is read in wide words
    across = tl.cdiv(columns, width)
    program = tl.program_id(0)
    i = program // across * height + tl.arange(0, height)
    j = program % across * width + tl.arange(0, width)
    return i, j, columns


@triton.jit(do_not_specialize=RANGE_SIZES)
def ranges(
    x, of_rows, of_columns, of_all, rows, columns,
    by_row: tl.constexpr, by_column: tl.constexpr, by_all: tl.constexpr,
    aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Raise the largest magnitudes of rows, of columns, and of values above and below 0, to those of x.

    Args:
        x: float32 or bfloat16.
        of_rows: int32 ``(rows,)``, bits of magnitudes; zeros before.
        of_columns: likewise ``(columns,)``.
        of_all: likewise ``(2,)``: of the largest value, and of minus the smallest one.
        rows: of x.
        columns: of x.
        by_row: whether rows are wanted.
        by_column: whether columns are wanted.
        by_all: whether the two ends are wanted.
        aligned: whether columns are a multiple of 16.
        height: rows of a tile.
        width: columns of a tile.
    """
    i, j, columns = tile(columns, height, width, aligned)
    here = (i < rows)[:, None] & (j < columns)[None, :]
    v = tl.load(x + i[:, None].to(tl.int64) * columns + j[None, :], mask=here, other=0.0).to(tl.float32)
    bits = magnitude_bits(v)
    if by_row:
        tl.atomic_max(of_rows + i, tl.max(bits, 1), mask=i < rows)
    if by_column:
        tl.atomic_max(of_columns + j, tl.max(bits, 0), mask=j < columns)
    if by_all:
        odd = v != v
        tl.atomic_max(of_all, tl.max(tl.max(tl.where((v > 0.0) | odd, bits, 0), 1), 0))
        tl.atomic_max(of_all + 1, tl.max(tl.max(tl.where((v < 0.0) | odd, bits, 0), 1), 0))


@triton.jit
def _round_zero(x, scale):
    """The nearest whole number to ``x / S``, at most 2**20; 0 where it is nan."""
    t = tl.div_rn(x, scale)
    t = tl.where(t != t, 0.0, tl.minimum(t, 1048576.0))
    return (t + 12582912.0) - 12582912.0


@triton.jit
def whole_codes(v, of_all, levels, floor, index, key_0, key_1, symmetric, noisy: tl.constexpr):
    """Codes with one scale, that scale and its zero point, the code and the zero point 128 less if not `symmetric`."""
    above, below = tl.load(of_all), tl.load(of_all + 1)
    hi, down = above.to(tl.float32, bitcast=True), below.to(tl.float32, bitcast=True)  # down is -lo
    plain = symmetric != 0
    span = tl.where(plain, tl.maximum(above, below), (hi + down).to(tl.int32, bitcast=True))
    s = scale_of(span, levels, floor)
    z = tl.where(plain, 0.0, tl.minimum(_round_zero(down, s), levels))
    low = tl.where(plain, -levels, 0.0)
    q = codes_of(v, s, z, low, levels, index, key_0, key_1, noisy)
    shift = tl.where(plain, 0.0, 128.0)
    return q - shift, s, (z - shift).to(tl.int32)


@triton.jit(do_not_specialize=CODE_SIZES)
def range_codes(
    x, of_rows, of_columns, of_all, row_codes, column_codes, codes, row_scale, column_scale, scale, zero,
    rows, columns, row_levels, column_levels, levels, floor, column_floor,
    row_key_0, row_key_1, column_key_0, column_key_1, symmetric,
    by_row: tl.constexpr, by_column: tl.constexpr, by_all: tl.constexpr,
    row_noisy: tl.constexpr, column_noisy: tl.constexpr,
    aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Codes of rows, of columns, or of the whole, from the ranges that `ranges` found; and their scales.

    Args:
        x: as for `ranges`, like all arguments with the same names.
        of_rows: see there.
        of_columns: see there.
        of_all: see there.
        row_codes: int8 ``(rows, columns)``, with a scale for each row.
        column_codes: likewise, with a scale for each column.
        codes: likewise, with one scale; 128 less than the code where not `symmetric`.
        row_scale: float32 ``(rows,)``.
        column_scale: float32 ``(columns,)``.
        scale: float32 ``(1,)``.
        zero: int32 ``(1,)``: the code of a real zero, 128 less; 0 if `symmetric`.
        rows: see there.
        columns: see there.
        row_levels: the largest code of rows, float32.
        column_levels: that of columns.
        levels: that of the whole.
        floor: the smallest scale of rows, and of the whole.
        column_floor: that of columns.
        row_key_0: of the noise of rows, and of the whole, int32, like the next three.
        row_key_1: its second word.
        column_key_0: of the noise of columns.
        column_key_1: its second word.
        symmetric: 1 if the codes of the whole lack a zero point, else 0.
        by_row: see there.
        by_column: see there.
        by_all: see there.
        row_noisy: whether rows, or the whole, are rounded by noise.
        column_noisy: whether columns are.
        aligned: see there.
        height: see there.
        width: see there.
    """
    i, j, columns = tile(columns, height, width, aligned)
    here = (i < rows)[:, None] & (j < columns)[None, :]
    index = i[:, None].to(tl.int64) * columns + j[None, :]
    v = tl.load(x + index, mask=here, other=0.0).to(tl.float32)
    across = tl.cdiv(columns, width)
    if by_row:
        s = scale_of(tl.load(of_rows + i, mask=i < rows, other=0), row_levels, floor)
        q = codes_of(v, s[:, None], 0.0, -row_levels, row_levels, index, row_key_0, row_key_1, row_noisy)
        tl.store(row_codes + index, q.to(tl.int8), mask=here)
        if tl.program_id(0) % across == 0:
            tl.store(row_scale + i, s, mask=i < rows)
    if by_column:
        s = scale_of(tl.load(of_columns + j, mask=j < columns, other=0), column_levels, column_floor)
        q = codes_of(v, s[None, :], 0.0, -column_levels, column_levels, index, column_key_0, column_key_1, column_noisy)
        tl.store(column_codes + index, q.to(tl.int8), mask=here)
        if tl.program_id(0) < across:
            tl.store(column_scale + j, s, mask=j < columns)
    if by_all:
        q, s, z = whole_codes(v, of_all, levels, floor, index, row_key_0, row_key_1, symmetric, row_noisy)
        tl.store(codes + index, q.to(tl.int8), mask=here)
        tl.store(scale, s)
        tl.store(zero, z)


@triton.jit(do_not_specialize=BLOCK_SIZES)
def block_codes(
    x, codes, scales, rows, columns, levels, floor, key_0, key_1, power,
    block_rows: tl.constexpr, block_columns: tl.constexpr, noisy: tl.constexpr,
    aligned: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Codes of blocks, each with a scale of its own, in one read.

    Args:
        x: as for `ranges`, like all arguments with the same names.
        codes: int8 ``(rows, columns)``.
        scales: float32, one for each block, in rows of blocks.
        rows: see there.
        columns: see there.
        levels: the largest code, float32.
        floor: the smallest scale.
        key_0: of the noise, int32.
        key_1: its second word.
        power: 1 if scales are powers of two, rounded down, else 0.
        block_rows: of a block; a divisor of `height`.
        block_columns: of a block; a divisor of `width`.
        noisy: whether codes are rounded by noise.
        aligned: see there.
        height: see there.
        width: see there.
    """
    i, j, columns = tile(columns, height, width, aligned)
    here = (i < rows)[:, None] & (j < columns)[None, :]
    index = i[:, None].to(tl.int64) * columns + j[None, :]
    v = tl.load(x + index, mask=here, other=0.0).to(tl.float32)
    tall: tl.constexpr = height // block_rows
    wide: tl.constexpr = width // block_columns
    bits = tl.reshape(magnitude_bits(v), (tall, block_rows, wide, block_columns))
    most = tl.max(tl.max(bits, 3), 1)
    s = tl.where(power != 0, power_scale_of(most, levels), scale_of(most, levels, floor))
    each = tl.broadcast_to(s[:, None, :, None], (tall, block_rows, wide, block_columns))
    q = codes_of(v, tl.reshape(each, (height, width)), 0.0, -levels, levels, index, key_0, key_1, noisy)
    tl.store(codes + index, q.to(tl.int8), mask=here)
    across = tl.cdiv(columns, width)
    p = tl.program_id(0) // across * tall + tl.arange(0, tall)
    r = tl.program_id(0) % across * wide + tl.arange(0, wide)
    number = tl.cdiv(columns, block_columns)
    there = (p < tl.cdiv(rows, block_rows))[:, None] & (r < number)[None, :]
    tl.store(scales + p[:, None].to(tl.int64) * number + r[None, :], s, mask=there)
