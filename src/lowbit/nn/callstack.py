"""Which module of one model runs now: in a forward by the calls of one thread, in a backward by what made the node.

`torch.utils.module_tracker` does not do: it names modules by class and path, so two models share names, and it follows
the calls of all threads at once.
"""

import threading
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules import module as torch_module


class Callstack:
    """The calls of modules in the thread that entered this context, by the names that one model gives them.

    Its hooks are global. Hooks on each module would change what runs: `nn.TransformerEncoderLayer` would leave its fast
    path, and a Range BN would not be fused with the ReLU after it.

    Args:
        model: the model whose modules are named.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._of_nodes: dict[int, str | None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._before_all = _last_node()
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._enter),
            torch_module.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _args: object) -> None:
        if threading.get_ident() == self._thread:
            self._stack.append(module)

    def _leave(self, module: nn.Module, _args: object, _output: object) -> None:
        # A module that was entered before this context may leave in it.
        if threading.get_ident() == self._thread and self._stack and self._stack[-1] is module:
            self._stack.pop()

    def name(self) -> str | None:
        """The innermost running module of the model, ``""`` between calls; None if only another model's run."""
        if self._stack:
            return next((self._names[m] for m in reversed(self._stack) if m in self._names), None)
        node = torch._C._current_autograd_node()
        return "" if node is None else self._of_nodes.get(node._sequence_nr(), "")

    def mark(self) -> None:
        """Remember who made the last node of the graph: call this for each operator that is dispatched."""
        node = _last_node()
        if node > self._before_all:
            self._of_nodes.setdefault(node, self.name())


def _last_node() -> int:
    """The number of the last node that this thread's autograd made."""
    return int(torch._C._autograd._get_sequence_nr()) - 1


def others_look_on() -> bool:
    """Whether anything but a `Callstack` has hooks on all modules, which see what each gets and returns."""
    tables = (
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
    )
    hooks = [hook for table in tables for hook in table.values()]
    return any(not isinstance(getattr(hook, "__self__", None), Callstack) for hook in hooks)
