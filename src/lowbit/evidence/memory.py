"""Memory of a forward pass and of a whole training step: measured, not modelled."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lowbit.errors import UsageError
from lowbit.inputs.checks import checked
from lowbit.tables import text_table


@dataclass
class Held:
    """Bytes that a forward pass keeps for its backward; complete when `held_for_backward` ends."""

    bytes: int = 0


@contextmanager
def held_for_backward(kept_anyway: Iterable[Tensor] = ()) -> Iterator[Held]:
    """Count what autograd saves in this context: the activations that memory must hold until the backward.

    It counts the bytes of the distinct storages behind the tensors that operators save, at the size of the storage,
    batch included. It does not count `kept_anyway`, what a function keeps outside `save_for_backward`, what gradient
    checkpointing computes again, or what the backward itself allocates. Within one forward the sum only grows, so the
    sum at its end is the peak.

    Args:
        kept_anyway: tensors that stay in memory even without a backward, such as parameters and buffers.
    """
    held = Held()
    known = {t.untyped_storage()._cdata for t in kept_anyway}
    # The storages are kept until the end of the context: another could get the address of a freed one.
    storages: list[Any] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            storages.append(storage)
            held.bytes += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield held


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one training step.

    Args:
        parameters: of the model, with its buffers.
        gradients: of the parameters, when the optimiser steps.
        states: of the optimiser between steps, codes and scales included.
        activations: what the forward passes keep for the backward, see `held_for_backward`.
        update: the most that the optimiser's step allocates besides, at one moment.
    """

    parameters: int
    gradients: int
    states: int
    activations: int
    update: int

    def __str__(self) -> str:
        rows = {
            "parameters and buffers": self.parameters,
            "gradients": self.gradients,
            "optimizer states": self.states,
            "saved activations": self.activations,
            "scratch of the update": self.update,
        }
        return text_table(["memory of a step", "MiB"], [[name, f"{size / 2**20:.2f}"] for name, size in rows.items()])


@checked
def step_memory(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> StepMemory:
    """Measure one training step: what stays in memory, what the forward keeps, and what the update takes besides.

    Tensors are counted by their distinct storages. Not counted are temporary tensors of the forward and the backward,
    memory that native code takes outside torch's allocator, and what the allocator keeps unused.

    Args:
        model: whose parameters and buffers count.
        optimizer: of these parameters.
        step: makes one training step with the optimiser: forward, backward and update. It is called twice, since the
            first step makes the states.

    Raises:
        UsageError: the step does not call the optimiser.
    """
    step()
    kept = [*model.parameters(), *model.buffers()]
    found: dict[str, int] = {}
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    cuda = any(each.is_cuda for each in kept)

    def begin(*_: object) -> None:
        found["gradients"] = _bytes(p.grad for p in model.parameters() if p.grad is not None)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            found["before"] = torch.cuda.memory_allocated()
        else:
            profiler.start()

    def end(*_: object) -> None:
        if cuda:
            found["update"] = torch.cuda.max_memory_allocated() - found["before"]
        else:
            profiler.stop()
            found["update"] = _peak(profiler)

    hooks = [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
    try:
        with held_for_backward(kept) as held:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    if "update" not in found:
        raise UsageError("step_memory: the step did not call step() of this optimizer: give the one that it calls")
    return StepMemory(
        parameters=_bytes(kept),
        gradients=found["gradients"],
        states=_bytes(_tensors(optimizer.state)),
        activations=held.bytes,
        update=found["update"],
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def _tensors(content: object) -> Iterator[Tensor]:
    """The tensors in a tree of dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for each in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(each)


def _peak(profiler: profile) -> int:
    """The largest sum of what was allocated and not yet freed."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
