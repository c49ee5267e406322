"""Watching: a mode of torch that sees each function of the modules it is entered for, and finds products by weights.

A weight is a parameter, or what functions made of parameters alone: a view, a cast, a concatenation, a standardised
kernel. A product of two activations is none of its business, nor is one of two weights.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from lowbit.functional import autocast_device
from lowbit.nn.calls import attention
from lowbit.nn.calls.call import Calls
from lowbit.nn.calls.products import Asked
from lowbit.nn.calls.readers import READERS

Read = TypeVar("Read")


@dataclass(frozen=True)
class _Origin:
    """What a weight was made of.

    Args:
        parameters: the parameters.
        picked: whether the values of other tensors decided which of their entries it has.
    """

    parameters: tuple[Tensor, ...]
    picked: bool = False


@dataclass
class _Frame:
    """One forward of a module that is watched.

    Args:
        calls: those of the module.
        module: the module.
        numbers: how many calls of each operator ran.
        made: what was made of parameters in this forward, by identity; kept, so that no other tensor gets it.
    """

    calls: Calls
    module: nn.Module
    numbers: dict[str, int] = field(default_factory=dict)
    made: dict[int, tuple[Tensor, _Origin]] = field(default_factory=dict)


class _PerThread(threading.local):
    """The forwards that run in a thread, innermost last."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


_here = _PerThread()


def is_on() -> bool:
    """Whether a module is watched in this thread now."""
    return bool(_here.frames) and any(
        torch._C._get_function_stack_at(i) is _MODE for i in range(torch._C._len_torch_function_stack())
    )


@contextmanager
def paused() -> Iterator[None]:
    """Watch nothing in this context, if no other mode of torch was entered since."""
    depth = torch._C._len_torch_function_stack()
    if not depth or torch._C._get_function_stack_at(depth - 1) is not _MODE:
        yield
        return
    with _pop_mode_temporarily():
        yield


def run(
    calls: Calls, module: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The forward of a module, watched."""
    frames = _here.frames
    training = module.training
    with ExitStack() as stack:
        if not is_on():
            stack.enter_context(_MODE)
        frames.append(_Frame(calls, module))
        try:
            result = forward(module, *args, **kwargs)
        finally:
            made = frames.pop().made
    if frames and isinstance(result, Tensor) and id(result) in made:
        frames[-1].made[id(result)] = made[id(result)]
    calls.seen[training] = True
    return result


class _Mode(TorchFunctionMode):
    """It computes products by weights in the formats of their calls, and follows what is made of parameters."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = _here.frames[-1]
        if func in _COMPOSITE:
            with self:
                return _COMPOSITE[func](*args, **kwargs)
        if func is attention.FUNCTION and (found := _attended(frame, args, kwargs)) is not None:
            return found
        reader = READERS.get(func)
        if reader is not None and any(_origin(x) for x in _tensors((*args, *kwargs.values()))):
            asked = _read(reader, args, kwargs)
            result = None if asked is None else _computed(asked, frame)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        if isinstance(result, Tensor | tuple | list):
            _follow(frame, func, (*args, *kwargs.values()), result)
        return result


_MODE = _Mode()


def _read(reader: Callable[..., Read | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
    """What a call asks for; None if its arguments are others than those of a plain product."""
    try:
        return reader(*args, **kwargs)
    except (TypeError, RuntimeError, IndexError, ValueError):
        return None  # an argument that no reader knows, such as `out`, or one that torch refuses in its own words


def _computed(asked: Asked, frame: _Frame) -> Tensor | None:
    """The product in the formats of its call; None if it stays as it is."""
    left, right = asked.left, asked.right
    if not (_is_plain(left) and _is_plain(right)):
        return None
    if left.dtype != right.dtype and not torch.is_autocast_enabled(autocast_device(left)):
        return None  # torch raises its own error
    of_left, of_right = _origin(left), _origin(right)
    if of_left is not None and of_right is not None:
        if of_left.picked == of_right.picked:
            return None
        of_left, of_right = (None, of_right) if of_left.picked else (of_left, None)
    origin = of_left or of_right
    if origin is None:
        return None
    op = asked.op(of_left is not None)
    if op is None or _is_in_another_module() or _is_left(frame, origin):
        return None
    number = frame.numbers.get(asked.operator, 0)
    frame.numbers[asked.operator] = number + 1
    weight = right if of_left is None else left
    layer = frame.calls.layer(f"{asked.operator}.{number}", op, weight, training=frame.module.training)
    if layer is None:
        return None
    layer.multiplied = origin.parameters
    return asked.compute(of_left is not None, layer.site.setting_now)


def _attended(frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Attention in the formats that the recipe has for it; None if it stays as it is."""
    calls = frame.calls
    if calls.left or not attention.has_formats(calls.recipe()):
        return None
    asked = _read(attention.read, args, kwargs)
    if asked is None or _is_in_another_module():
        return None
    q, k, v = asked.query, asked.key, asked.value
    if not (_is_plain(q) and _is_plain(k) and _is_plain(v)):
        return None
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(autocast_device(q)):
        return None  # torch raises its own error
    number = frame.numbers.get(attention.OPERATOR, 0)
    frame.numbers[attention.OPERATOR] = number + 1
    call = f"{attention.OPERATOR}.{number}"
    layer = calls.layer(call, attention.Attention(), k, training=frame.module.training)
    if layer is None or not attention.has_formats(layer.site.recipe):
        return None
    return asked.compute(layer.site.setting_now)


def _is_in_another_module() -> bool:
    """Whether a module that is not watched runs inside the one that is: one of torch's, or one that came later."""
    at: FrameType | None = sys._getframe(1)
    while at is not None and at.f_code is not run.__code__:
        if at.f_code is nn.Module._call_impl.__code__:
            return True
        at = at.f_back
    return False


def _is_left(frame: _Frame, origin: _Origin) -> bool:
    """Whether a product is by the weight of a layer that stays as it is."""
    calls = frame.calls
    if any(p is q for p in origin.parameters for q in calls.foreign):
        return True
    if any(p is q for p in origin.parameters for layer in calls.layers.values() for q in layer.multiplied):
        return False
    for module in frame.module.modules():
        watched = module.__dict__.get("lowbit_calls")
        if watched is not None and watched.left:
            calls.foreign += [p for p in module.parameters(recurse=False) if any(p is q for q in origin.parameters)]
    return any(p is q for p in origin.parameters for q in calls.foreign)


def _is_plain(x: Tensor) -> bool:
    """Whether it is a tensor of torch's own in strided memory, of floating-point numbers."""
    own = type(x) in (Tensor, nn.Parameter)
    return own and x.is_floating_point() and x.layout == torch.strided and not x.is_nested


def _origin(x: Tensor) -> _Origin | None:
    """What a tensor was made of, if of parameters alone."""
    if isinstance(x, nn.Parameter):
        return _Origin((x,))
    for frame in reversed(_here.frames):
        if (found := frame.made.get(id(x))) is not None:
            if frame is not _here.frames[-1]:
                frame.calls.needed = True
            return found[1]
    base = x._base
    return _Origin((base,)) if isinstance(base, nn.Parameter) else None


def _follow(frame: _Frame, func: Any, arguments: Sequence[Any], result: Any) -> None:
    """Remember a result that was made of parameters alone."""
    given = list(_tensors(arguments))
    origins = [_origin(x) for x in given]
    if not any(origins) or func in _LOOKUPS:
        return
    others = [x for x, origin in zip(given, origins, strict=True) if origin is None]
    picks = func in _PICKS
    buffers = list(frame.module.buffers(recurse=False)) if others else []
    if not picks and any(all(x is not b for b in buffers) for x in others):
        return
    if picks and (origins[0] is None or any(x.is_floating_point() for x in others)):
        return
    known = [origin for origin in origins if origin is not None]
    made = _Origin(
        tuple(dict.fromkeys(p for origin in known for p in origin.parameters)),
        picked=any(origin.picked for origin in known) or (picks and bool(others)),
    )
    for x in _tensors(result if isinstance(result, tuple | list) else (result,)):
        frame.made[id(x)] = x, made


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (x for x in value if isinstance(x, Tensor))


# Functions whose result has entries of their first argument, which integer arguments choose.
_PICKS = {Tensor.__getitem__, torch.index_select, Tensor.index_select, torch.gather, Tensor.gather}
# Functions that look up rows of a parameter for each entry of an input: an activation.
_LOOKUPS = {F.embedding, torch.embedding, F.embedding_bag}


def _opened(func: Any) -> Any:
    """A function of torch written in Python, whose own functions a mode sees instead of the function itself."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    made = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    made.__kwdefaults__ = func.__kwdefaults__
    return made


_COMPOSITE = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}
