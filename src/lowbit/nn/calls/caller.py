"""Callers: modules whose forward is watched for products by weights.

A module becomes one by changing its class to a subclass of its own class that bears the same name. It keeps its
forward, its parameters, its hooks and its place; `stop_watching` changes the class back.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lowbit.nn.calls import watching
from lowbit.nn.calls.call import Calls
from lowbit.nn.site import runs_eagerly


class Caller(nn.Module):
    """A module whose products in functions are converted.

    Its calls are among its `named_modules`, but not among its children, over which its own forward may go.

    Attributes:
        lowbit_plain: the class of the module; a name that hides no attribute of the module's own.
        lowbit_calls: its calls.
    """

    lowbit_plain: ClassVar[type[nn.Module]]
    lowbit_calls: Calls

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in the plain module, and then the calls with their sites."""
        memo = set() if memo is None else memo
        is_new = self not in memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if is_new or not remove_duplicate:
            for name, layer in self.lowbit_calls.layers.items():
                yield from layer.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def train(self, mode: bool = True) -> Self:
        """As in the plain module, and for the calls."""
        super().train(mode)
        for layer in self.lowbit_calls.layers.values():
            layer.train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As in the plain module, and for the calls."""
        for layer in self.lowbit_calls.layers.values():
            layer._apply(fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle names the plain class, since nobody can import this one."""
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str) or is_altered(self) or made[1][:1] != (type(self),):
            return made  # a class over this one, such as that of gated blocks, says itself how it is made again
        return _again, (self.lowbit_plain, *made[1][1:]), *made[2:]


def _again(plain: type[nn.Module], *args: Any) -> Any:
    """A new caller without state."""
    kind: Any = _caller_class(plain)
    return kind.__new__(kind, *args)


_CLASSES: dict[type[nn.Module], type[Caller]] = {}


def _caller_class(plain: type[nn.Module]) -> type[Caller]:
    """The class of callers whose forward is that of a class of modules."""
    if plain not in _CLASSES:
        _CLASSES[plain] = _new_class(plain)
    return _CLASSES[plain]


def _new_class(plain: type[nn.Module]) -> type[Caller]:
    """`_caller_class` for a class that has none yet."""
    own: Any = plain.forward
    metaclass: Any = type(plain)

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = self.lowbit_calls
        if torch.compiler.is_compiling():
            if calls.interrupts(self.training):
                return _run_eagerly(calls, self, own, args, kwargs)
            return own(self, *args, **kwargs)
        if calls.left:
            with watching.paused():
                return own(self, *args, **kwargs)
        if calls.is_settled(self.training) and not watching.is_on():
            return own(self, *args, **kwargs)
        return watching.run(calls, self, own, args, kwargs)

    names = {
        "lowbit_plain": plain,
        "forward": forward,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    made: type[Caller] = metaclass(plain.__name__, (Caller, plain), names)
    return made


@runs_eagerly
def _run_eagerly(*arguments: Any) -> Any:
    """`watching.run` in a compiled model, which it interrupts."""
    return watching.run(*arguments)


def is_watchable(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, which can be watched: none of torch's modules, none of ours."""
    kind = type(module)
    if isinstance(module, Caller) or "forward" in module.__dict__ or kind.forward is nn.Module.forward:
        return False
    return not kind.forward.__module__.startswith("torch.nn.")


def watch_forwards(module: nn.Module, calls: Calls) -> None:
    """Make a module a caller."""
    changed: Any = module
    changed.__class__ = _caller_class(type(module))
    changed.__dict__["lowbit_calls"] = calls


def callers(model: nn.Module) -> dict[str, Caller]:
    """The callers of a model, each once, in order, by their names in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Caller)}


def stop_watching(module: Caller) -> None:
    """Make a caller plain again."""
    changed: Any = module
    changed.__dict__.pop("lowbit_calls").undo()
    changed.__class__ = module.lowbit_plain


def is_altered(module: Caller) -> bool:
    """Whether the class of a caller was changed since the conversion, so that more than that would be undone."""
    return "lowbit_plain" not in vars(type(module))
