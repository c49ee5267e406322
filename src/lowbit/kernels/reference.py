"""The definition of every kernel in plain torch, on any device.

Notation: x real value, q code (a whole number held in float), S scale, z zero point, u noise in [0, 1).
"""

import torch
from torch import Tensor

from lowbit.rounding import round_nearest, round_stochastic


def scale_of(span: Tensor, levels: Tensor | float, floor: float) -> Tensor:
    """``S = max(span / levels, floor)``; with floor 0 a zero scale becomes 1, so that nothing divides by zero.

    Args:
        span: float, the width that `levels` steps must cover; 0 or more.
        levels: number of steps, a number or scalar tensor.
        floor: the smallest scale.
    """
    scale = span / levels
    if floor:
        return scale.clamp(min=floor)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def zero_point(lo: Tensor, scale: Tensor, levels: Tensor | float) -> Tensor:
    """``z = clamp(round(-lo / S), 0, levels)``, halves to even; nan where the scale is not finite."""
    return _bound(round_nearest(-lo / scale), 0.0, levels)


def _bound(t: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clamp `t` in place; nan stays nan."""
    if isinstance(high, Tensor):
        return t.clamp_(low.to(t) if isinstance(low, Tensor) else t.new_tensor(low), high.to(t))
    return t.clamp_(float(low), high)


def _round(t: Tensor, noise: Tensor | None) -> Tensor:
    return round_nearest(t) if noise is None else round_stochastic(t, noise)


def codes_symmetric(x: Tensor, scale: Tensor, levels: Tensor | float, noise: Tensor | None) -> Tensor:
    """``q = clamp(round(x / S), -levels, levels)``."""
    return _bound(_round(x / scale, noise), -levels, levels)


def codes_affine(x: Tensor, scale: Tensor, zero: Tensor, levels: Tensor | float, noise: Tensor | None) -> Tensor:
    """``q = clamp(round(x / S) + z, 0, levels)``: z is added after rounding, so real zero stays exact."""
    return _bound(_round(x / scale, noise).add_(zero), 0.0, levels)


def codes_offset(x: Tensor, scale: Tensor, offset: Tensor, levels: Tensor | float, noise: Tensor | None) -> Tensor:
    """``q = round(clamp((x - lo) / S, 0, levels))``."""
    return _round(_bound((x - offset) / scale, 0.0, levels), noise)
