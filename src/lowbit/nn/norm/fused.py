"""Range BN and the ReLU right after it in one pass over memory, in a container that knows of both."""

import itertools
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lowbit.nn.callstack import others_look_on
from lowbit.nn.norm.layers import RangeBatchNormNd


class FusedSequential(nn.Sequential):
    """`torch.nn.Sequential` in which a Range BN does the ReLU right after it in its own pass over memory.

    Only here is it known that nothing else sees what lies between them. A separate call of the normalisation, a slice
    without the ReLU, and a hook on either of them get what they got before.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the plain container's argument
        """Call the modules one after the other, a Range BN together with the ReLU after it.

        A compiled model calls each separately, with the same results.
        """
        if torch.compiler.is_compiling():
            for part in self:
                input = part(input)  # noqa: A001 - the plain container's argument
            return input
        x, modules = input, iter(self)
        following = next(modules, None)
        while (module := following) is not None:
            following = next(modules, None)
            if is_fusible(module, following) and _is_called_plainly(module) and _is_called_plainly(following):
                x = module.normalize(x, rectify=True)
                following = next(modules, None)
            else:
                x = module(x)
        return x


def has_fused_pair(module: nn.Module) -> bool:
    """Whether this is a plain `torch.nn.Sequential` with a Range BN on the int8 engine right before a ReLU."""
    return type(module) is nn.Sequential and any(is_fusible(*pair) for pair in itertools.pairwise(module))


def is_fusible(norm: nn.Module, relu: nn.Module | None) -> TypeGuard[RangeBatchNormNd]:
    """Whether these are a Range BN and a ReLU that can run as one, and gain by it on the engine of the first."""
    return isinstance(norm, RangeBatchNormNd) and type(relu) is nn.ReLU and norm.site.engine == "int8"


# What a plain call of either module runs.
_PLAIN_FORWARDS = (RangeBatchNormNd.forward, nn.ReLU.forward)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _is_called_plainly(module: nn.Module | None) -> bool:
    """Whether calling the module runs its class's own forward and nothing else: no hook, no replaced forward."""
    return (
        module is not None
        and type(module).forward in _PLAIN_FORWARDS
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not others_look_on()
    )
