"""The kernels on torch tensors: what each makes and takes.

Notation: x real value, q code, S scale, z zero point; a program works on one tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.triton import variants
from lowbit.kernels.triton.variants import Target

# How many numbers one launch sums: 255 by 255 at most, below 2**31; whole tiles.
MOST_SUMMED = (2**31 - 1) // 255**2 // 64 * 64
BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How codes are made.

    Args:
        levels: the largest code.
        floor: the smallest scale; 0 replaces only a zero scale, by 1.
        key: the two words of the noise field; None rounds to nearest.
    """

    levels: float
    floor: float = 0.0
    key: tuple[int, int] | None = None

    @property
    def words(self) -> tuple[int, int]:
        """The key as signed 32-bit integers, which Triton passes as they are."""
        first, second = (word - (word >> 31 << 32) for word in self.key or (0, 0))
        return first, second


@dataclass(frozen=True, kw_only=True)
class Codes:
    """int8 codes of a matrix, ``x ~ (q - zero) scale``.

    Args:
        q: int8 ``(rows, columns)``.
        scale: float32, one for each row or column, or one.
        zero: int32 ``(1,)``, the code of a real zero; None for 0.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None


def is_whole(*sizes: int) -> bool:
    """Whether memory in rows of these lengths can be read in wide words."""
    return all(size % 16 == 0 for size in sizes)


def placed(x: Tensor) -> Tensor:
    """The tensor in dense memory at a multiple of 16 bytes, as kernels read it."""
    x = x.detach().contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _checked(x: Tensor) -> Tensor:
    if x.dim() != 2 or x.numel() == 0 or x.dtype not in variants.TYPES:
        raise ValueError(f"{x.dtype} of shape {tuple(x.shape)}: give a float32 or bfloat16 matrix that is not empty")
    return placed(x)


def _ranges(x: Tensor, by: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bits of the largest magnitudes of rows, of columns and of both ends, in one read; empty if not asked for."""
    rows, columns = x.shape
    sizes = (rows if by in ("row", "both") else 0, columns if by in ("column", "both") else 0, 2)
    found = [torch.zeros(size, dtype=torch.int32, device=x.device) for size in sizes]
    variant = variants.ranges(by, x.dtype, aligned=is_whole(columns))
    variant.launch(variant.tiles(rows, columns), x, *found, rows, columns)
    return found[0], found[1], found[2]


def range_codes(
    x: Tensor,
    by: str,
    *,
    row: Rule | None = None,
    column: Rule | None = None,
    observed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Codes | None, Codes | None]:
    """Codes of a matrix, after one read for the ranges: of rows and of columns in one more read.

    Args:
        x: float32 or bfloat16 ``(rows, columns)``, not empty.
        by: ``"row"``, ``"column"``, ``"both"``, ``"all"``, or ``"affine"``: all, with a zero point.
        row: how codes of rows, or of the whole, are made.
        column: how those of columns are; with ``"both"``, both round by noise or neither does.
        observed: lo and hi of the whole in place of those of `x`, one number each.

    Returns:
        Codes of rows, or of the whole, and codes of columns; None for what was not asked for.

    Raises:
        ValueError: another tensor, or rules that do not go with `by`.
    """
    x = _checked(x)
    rows, columns = x.shape
    if (row is None) != (by == "column") or (column is None) != (by not in ("column", "both")):
        raise ValueError(f"by={by!r} with row={row} and column={column}: give a rule for each of the codes")
    shared = "all" if by == "affine" else by
    noisy = {rule.key is not None for rule in (row, column) if rule is not None}
    if len(noisy) > 1:
        raise ValueError(
            "codes of rows and of columns from one read round by noise, or neither does: encode them apart"
        )
    one, other = row or Rule(levels=1.0), column or Rule(levels=1.0)
    if observed is None:
        of_rows, of_columns, of_all = _ranges(x, shared)
    else:
        ends = torch.stack([observed[1].reshape(()), -observed[0].reshape(())]).to(x.device, torch.float32)
        of_rows, of_columns, of_all = (ends.clamp(min=0.0).view(torch.int32),) * 3
    variant = variants.range_codes(
        Target(by=shared, noisy=noisy.pop()), x.dtype, aligned=is_whole(columns)  # type: ignore[arg-type]  # a Target.by
    )  # fmt: skip

    def made(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=x.device)

    wanted = {"row": by in ("row", "both"), "column": by in ("column", "both"), "all": shared == "all"}
    numbers = {name: made(x.numel() if asked else 0, torch.int8) for name, asked in wanted.items()}
    counts = {"row": rows, "column": columns, "all": 1}
    scales = {name: made(counts[name] if asked else 0, torch.float32) for name, asked in wanted.items()}
    zero = made(1, torch.int32)
    variant.launch(
        variant.tiles(rows, columns), x, of_rows, of_columns, of_all, *numbers.values(), *scales.values(), zero,
        rows, columns, one.levels, other.levels, one.levels, one.floor, other.floor, *one.words, *other.words,
        int(by != "affine"),
    )  # fmt: skip
    found = {
        name: Codes(q=numbers[name].view(rows, columns), scale=scales[name], zero=zero if by == "affine" else None)
        for name, asked in wanted.items()
        if asked
    }
    return found.get("row", found.get("all")), found.get("column")


def block_codes(x: Tensor, block: tuple[int, int], rule: Rule, *, power: bool) -> Codes:
    """Codes of a matrix in blocks, int8 in its shape; scales float32, one for each block.

    Args:
        x: as for `range_codes`.
        block: rows and columns of a block, 1 or 32 each.
        rule: how they are made.
        power: whether scales are powers of two that are rounded down, 2**-127 at least.
    """
    x = _checked(x)
    rows, columns = x.shape
    q = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    shape = -(-rows // block[0]), -(-columns // block[1])
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    noisy = rule.key is not None
    variant = variants.block_codes(block, x.dtype, noisy=noisy, aligned=is_whole(columns))
    variant.launch(
        variant.tiles(rows, columns),
        x,
        q,
        scale,
        rows,
        columns,
        float(rule.levels),
        float(rule.floor),
        *rule.words,
        int(power),
    )
    return Codes(q=q, scale=scale)


def _sides(layout: str, a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """m, n and k of a product."""
    (m, k), (n, other) = (a.shape if layout != "grad_weight" else a.shape[::-1]), b.shape
    if layout != "output":
        n, other = other, n
    if a.dtype != torch.int8 or b.dtype != torch.int8 or k != other or not m * n * k:
        raise ValueError(
            f"{layout} of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}: give int8 codes of shapes that "
            "multiply and are not empty"
        )
    return m, n, k


def int8_mm(layout: str, a: Codes, b: Codes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of two matrices of codes, times their scales, plus bias.

    Args:
        layout: ``"output"``: a (m, k), b (n, k); ``"grad_input"``: a (m, k), b (k, n); ``"grad_weight"``: a (k, m),
            b (k, n).
        a: codes with one scale, or one for each m.
        b: codes with one scale, or one for each n.
        bias: float32 ``(n,)``.
        dtype: of the result, float32 or bfloat16.

    Returns:
        ``(m, n)``. Sums are exact; those of more than `MOST_SUMMED` numbers are cut, and the parts added in float32.

    Raises:
        ValueError: codes that are not int8, or shapes that do not multiply or are empty.
    """
    m, n, k = _sides(layout, a.q, b.q)
    first, second = placed(a.q), placed(b.q)
    aligned = is_whole(n, m) if layout == "grad_weight" else is_whole(n, k)
    if k > MOST_SUMMED:
        total = torch.zeros(m, n, dtype=torch.float32, device=first.device)
        for start in range(0, k, MOST_SUMMED):
            part = _launched(layout, a, b, (first, second), None, (m, n, k), start, torch.float32, aligned)
            total += part
        return (total if bias is None else total.add_(bias)).to(dtype)
    return _launched(layout, a, b, (first, second), bias, (m, n, k), 0, dtype, aligned)


def _launched(
    layout: str,
    a: Codes,
    b: Codes,
    numbers: tuple[Tensor, Tensor],
    bias: Tensor | None,
    sizes: tuple[int, int, int],
    first: int,
    dtype: torch.dtype,
    aligned: bool,
) -> Tensor:
    """One launch, which sums at most `MOST_SUMMED` numbers from `first` on."""
    m, n, k = sizes
    until = min(k, first + MOST_SUMMED)
    out = torch.empty(m, n, dtype=dtype, device=numbers[0].device)
    scales = placed(a.scale), placed(b.scale)
    axes = (0 if layout == "grad_weight" else 1), (1 if layout == "output" else 0)
    # The sums of one side are needed where the other has a zero point.
    sums = [
        out if other.zero is None else q.narrow(axis, first, until - first).sum(axis, dtype=torch.int32)
        for q, axis, other in zip(numbers, axes, (b, a), strict=True)
    ]
    zeros = [out if side.zero is None else side.zero for side in (a, b)]
    flags = [int(side.scale.numel() > 1) for side in (a, b)] + [int(side.zero is not None) for side in (a, b)]
    variant = variants.int8_mm(layout, dtype, aligned=aligned)
    variant.launch(
        variant.tiles(m, n), *numbers, out, *scales, *zeros, *sums, out if bias is None else placed(bias),
        m, n, k, first, until, *flags, int(bias is not None),
    )  # fmt: skip
    return out


def int8_mm_blocks(layout: str, a: Codes, b: Codes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum over blocks of 32 of the depth of ``S_a S_b sum_k q q``, plus bias.

    Args:
        layout: as for `int8_mm`, like the rest.
        a: codes with scales ``(blocks, m)``.
        b: codes with scales ``(blocks, n)``.
        bias: see there.
        dtype: see there.
    """
    m, n, k = _sides(layout, a.q, b.q)
    aligned = is_whole(n, m) if layout == "grad_weight" else is_whole(n, k)
    out = torch.empty(m, n, dtype=dtype, device=a.q.device)
    variant = variants.int8_mm_blocks(layout, dtype, aligned=aligned)
    variant.launch(
        variant.tiles(m, n), placed(a.q), placed(b.q), out, placed(a.scale), placed(b.scale),
        out if bias is None else placed(bias), m, n, k, int(bias is not None),
    )  # fmt: skip
    return out
