"""Linear layers whose weight does not train and is kept as 8-bit codes, a quarter of its bytes.

Notation: W weight ``(N, K)``, q codes ``(N, K)`` in -127..127, S scales ``(N, 1)``. The weight of a frozen layer is
``q * S``, made anew for each product and given up after it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import functional
from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe
from lowbit.nn.layers import QuantLinear
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.quantizer import encode
from lowbit.products.setting import Setting

# What the weight of `output` must be rounded to, so that the codes are those that the layer multiplies by anyway.
CODES: Format = integer(bits=8, zero="symmetric", granularity="kept-channel")
_MOST_TRIES = 4


class FrozenWeight(nn.Module):
    """A weight as codes and scales.

    Args:
        weight: float32 ``(N, K)``.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = _encoded(weight.detach())
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def values(self) -> Tensor:
        """The weight, float32 ``(N, K)``."""
        return self.codes * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to another device, but not to another dtype, in which scales would be others."""
        device = fn(torch.empty(0, dtype=torch.float32, device=self.scale.device)).device
        return super()._apply(lambda t: t.to(device), recurse)


def _encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales whose values give the same codes and scales again, bit for bit.

    The scale is the largest value divided by 127. Rounding of this quotient may give another last digit the second
    time, and then the same again.
    """
    codes, scale = _once(weight)
    for _ in range(_MOST_TRIES):
        before, (codes, scale) = scale, _once(codes * scale)
        if torch.equal(before, scale):
            break
    return codes.to(torch.int8), scale


def _once(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, in float32, and scales."""
    found = encode(weight, CODES, dims=(1,))
    assert found.steps is not None
    return found.q, found.steps.scale


class FrozenLinear(QuantLinear):
    """A converted linear layer with a weight of codes: the products are those of a layer with the weight ``q * S``."""

    plain = nn.Linear
    frozen: FrozenWeight

    @classmethod
    def reason_to_stay(cls, layer: QuantLinear) -> str:
        """Why a converted layer cannot become this; empty if it can."""
        recipe: Recipe = layer.site.recipe
        if layer.weight.requires_grad:
            return "its weight trains"
        if layer.weight.dtype != torch.float32:
            return f"its weight is {layer.weight.dtype}, not float32"
        if layer.site.is_controlled or recipe.is_dynamic or recipe.output.weight != CODES:
            return f"recipe {recipe.name!r} does not round it to {CODES} in `output`, always"
        return ""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # in the place of the parameter
        """There is none to read or write: what is written to a copy of it would be lost."""
        raise UsageError(
            f"{self.site.name or 'the layer'}: its weight is kept as codes: call lowbit.thaw_(model) before you read, "
            "change or merge weights"
        )

    def freeze(self) -> None:
        """Turn the parameter into codes; the class is this one already."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.frozen = FrozenWeight(weight)

    def thaw(self) -> None:
        """Become a converted layer with a parameter again, of the weight that ran."""
        weight = nn.Parameter(self.frozen.values(), requires_grad=False)
        del self.frozen
        layer: Any = self
        layer.__class__ = QuantLinear
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update({"weight": weight, **others})  # in the order of the plain layer

    def undo(self) -> None:
        """Become the plain layer again, with a parameter."""
        self.thaw()
        QuantLinear.undo(self)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain layer's argument
        """See `lowbit.functional.linear`; the backward makes the weight again."""
        setting = self.site.setting(input)
        if isinstance(setting, Setting):
            setting = replace(setting, remake=self.frozen.values)
        return functional.linear(input, self.frozen.values(), self.bias, setting=setting)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The keys and tensors of the plain layer."""
        destination[prefix + "weight"] = self.frozen.values()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Turn the weight of a state into codes; one that a frozen layer saved gives the same codes again."""
        key = prefix + "weight"
        if key in state_dict:
            codes, scale = _encoded(state_dict[key].float())
            self.frozen.codes.copy_(codes)
            self.frozen.scale.copy_(scale)
        elif strict:
            missing.append(key)
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, *rest)
