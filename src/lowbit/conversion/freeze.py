"""Converted layers whose weights do not train, as 8-bit codes and back."""

from collections import Counter

from torch import nn

from lowbit.errors import UsageError
from lowbit.inputs.checks import checked
from lowbit.nn import QuantLinear
from lowbit.nn.frozen import FrozenLinear
from lowbit.nn.layers import converted_layers


@checked
def freeze_(model: nn.Module) -> dict[str, str]:
    """Keep the weights of converted linear layers that do not train as 8-bit codes, in place: a quarter of the bytes.

    It is for adapters, such as LoRA's, beside a model that stays as it is: make the adapters first, which set
    ``requires_grad`` of all other parameters to False. The codes are those of the product `output`, so they are the
    weights that the layer multiplied by before. `grad_input` is quantised from the values of these codes. A weight that
    several modules share stays as it is. The memory is paid for in time: every product makes the weight anew.

    `model.state_dict()` keeps its keys and gives plain float tensors, which take their full bytes while it is made.
    Reading or changing ``layer.weight`` raises: call `thaw_` first, for example before adapters are merged.

    Args:
        model: a converted model.

    Returns:
        For each converted linear layer, by its name, why its weight stays as it is; "" where it became codes.

    Raises:
        UsageError: no weight becomes codes; nothing is changed then.
    """
    layers = {name: layer for name, layer in converted_layers(model).items() if isinstance(layer, QuantLinear)}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, FrozenLinear):
            reasons[name] = ""
        elif type(layer) is not QuantLinear:
            reasons[name] = f"it is a {type(layer).__name__}"
        else:
            shared = "other modules share its weight" if owners[id(layer.weight)] > 1 else ""
            reasons[name] = FrozenLinear.reason_to_stay(layer) or shared
    if "" not in reasons.values():
        first = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(reasons.items())[:3])
        raise UsageError(f"freeze_: no weight can be kept as codes. {first or 'No linear layer is converted'}")
    for name, layer in layers.items():
        if not reasons[name] and not isinstance(layer, FrozenLinear):
            frozen: nn.Module = layer
            frozen.__class__ = FrozenLinear
            assert isinstance(frozen, FrozenLinear)
            frozen.freeze()
    return reasons


@checked
def thaw_(model: nn.Module) -> None:
    """Make the weights that `freeze_` turned into codes float parameters again: the values that the layers ran with.

    Raises:
        UsageError: no weight in the model is kept as codes.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    if not layers:
        raise UsageError("thaw_: no weight in this model is kept as codes")
    for layer in layers:
        layer.thaw()
