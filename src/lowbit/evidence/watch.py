"""The watcher: it sees every operator that runs outside the products of converted layers, and in which module.

`lowbit.verify` watches a step and lists the products among them; `lowbit.Meter` watches a forward and counts them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit.evidence import outside
from lowbit.evidence.formulas import Multiplication
from lowbit.nn.callstack import Callstack
from lowbit.products import watch


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator that ran.

    Args:
        func: the operator, e.g. ``torch.ops.aten.mm.default``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it gave.
        module: the innermost module of the watched model that it ran in, ``""`` outside its modules' calls; in a
            backward, the module that made the node. None if only another model's modules ran.
    """

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any
    module: str | None

    @property
    def name(self) -> str:
        """Its name without the overload, e.g. ``"aten.mm"``."""
        return str(self.func._overloadpacket)

    @property
    def is_view(self) -> bool:
        """Whether its result is only another view of its argument's memory."""
        return bool(self.func.is_view) or self.func._overloadpacket is torch.ops.aten._unsafe_view

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies: counted or not."""
        return outside.multiplies(self.func)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def multiplications(self) -> list[Multiplication] | None:
        """What it multiplies in a forward pass, see `lowbit.evidence.outside.multiplications`."""
        return outside.multiplications(self.func, self.args, self.kwargs, self.result)

    def macs(self) -> int | None:
        """Its multiply-accumulates, forward or backward; None if there is no formula."""
        return outside.macs(self.func, self.args, self.kwargs, self.result)


Watcher = Callable[[Operation], None]


@contextmanager
def watched_by(watcher: Watcher, model: nn.Module) -> Iterator[None]:
    """Call `watcher` with every operator that this thread runs in this context outside converted layers' products.

    Args:
        watcher: takes each operator after it ran.
        model: whose modules are named.
    """
    with Callstack(model) as callstack, _Mode(watcher, callstack):
        yield


class _Mode(TorchDispatchMode):
    def __init__(self, watcher: Watcher, callstack: Callstack) -> None:
        super().__init__()
        self._watcher = watcher
        self._callstack = callstack

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if watch.is_inside():
            return func(*args, **kwargs)
        if outside.arrives_whole(func):
            with self:
                return outside.call_parts(func, args, kwargs)
        result = func(*args, **kwargs)
        self._callstack.mark()
        self._watcher(Operation(func=func, args=args, kwargs=kwargs, result=result, module=self._callstack.name()))
        return result
