"""Ranges: the extremes (lo, hi) that a scale is made from, measured on a tensor or kept running.

Notation: r running extreme, m weight of its old value.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit import ranks
from lowbit.errors import UsageError, shown
from lowbit.kernels import cpu
from lowbit.numerics.formats import Format, check_defined
from lowbit.numerics.scales import RANGE_RULES, MinMax, RangeRule, RunningStart, SampleMean, mean

# The rules that native passes compute, as the mean of the extremes of a number of samples.
_NATIVE = (MinMax, SampleMean)


def extremes(x: Tensor, *, rule: RangeRule, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The lo and hi of what shares a scale.

    Args:
        x: float, any shape.
        rule: how they are measured.
        dims: the dims that share one scale.

    Returns:
        lo and hi with `dims` kept as 1, in the dtype of `x`. A mean is summed in float64, and is float32 for
        16-bit types. Zeros for an empty tensor; nan where a nan is.

    Raises:
        UsageError: a rule that is not defined.
        ValueError: a rule for whole tensors is asked for less.
    """
    dims = tuple(d % x.dim() for d in dims)
    if type(rule) not in RANGE_RULES:
        raise UsageError(f"the range rule {shown(rule)} is not one of lowbit.numerics.scales: list it there")
    if rule.per_tensor and len(dims) < x.dim():
        raise ValueError(f"range {rule.kind!r} is over all dims of {tuple(x.shape)}, not over {dims}")
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    if x.numel() == 0:
        zeros = x.new_zeros(shape)
        return zeros, zeros
    if type(rule) in _NATIVE:
        if not dims:
            return x, x
        if cpu.runs(x) and len(dims) == x.dim() and _is_dense(x):
            samples = rule.samples(x.shape) or 1
            lo, hi = cpu.extremes(x, (1, samples, x.numel() // samples, False))
            return mean(lo).reshape(shape), mean(hi).reshape(shape)
    return rule.extremes(x, dims)


def shared_extremes(x: Tensor, *, rule: RangeRule, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The lo and hi of a whole tensor of which each process of a group has some samples, on all of them.

    Args:
        x: float, the samples of this process along the first axis.
        rule: how they are measured.
        group: the processes; None: all.

    Returns:
        What `extremes` gives for the whole tensor, of shape ``(1,) * x.dim()``.
    """
    one = (1,) * x.dim()
    wide = torch.promote_types(x.dtype, torch.float32)
    if rule.samples(torch.Size((2, *x.shape[1:]))) == 2:  # of samples of this size, it takes the mean
        rows = x.flatten(1)
        own = torch.stack(
            [rows.amin(1).double().sum(), rows.amax(1).double().sum(), rows.new_tensor(len(rows)).double()]
        )
        lo, hi, count = ranks.gathered(own, group).sum(0)
        return (lo / count).to(wide).reshape(one), (hi / count).to(wide).reshape(one)
    every = ranks.gathered(torch.stack(extremes(x, rule=rule, dims=tuple(range(x.dim())))), group)
    return every[:, 0].amin(0).to(wide).reshape(one), every[:, 1].amax(0).to(wide).reshape(one)


def _is_dense(x: Tensor) -> bool:
    """Whether memory holds the samples one after the other, without gaps."""
    return x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())


def new_running_range() -> Tensor:
    """An empty running range: float32 ``(3,)`` with lo, hi and the number of batches recorded."""
    return torch.zeros(3, dtype=torch.float32, device="cpu")


def record_range(running: Tensor, lo: Tensor, hi: Tensor, *, momentum: float, start: RunningStart) -> None:
    """Update `running` in place: ``r = m r + (1 - m) new``; with start ``"first"``, r starts as the first batch's.

    A batch whose extremes are not finite is not recorded, or it would decide every later evaluation.

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


def observed_extremes(x: Tensor, fmt: Format, running: Tensor, *, training: bool) -> tuple[Tensor, Tensor] | None:
    """The extremes to use for a whole tensor, recording them in training.

    Args:
        x: float, any shape.
        fmt: the format; only one with `running` set keeps a running range.
        running: its running range; changed in place in training.
        training: True records the batch's extremes and returns them; False returns the running ones, or the
            batch's if none was recorded yet.

    Returns:
        lo and hi of shape ``(1,) * x.dim()``, float32 for 16-bit types; None if `fmt` does not keep a running range.
        nan if `x` has a nan or inf, which would otherwise be clipped to a number.
    """
    check_defined(fmt)
    if fmt.scale is None or fmt.scale.running is None or x.numel() == 0:
        return None
    x, scale, rule, momentum = x.detach(), fmt.scale, fmt.scale.range, fmt.scale.running
    native = cpu.runs(x) and x.dim() and _is_dense(x) and type(rule) in _NATIVE
    if native and running.dtype == torch.float32 and running.device == x.device:
        return cpu.observe(
            x,
            rule.samples(x.shape) or 1,
            running,
            momentum=momentum,
            first=scale.running_start == "first",
            training=training,
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    lo, hi = (v.to(wide) for v in extremes(x, rule=rule, dims=tuple(range(x.dim()))))
    if training:
        record_range(running, lo, hi, momentum=momentum, start=scale.running_start)
        return lo, hi
    kept = running.to(lo)
    own = (kept[2] == 0) | ~(lo.isfinite() & hi.isfinite())
    return torch.where(own, lo, kept[0]), torch.where(own, hi, kept[1])
