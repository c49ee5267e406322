"""Range BN as one call, on the engine that the setting asks for, by autograd or on a tape."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.functional import autocast_device
from lowbit.kernels.memory import in_memory, is_channels_last
from lowbit.nn.norm.codes import RangeBatchNormOfCodes, codes_of
from lowbit.nn.norm.definition import RangeBatchNorm
from lowbit.nn.norm.setting import NormSetting
from lowbit.products import strides


class Tape:
    """What autograd keeps of a function for its backward, if the backward is called separately.

    Attributes:
        saved_tensors: as in a context of autograd.
        kept: what else the function keeps.
        rectified: the result, if a ReLU after the function made it.
        function: the function that ran.
    """

    saved_tensors: tuple[Tensor | None, ...] = ()
    kept: Any = None
    rectified: Tensor | None = None
    function: Any = None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        """Do nothing: only the backward of y is asked for."""

    @torch.no_grad()
    def backward(self, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of input, gamma and beta."""
        if self.rectified is not None:
            g = g * (self.rectified > 0)
        g = g.float() if self.function is RangeBatchNorm and g.dtype in (torch.bfloat16, torch.float16) else g
        with torch.autocast(autocast_device(g), enabled=False):
            dx, d_gamma, d_beta, *_ = self.function.backward(self, g, None, None)
        return dx, d_gamma, d_beta


def _run(function: Any, tape: Tape | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """An autograd function, or its forward alone, which keeps what it needs on a tape."""
    if tape is None:
        applied: Callable[..., tuple[Tensor, Tensor, Tensor]] = function.apply
        return applied
    tape.function = function
    return partial(function.forward, tape)


def range_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    setting: NormSetting,
    fixed: tuple[Tensor, Tensor] | None = None,
    tape: Tape | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Range Batch-Norm with its quantisers, differentiable in x, weight and bias.

    Args:
        x: float ``(B, C, *size)`` or ``(B, C)``.
        weight: gamma ``(C,)``, or None for 1.
        bias: beta ``(C,)``, or None for 0.
        setting: constant, chunks, epsilon, formats, noise.
        fixed: ``(mu, sigma)`` to normalise with, as in evaluation; None: those of this batch.
        tape: what takes the place of autograd; None: autograd.

    Returns:
        ``(y, mu, sigma)``: y in the dtype of `x`, mu and sigma ``(C,)`` without gradient.

    Raises:
        ValueError: fewer than 2 values per channel, unless `fixed` is given.
        RuntimeError: gamma, beta or fixed statistics do not have one number for each channel.

    Source: Banner et al. 2018, arXiv:1805.11046, section 3; backward derived and checked against the authors' code.
    """
    mean, sigma = fixed or (None, None)
    for what, v in (("gamma", weight), ("beta", bias), ("running mean", mean), ("running variance", sigma)):
        if v is not None and v.shape != x.shape[1:2]:
            raise RuntimeError(
                f"{setting.layer or 'Range BN'}: {what} of shape {tuple(v.shape)} for an input of shape "
                f"{tuple(x.shape)}: give one number for each of {x.shape[1]} channels"
            )
    x, dtype, wanted = in_memory(x), x.dtype, strides.of_normalization(x)
    if setting.engine == "int8" and x.device.type == "cpu" and not is_channels_last(x) and x.dim() > 1:
        x = strides.laid_out(x, strides.channels_last(x.shape))
    codes = codes_of(x, setting, "input") if fixed is not None or x.numel() > x.shape[1] else None
    expected = ("grad_input",) if torch.is_grad_enabled() and x.requires_grad else ()
    if codes is not None:
        with torch.autocast("cpu", enabled=False):
            run = _run(RangeBatchNormOfCodes, tape)
            y, mean, sigma = run(x, weight, bias, setting, fixed, codes, expected)
        return strides.laid_out(y, wanted), mean, sigma
    x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
    with torch.autocast(autocast_device(x), enabled=False):
        y, mean, sigma = _run(RangeBatchNorm, tape)(x, weight, bias, setting, fixed, expected)
    y = strides.laid_out(y.to(dtype), wanted)
    y = y.relu() if setting.rectify else y
    if tape is not None and setting.rectify:
        tape.rectified = y
    return y, mean, sigma
