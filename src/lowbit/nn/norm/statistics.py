"""The mean and the range estimate of each channel of a batch, and the divisor.

Notation: as in `lowbit.nn.norm`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit import ranks
from lowbit.methods.normalization import Constant, EpsilonPlace, Narrowest
from lowbit.numerics.quantizer import Grid

# The authors' constant makes sigma nearly the standard deviation of a normal x; the paper's is 1.7 to 1.85 of it.
KAPPA: dict[Constant, float] = {"paper": 1.0, "authors": 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))}


@dataclass(frozen=True)
class Statistics:
    """The statistics of each channel in one batch.

    Args:
        mean: mu, ``(C,)``.
        sigma: the estimate of the standard deviation, ``(C,)``.
        argmax: batch-major index of the first largest value of each chunk, ``(C, K)`` in 0..N-1.
        argmin: the same of the first smallest value.
        slope: d sigma / d R_k, ``(K,)``.
        part: what this process has of a batch that several share; None: all of it.
    """

    mean: Tensor
    sigma: Tensor
    argmax: Tensor
    argmin: Tensor
    slope: Tensor
    part: "Part | None" = None


@dataclass(frozen=True)
class Part:
    """What one process has of a batch that several share, side by side in the order of ranks.

    Args:
        count: N of the whole batch.
        has_max: whether the first largest value of each chunk is here, ``(C, K)``.
        has_min: the same of the first smallest value.
        group: the processes; None: all.
    """

    count: int
    has_max: Tensor
    has_min: Tensor
    group: dist.ProcessGroup | None

    def total(self, v: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return ranks.gathered(v, self.group).sum(0)


def range_statistics(x: Tensor, *, constant: Constant, chunks: int, fewest: int = 2) -> Statistics:
    """Mean and range estimate of each channel.

    The N values of a channel, batch-major, are cut into ``K = min(chunks, N // fewest)`` chunks, at least one, whose
    lengths differ by at most one; each is weighed with its own ``sqrt(2 ln n_k)``.

    Args:
        x: float ``(B, C, *size)``.
        constant: which kappa.
        chunks: the most chunks.
        fewest: the fewest values in a chunk, unless the channel has fewer.

    Raises:
        ValueError: N < 2, since one value lacks a range.

    Source: Banner et al. 2018, section 3 (``"paper"``); their code's RangeBN (``"authors"``).
    """
    channels = x.shape[1]
    rows = x.transpose(0, 1).reshape(channels, -1)
    count = rows.shape[1]
    _check_count(count, x)
    lengths, first = chunk_lengths(count, chunks, fewest)
    number, longer = len(lengths), lengths.count(lengths[-1] + 1)
    short = lengths[-1]
    starts = torch.tensor(first, dtype=torch.int64, device=x.device)
    split = longer * (short + 1)
    parts = [rows[:, :split].unflatten(1, (longer, short + 1))] if longer else []
    parts.append(rows[:, split:].unflatten(1, (number - longer, short)))
    # torch.max over a dim gives the first of several equal values, as the authors' code does.
    high = [part.max(2) for part in parts]
    low = [part.min(2) for part in parts]
    spread = torch.cat([h.values - w.values for h, w in zip(high, low, strict=True)], 1)
    slope = x.new_tensor(slopes(constant, lengths))
    return Statistics(
        mean=rows.mean(1),
        sigma=(spread * slope).sum(1),
        argmax=torch.cat([h.indices for h in high], 1) + starts,
        argmin=torch.cat([w.indices for w in low], 1) + starts,
        slope=slope,
    )


def shared_statistics(
    x: Tensor, *, constant: Constant, chunks: int, fewest: int, group: dist.ProcessGroup | None
) -> Statistics:
    """`range_statistics` of a batch of which each process of a group has some samples, on all of them.

    The indices are those of this process' values, and 0 where the extreme of a chunk is elsewhere.
    """
    channels = x.shape[1]
    rows = x.transpose(0, 1).reshape(channels, -1)
    counts = ranks.gathered(torch.tensor(rows.shape[1], dtype=torch.int64, device=x.device), group).tolist()
    rank, count = dist.get_rank(group), sum(counts)
    _check_count(count, x)
    before = sum(counts[:rank])
    lengths, first = chunk_lengths(count, chunks, fewest)
    extremes = x.new_full((2, channels, len(lengths)), -math.inf)  # the largest of x, and of -x
    places = torch.zeros(extremes.shape, dtype=torch.int64, device=x.device)
    for k, (length, start) in enumerate(zip(lengths, first, strict=True)):
        low, high = max(start - before, 0), min(start + length - before, rows.shape[1])
        if low < high:
            for side, part in enumerate((rows[:, low:high], -rows[:, low:high])):
                found = part.max(1)
                extremes[side, :, k], places[side, :, k] = found.values, found.indices + low
    every = ranks.gathered(extremes, group)
    most = every.amax(0)
    at = every == most
    has = at[rank] & ~at[:rank].any(0)  # of equal values, the first one
    slope = x.new_tensor(slopes(constant, lengths))
    return Statistics(
        mean=(ranks.gathered(rows.sum(1, dtype=torch.float64), group).sum(0) / count).to(x.dtype),
        sigma=(most.sum(0) * slope).sum(1),
        argmax=places[0].where(has[0], 0),
        argmin=places[1].where(has[1], 0),
        slope=slope,
        part=Part(count=count, has_max=has[0], has_min=has[1], group=group),
    )


def _check_count(count: int, x: Tensor) -> None:
    if count < 2:
        raise ValueError(
            f"Range BN got an input of shape {tuple(x.shape)}: {count} value(s) per channel have no range. Use a "
            "larger batch, or leave this layer out with a rule"
        )


def chunk_lengths(count: int, chunks: int, fewest: int) -> tuple[list[int], list[int]]:
    """Lengths and first indices of the chunks that `count` values are cut into, the longer ones first."""
    number = max(1, min(chunks, count // fewest))
    short, longer = divmod(count, number)
    lengths = [short + 1] * longer + [short] * (number - longer)
    return lengths, [0, *itertools.accumulate(lengths[:-1])]


def slopes(constant: Constant, lengths: Sequence[int]) -> list[float]:
    """D sigma / d R_k of each chunk, from the chunks' lengths."""
    return [KAPPA[constant] / len(lengths) / math.sqrt(2 * math.log(n)) for n in lengths]


def divisor(sigma: Tensor, eps: float, place: EpsilonPlace) -> Tensor:
    """d: ``sqrt(sigma**2 + eps)`` (inside), as BatchNorm divides, or ``sigma + eps`` (outside)."""
    return torch.sqrt(sigma * sigma + eps) if place == "inside" else sigma + eps


def bounded(stats: Statistics, grid: Grid | None, narrowest: Narrowest) -> Tensor:
    """The batch's sigma; a channel whose codes are all equal has that of the narrowest ranges.

    Divided by ``sqrt(eps)`` alone, its gradient, and what a rounded mean leaves of its values, would grow by hundreds.
    """
    if grid is None or narrowest == "zero":
        return stats.sigma
    return torch.where(stats.sigma == 0, stats.slope.sum() * grid.steps.scale.reshape(()), stats.sigma)
