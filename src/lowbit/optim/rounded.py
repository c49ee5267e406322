"""Momentum in the number formats of a recipe, each rounded before the next step of the formula reads it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RunError, UsageError
from lowbit.inputs.checks import check_whole, checked, is_finite
from lowbit.methods.update import Update
from lowbit.numerics.formats import FP32, Format
from lowbit.optim.stored import Draws, on_grid

_MOMENTUM = "momentum_buffer"


class RoundedSGD(torch.optim.Optimizer):
    """SGD with momentum whose weights, momentum, gradients and learning rate lie on grids.

    ``a = momentum(m a + gradient(g + d w))`` and ``w = weight(w - lr(r) a)``, for the formats of the update, the factor
    m, the decay d and the learning rate r. The weights see the rounded momentum: `torch.optim.SGD` in a
    `lowbit.optim.LowBitOptimizer` would round it only after they did.

    Args:
        params: parameters or groups of them. A group with ``rounded=False`` is not rounded.
        lr: the learning rate r.
        momentum: the factor m.
        weight_decay: the decay d, part of the gradient before it is rounded.
        update: the formats.
        seed: of stochastic rounding.

    Raises:
        UsageError: a number is negative or not finite, or the update names a state other than ``momentum_buffer``.

    Source: Yang et al. 2020, WAGEUBN, arXiv:1909.02384, and Gupta et al. 2015, arXiv:1502.02551.
    """

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        update: Update | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not is_finite(value) or value < 0:
                raise UsageError(f"{name}={value!r}: give a finite number of at least 0")
        check_whole("seed", seed, 0, 2**64 - 1)
        if update is not None and (wrong := {name for name, _ in update.states} - {_MOMENTUM}):
            raise UsageError(f"update.states has {min(wrong)!r}: the only state of RoundedSGD is {_MOMENTUM!r}")
        self.update = update or Update()
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "seed": seed, "rounded": True}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, and the loss of the closure.

        Raises:
            RunError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group, number)
                number += 1
        return loss

    def _step(self, p: Tensor, group: dict[str, Any], number: int) -> None:
        assert p.grad is not None
        if p.grad.layout is not torch.strided:
            raise RunError("RoundedSGD: a gradient is sparse; make it dense, e.g. nn.Embedding(sparse=False)")
        formats = self.update if group["rounded"] else Update()
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        draws = Draws(seed=group["seed"], step=state["step"])

        def rounded(x: Tensor, fmt: Format, name: str) -> Tensor:
            return on_grid(x, fmt, draws, number, name)

        g = rounded(p.grad.add(p, alpha=group["weight_decay"]), formats.gradient_of(p.dim()), "gradient")
        a = state.get(_MOMENTUM)
        a = g if a is None else a * group["momentum"] + g
        state[_MOMENTUM] = a = rounded(a, dict(formats.states).get(_MOMENTUM, FP32), _MOMENTUM)
        lr = float(rounded(torch.tensor(float(group["lr"]), dtype=torch.float64, device="cpu"), formats.lr, "lr"))
        p.copy_(rounded(p - lr * a, formats.weight, "weight"))
