"""Where the time of a training step goes: seconds by module, forward and backward.

A clock reads at every border of a module. What lies between two borders belongs to the innermost module that is open:
forward from its call to its return, backward from the gradient of its output to that of its input. What belongs to no
layer (functions called between layers, the loss) is counted for the module that calls them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(kw_only=True)
class Timeline:
    """Seconds of a step so far.

    Args:
        forward: seconds of each module's forward without those of the modules in it, by name.
        backward: the same of its backward.
    """

    forward: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    backward: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def seconds(self, name: str) -> float:
        """Seconds of a module in both directions."""
        return self.forward.get(name, 0.0) + self.backward.get(name, 0.0)


@contextmanager
def timeline(model: nn.Module) -> Iterator[Timeline]:
    """Time what runs in this context: one forward of the model, and the backward of its result.

    The sum over modules is the time from the first border to the end of the context. On a GPU it is the time to launch
    work and not that of the work.

    Args:
        model: the root; layers that are used twice are counted together.
    """
    found, clock = Timeline(), _Clock()
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(_opening(clock, found, name), with_kwargs=True, prepend=True))
        hooks.append(module.register_forward_hook(_closing(clock, found, name), with_kwargs=True))
    try:
        yield found
    finally:
        clock.read()
        for hook in hooks:
            hook.remove()


class _Clock:
    """The clock, and what the time since it was last read belongs to: a direction's seconds and a module's name."""

    def __init__(self) -> None:
        self.open: list[tuple[dict[str, float], str]] = []
        self.since = time.perf_counter()

    def read(self) -> None:
        """Give the time since the last reading to what is open."""
        now = time.perf_counter()
        if self.open:
            seconds, name = self.open[-1]
            seconds[name] += now - self.since
        self.since = now


def _opening(clock: _Clock, found: Timeline, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001 - torch's signature
        clock.read()
        clock.open.append((found.forward, name))
        ends = _closing_backward(clock, found, name)
        for tensor in filter(_gets_a_gradient, tensors_in((args, kwargs))):
            tensor.register_hook(ends)

    return hook


def _closing(clock: _Clock, found: Timeline, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
        clock.read()
        if clock.open and clock.open[-1][1] == name:
            clock.open.pop()
        begins = _opening_backward(clock, found, name)
        for tensor in filter(_gets_a_gradient, tensors_in(output)):
            tensor.register_hook(begins)
        if not clock.open:  # the root returned: what follows is the loss and its backward
            clock.open.append((found.backward, name))

    return hook


def _opening_backward(clock: _Clock, found: Timeline, name: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:  # noqa: ARG001 - torch's signature
        clock.read()
        current = clock.open[-1][1] if clock.open else ""
        # The gradient of a container's output is that of its last layer's, and that layer has just begun.
        if not _within(current, name):
            clock.open = [(found.backward, name)]

    return hook


def _closing_backward(clock: _Clock, found: Timeline, name: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:  # noqa: ARG001 - torch's signature
        clock.read()
        current = clock.open[-1][1] if clock.open else ""
        if _within(current, name):
            clock.open = [(found.backward, name.rpartition(".")[0])]

    return hook


def _within(name: str, of: str) -> bool:
    """Whether a module is another, or lies in it; the root, ``""``, holds all."""
    return of in ("", name) or name.startswith(of + ".")


def _gets_a_gradient(x: Tensor) -> bool:
    return x.requires_grad


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, also those of a model's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
