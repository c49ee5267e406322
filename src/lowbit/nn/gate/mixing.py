"""One output of a block whose samples took several choices, some of which may skip it.

Notation: as in `lowbit.nn.gate`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.errors import UsageError
from lowbit.nn.gate.cost import SKIP


class At(Protocol):
    """Runs a block on some samples, each at its choice, and gives their mask its gradient."""

    def __call__(self, part: Tensor, chosen: Tensor, told: Tensor | None = None, /) -> Any:
        """The block's output for the samples `part` at the choices `chosen`; `told` is their mask."""


def _weighed(values: Tensor, weights: Tensor) -> Tensor:
    """Each sample times its weight."""
    return values * weights.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))


def output_mixed(
    x: Tensor, mask: Tensor, choices: Sequence[tuple[int, int]], at: At, shortcut: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """``sum_k mask_k block_k(x)``: the block runs all samples at every choice, as in the authors' CIFAR code."""
    total: Tensor | None = None
    for k, pair in enumerate(choices):
        if pair == SKIP:
            y = x if shortcut is None else shortcut(x)
        else:
            y = at(x, torch.full((len(x),), k, dtype=torch.int64, device=x.device))
        if not isinstance(y, Tensor) or (total is not None and y.shape != total.shape):
            raise UsageError(_cannot_mix(x, y))
        term = _weighed(y, mask[:, k])
        total = term if total is None else total + term
    assert total is not None
    return total


def with_skips(
    x: Tensor, mask: Tensor, choice: Tensor, skip: int, at: At, shortcut: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The block for the samples that do not skip it, and the way past it for the others.

    The mask of the skip receives its gradient from the samples that skip, and from the others too if samples pass the
    block unchanged.
    """
    skips = choice == skip
    kept, left = (~skips).nonzero().squeeze(1), skips.nonzero().squeeze(1)
    parts: list[Tensor] = []
    if len(kept):
        y = at(x[kept], choice[kept], mask[kept])
        if not isinstance(y, Tensor) or (shortcut is None and y.shape != x[kept].shape):
            raise UsageError(_cannot_mix(x, y))
        parts.append(y + _weighed(x[kept], mask[kept, skip]) if shortcut is None else y)
    if len(left):
        past = x[left] if shortcut is None else shortcut(x[left])
        parts.append(_weighed(past, mask[left, skip]))
    if len(parts) == 2 and parts[0].shape[1:] != parts[1].shape[1:]:
        raise UsageError(_cannot_mix(x, parts[0]))
    return torch.cat(parts)[torch.cat([kept, left]).argsort()]


def _cannot_mix(x: Tensor, y: object) -> str:
    given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    return (
        f"a gated block maps {tuple(x.shape)} to {given}: to be skipped or to have its outputs mixed, a block gives "
        "one tensor, of the shape of its input or of what its child `shortcut` or `downsample` makes of that"
    )
