"""Range BN in plain torch, forward and backward, on any device: the definition.

Notation: as in `lowbit.nn.norm`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lowbit.methods.normalization import EpsilonPlace
from lowbit.nn.norm.setting import NormSetting
from lowbit.nn.norm.statistics import Statistics, bounded, divisor, range_statistics, shared_statistics


class RangeBatchNorm(torch.autograd.Function):
    """Values in the input's format are normalised; the gradient is put into its format before the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        setting: NormSetting,
        fixed: tuple[Tensor, Tensor] | None,
        expected: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mu and sigma."""
        hat = setting.quantized(x, "input", expected)
        values, norm = hat.values, setting.norm
        stats = None
        if fixed is None:
            constant, chunks, fewest = norm.constant, norm.chunks, norm.fewest_per_chunk
            if setting.shared:
                stats = shared_statistics(values, constant=constant, chunks=chunks, fewest=fewest, group=setting.group)
            else:
                stats = range_statistics(values, constant=constant, chunks=chunks, fewest=fewest)
            mean, sigma = stats.mean, stats.sigma
            d = divisor(bounded(stats, hat.grid, norm.narrowest), setting.eps, norm.epsilon)
        else:
            mean, sigma = fixed
            d = divisor(sigma, setting.eps, norm.epsilon)
        normalized = (values - per_channel(mean, x)).div_(per_channel(d, x))
        y = normalized.clone() if weight is None else normalized * per_channel(weight, x)
        y = y if bias is None else y.add_(per_channel(bias, x))
        ctx.save_for_backward(normalized, weight, sigma, d)
        ctx.kept = (setting, stats, bias is not None)
        ctx.mark_non_differentiable(mean, sigma)
        return y, mean, sigma

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        """Gradients of x, gamma and beta."""
        refuse_second_derivative()
        normalized, weight, sigma, d = ctx.saved_tensors
        setting, stats, has_bias = ctx.kept
        grads = range_batch_norm_backward(
            setting.quantized(grad_output, "grad_output").values,
            normalized,
            weight,
            sigma,
            d,
            stats,
            setting.norm.epsilon,
        )
        return grads[0], grads[1] if weight is not None else None, grads[2] if has_bias else None, None, None, None


def refuse_second_derivative() -> None:
    """Raise in a backward that autograd records."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Range BN has no second derivative here: call backward without create_graph=True, or restore_ the layer"
        )


def range_batch_norm_backward(
    g: Tensor,
    normalized: Tensor,
    weight: Tensor | None,
    sigma: Tensor,
    d: Tensor,
    stats: Statistics | None,
    place: EpsilonPlace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta.

    With ``G = gamma g``, ``dx = (G - mean G) / d``, and the extremes of chunk k further receive plus (largest) and
    minus (smallest) ``-(sum G x_normalised) / d * (dd/dsigma) * (dsigma/dR_k)``. With fixed statistics ``dx = G / d``.
    If several processes share the batch, means and sums in dx are those of all; the gradients of gamma and beta are
    those of this process, which data parallel training averages as it does all others.
    """
    axes = (0, *range(2, g.dim()))
    grad_weight = (g * normalized).sum(axes)
    grad_bias = g.sum(axes)
    gamma = torch.ones_like(d) if weight is None else weight
    if stats is None:
        return g * per_channel(gamma / d, g), grad_weight, grad_bias
    part = stats.part
    count = g.numel() // g.shape[1] if part is None else part.count
    of_all, bias_of_all = (v if part is None else part.total(v) for v in (grad_weight, grad_bias))
    dx = (g - per_channel(bias_of_all / count, g)).mul_(per_channel(gamma / d, g)).contiguous()
    slope_d = sigma / d if place == "inside" else torch.ones_like(d)
    grad_sigma = -gamma * of_all / d * slope_d
    share = grad_sigma[:, None] * stats.slope
    flat = dx.view(-1)
    above, below = (share, -share) if part is None else (share * part.has_max, -share * part.has_min)
    flat.index_add_(0, _flat_index(stats.argmax, g.shape), above.flatten())
    flat.index_add_(0, _flat_index(stats.argmin, g.shape), below.flatten())
    return dx, grad_weight, grad_bias


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """`v` of shape ``(C,)`` so that it broadcasts against `x`."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def _flat_index(index: Tensor, shape: torch.Size) -> Tensor:
    """Batch-major indices ``(C, K)`` within each channel as indices into contiguous ``(B, C, *size)``."""
    positions = math.prod(shape[2:])
    channel = torch.arange(shape[1], dtype=torch.int64, device=index.device)[:, None]
    return ((index // positions * shape[1] + channel) * positions + index % positions).flatten()
