"""The passes of Range Batch-Norm on torch tensors, from codes to codes; nothing in `lowbit.nn` calls them yet.

Notation: q code, S scale, z zero point; a, b of each channel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.kernels.triton import variants
from lowbit.kernels.triton.calls import Codes, Rule, is_whole, placed


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """What the codes of each channel are in each chunk of rows; all int32 ``(chunks, channels)``.

    Args:
        largest: code.
        smallest: code.
        at_largest: the first row that has it.
        at_smallest: likewise.
        total: the sum of codes.
    """

    largest: Tensor
    smallest: Tensor
    at_largest: Tensor
    at_smallest: Tensor
    total: Tensor


def _checked(*codes: Tensor) -> tuple[Tensor, ...]:
    for q in codes:
        if q.dtype != torch.int8 or q.dim() != 2 or not q.numel() or q.shape != codes[0].shape:
            raise ValueError(
                f"codes are {q.dtype} of shape {tuple(q.shape)}: give int8 of rows by channels, all of one shape"
            )
    return tuple(map(placed, codes))


def chunk_statistics(q: Tensor, chunks: int) -> Chunks:
    """Extremes and sums of each channel in chunks of rows, the first ones longer by a row where that is needed.

    Args:
        q: int8 ``(rows, channels)``.
        chunks: 1 to rows.
    """
    (q,) = _checked(q)
    rows, channels = q.shape
    if not 1 <= chunks <= rows:
        raise ValueError(f"{chunks} chunks of {rows} rows: give 1 to {rows}")
    short, longer = divmod(rows, chunks)
    found = [torch.empty((chunks, channels), dtype=torch.int32, device=q.device) for _ in range(5)]
    variant = variants.chunk_statistics(aligned=is_whole(channels))
    programs = chunks * -(-channels // int(variant.constants["width"]))
    variant.launch(programs, q, *found, channels, longer, short)
    return Chunks(**dict(zip(Chunks.__dataclass_fields__, found, strict=True)))


def normalize(q: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, rectify: bool) -> tuple[Tensor, Tensor]:
    """``a q + b`` of each channel, and the bits of its largest magnitudes above and below 0, int32 ``(2,)``.

    Args:
        q: int8 ``(rows, channels)``.
        a: float32 ``(channels,)``.
        b: float32 ``(channels,)``.
        dtype: of the result, float32 or bfloat16.
        rectify: whether it is 0 where it would be less.
    """
    (q,) = _checked(q)
    y = torch.empty(tuple(q.shape), dtype=dtype, device=q.device)
    ends = torch.zeros(2, dtype=torch.int32, device=q.device)
    variant = variants.normalize(dtype, aligned=is_whole(q.shape[1]))
    variant.launch(variant.tiles(*q.shape), q, placed(a), placed(b), y, ends, *q.shape, int(rectify))
    return y, ends


def normalized_codes(
    q: Tensor, a: Tensor, b: Tensor, ends: Tensor, rule: Rule, *, rectify: bool, symmetric: bool
) -> Codes:
    """Codes of what `normalize` gives in float32, with one scale, without reading it.

    Args:
        q: as for `normalize`, like `a`, `b` and `rectify`.
        a: see there.
        b: see there.
        ends: what it returned.
        rule: how codes are made.
        rectify: see there.
        symmetric: whether they lack a zero point; else they are 128 less, as in `Codes`.
    """
    (q,) = _checked(q)
    codes = torch.empty(tuple(q.shape), dtype=torch.int8, device=q.device)
    scale = torch.empty(1, dtype=torch.float32, device=q.device)
    zero = torch.empty(1, dtype=torch.int32, device=q.device)
    variant = variants.normalized_codes(noisy=rule.key is not None, aligned=is_whole(q.shape[1]))
    variant.launch(
        variant.tiles(*q.shape), q, placed(a), placed(b), ends, codes, scale, zero, *q.shape,
        float(rule.levels), float(rule.floor), int(rectify), *rule.words, int(symmetric),
    )  # fmt: skip
    return Codes(q=codes, scale=scale, zero=None if symmetric else zero)


def code_sums(g: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the codes of each channel of g, and of g q, int64 ``(channels,)``.

    Args:
        g: int8 ``(rows, channels)``.
        q: likewise.
    """
    g, q = _checked(g, q)
    found = torch.zeros(2, g.shape[1], dtype=torch.int64, device=g.device)
    of_g, of_products = found[0], found[1].clone()
    variant = variants.code_sums(aligned=is_whole(g.shape[1]))
    variant.launch(variant.tiles(*g.shape), g, q, of_g, of_products, *g.shape)
    return of_g, of_products
