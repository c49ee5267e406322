"""Ranges: the extremes (lo, hi) that a scale is made from, measured on a tensor or kept running.

Notation: r running extreme, m weight of its old value.
"""

import math
from typing import get_args

import torch
from torch import Tensor

from lowbit.errors import unknown
from lowbit.formats import Integer, RangeRule, RunningStart, check_defined
from lowbit.kernels import cpu

_RULES = get_args(RangeRule)


def extremes(x: Tensor, *, rule: RangeRule, dims: tuple[int, ...], fewest: int | None = None) -> tuple[Tensor, Tensor]:
    """The lo and hi of what shares a scale.

    Args:
        x: float, any shape.
        rule: ``"minmax"``: smallest and largest over `dims`. ``"sample-mean"``: the mean over the first axis of
            each sample's smallest and largest (then `dims` must be all dims).
        dims: the dims that share one scale.
        fewest: as of `lowbit.formats.Integer`.

    Returns:
        lo and hi with `dims` kept as 1, in the dtype of `x`; a mean, which float64 sums, in float32 for 16-bit types.
        Zeros for an empty tensor; nan where a nan is.

    Raises:
        ValueError: the sample mean of less than the whole tensor.

    Source: the mean over samples is Banner et al. 2018's protection against outliers, as in the authors' code.
    """
    dims = tuple(d % x.dim() for d in dims)
    if rule not in _RULES:
        raise unknown("range rule", rule, _RULES)
    if rule == "sample-mean" and len(dims) < x.dim():
        raise ValueError(f"the mean of per-sample extremes is over all dims of {tuple(x.shape)}, not over {dims}")
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    if x.numel() == 0:
        zeros = x.new_zeros(shape)
        return zeros, zeros
    if not dims:
        return x, x
    samples = samples_of(x.shape, rule, fewest)
    if cpu.runs(x) and len(dims) == x.dim() and _is_dense(x):
        lo, hi = cpu.extremes(x, (1, samples, x.numel() // samples, False))
    elif samples > 1:
        lo, hi = x.flatten(1).amin(1), x.flatten(1).amax(1)
    else:
        return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    return _mean(lo).reshape(shape), _mean(hi).reshape(shape)


def samples_of(shape: torch.Size, rule: RangeRule, fewest: int | None) -> int:
    """Of how many samples the extremes are averaged: 1 where they are those of the whole tensor."""
    averaged = rule == "sample-mean" and len(shape) > 1 and math.prod(shape[1:]) >= (fewest or 1)
    return shape[0] if averaged else 1


def _mean(v: Tensor) -> Tensor:
    """The mean in float64, so that the order of the sum does not show, rounded to float32 where it is not float64."""
    wide = torch.float32 if v.device.type == "mps" else torch.float64  # mps has no float64
    return v.mean(dtype=wide).to(torch.promote_types(v.dtype, torch.float32))


def _is_dense(x: Tensor) -> bool:
    """Whether memory holds the samples one after the other, without gaps."""
    return x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())


def new_running_range() -> Tensor:
    """An empty running range: float32 ``(3,)`` with lo, hi and the number of batches recorded."""
    return torch.zeros(3, dtype=torch.float32, device="cpu")


def record_range(running: Tensor, lo: Tensor, hi: Tensor, *, momentum: float, start: RunningStart) -> None:
    """Update `running` in place: ``r = m r + (1 - m) new``; with start ``"first"`` the first batch is taken whole.

    A batch whose extremes are not finite is not recorded: it must not decide every later evaluation.

    Args:
        running: float ``(3,)`` from `new_running_range`.
        lo: smallest value of the batch, one element.
        hi: largest value of the batch, one element.
        momentum: m in [0, 1).
        start: ``"first"`` or ``"zero"`` (no correction for the start at zero).
    """
    new = torch.stack([lo.reshape(()), hi.reshape(())]).to(running)
    weight = torch.full_like(running[2], momentum)
    if start == "first":
        weight = torch.where(running[2] == 0, torch.zeros_like(weight), weight)
    finite = new.isfinite().all()
    running[:2] = torch.where(finite, running[:2] * weight + new * (1 - weight), running[:2])
    running[2] += finite


def observed_extremes(x: Tensor, fmt: Integer, running: Tensor, *, training: bool) -> tuple[Tensor, Tensor] | None:
    """The extremes to use for a whole tensor, recording them in training.

    Args:
        x: float, any shape.
        fmt: the format; only one with `running` set keeps a running range.
        running: its running range; changed in place in training.
        training: True records the batch's extremes and returns them; False returns the running ones, or the
            batch's where none was recorded yet.

    Returns:
        lo and hi of shape ``(1,) * x.dim()``, float32 for 16-bit types; None where `fmt` keeps no running range. nan
        where `x` has a nan or inf, which would else be clipped to a number.
    """
    check_defined(fmt)
    if fmt.running is None or x.numel() == 0:
        return None
    x = x.detach()
    if cpu.runs(x) and x.dim() and _is_dense(x) and running.dtype == torch.float32 and running.device == x.device:
        return cpu.observe(
            x,
            samples_of(x.shape, fmt.range, fmt.fewest),
            running,
            momentum=fmt.running,
            first=fmt.running_start == "first",
            training=training,
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    lo, hi = (v.to(wide) for v in extremes(x, rule=fmt.range, dims=tuple(range(x.dim())), fewest=fmt.fewest))
    if training:
        record_range(running, lo, hi, momentum=fmt.running, start=fmt.running_start)
        return lo, hi
    kept = running.to(lo)
    own = (kept[2] == 0) | ~(lo.isfinite() & hi.isfinite())
    return torch.where(own, lo, kept[0]), torch.where(own, hi, kept[1])
