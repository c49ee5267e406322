"""Containers of torch that would bypass the converted layers inside them, or that can run two of them as one."""

from typing import Any

from torch import nn

from lowbit.nn.layers import QuantLayer
from lowbit.nn.norm import FusedSequential, has_fused_pair


def adapt(module: nn.Module) -> None:
    """Make a container call its converted layers, in evaluation too, and fuse those that can be fused."""
    _forbid_bypass(module)
    if has_fused_pair(module):
        module.__class__ = FusedSequential


def restore(module: nn.Module) -> None:
    """Undo `adapt`, once no layer inside is converted."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _call_my_layers:
            del module._forward_pre_hooks[key]
    if "_lowbit_nested" in module.__dict__:
        module.use_nested_tensor = module.__dict__.pop("_lowbit_nested")
    if type(module) is FusedSequential and not any(isinstance(m, QuantLayer) for m in module):
        container: Any = module
        container.__class__ = nn.Sequential


def _call_my_layers(_module: nn.Module, _args: object) -> None:
    """A hook that does nothing: torch takes its fused encoder path only if no module has a hook."""


def _forbid_bypass(module: nn.Module) -> None:
    """Make nn.TransformerEncoderLayer call its converted linear layers in evaluation too."""
    if _call_my_layers in module._forward_pre_hooks.values() or "_lowbit_nested" in module.__dict__:
        return  # an earlier conversion did it
    if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, QuantLayer) for m in module.modules()):
        module.register_forward_pre_hook(_call_my_layers)
    if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, QuantLayer) for m in module.modules()):
        module.__dict__["_lowbit_nested"] = module.use_nested_tensor
        module.use_nested_tensor = False
