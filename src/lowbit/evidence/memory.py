"""Memory of a forward pass and of a whole training step: measured, not modelled."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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

    @property
    def total(self) -> int:
        """The most that these are together: the saved activations are gone when the update runs."""
        return self.parameters + self.gradients + self.states + max(self.activations, self.update)

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
    what an operator allocates and frees within itself (on a GPU that counts), and what the allocator keeps unused.

    Args:
        model: whose parameters and buffers count.
        optimizer: of these parameters.
        step: makes one training step with the optimiser: forward, backward and update. It is called twice, since the
            first step makes the states.

    Raises:
        UsageError: the step does not call the optimiser.
    """
    step()
    update = UpdateMemory(model, optimizer)
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: update.begin()),
        optimizer.register_step_post_hook(lambda *_: update.end()),
    ]
    try:
        with held_for_backward(update.kept) as held:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    if update.scratch is None:
        raise UsageError("step_memory: the step did not call step() of this optimizer: give the one that it calls")
    return update.result(activations=held.bytes)


class UpdateMemory:
    """Measures one update of a run: call `begin` when the gradients are there, and `end` after the optimiser's step.

    Args:
        model: whose parameters and buffers count.
        optimizer: of these parameters, which has made a step before.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.kept = [*model.parameters(), *model.buffers()]
        self.scratch: int | None = None  # the most that the update allocated; None before `end`
        self._optimizer = optimizer
        self._gradients = 0
        self._watch = ExitStack()

    def begin(self) -> None:
        """Note the gradients, and watch what is allocated from now on."""
        self._gradients = _bytes(p.grad for p in self.kept if p.grad is not None)
        cuda = any(each.is_cuda for each in self.kept)
        self._allocated = self._watch.enter_context(_AllocatedOnCuda() if cuda else _Allocated())

    def end(self) -> None:
        """Watch no more."""
        self._watch.close()
        self.scratch = self._allocated.most

    def result(self, *, activations: int) -> StepMemory:
        """What was measured, after `end`.

        Args:
            activations: bytes that the forward passes kept for the backward.
        """
        assert self.scratch is not None
        return StepMemory(
            parameters=_bytes(self.kept),
            gradients=self._gradients,
            states=_bytes(_tensors(self._optimizer.state)),
            activations=activations,
            update=self.scratch,
        )


class _Allocated(TorchDispatchMode):
    """The most bytes of new tensors that operators returned and that lived at one moment.

    torch's profiler would ask the allocator itself, but it takes long to start and writes on stderr.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._living: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        for storage in [t.untyped_storage() for t in _tensors(out)]:
            if storage._cdata not in given and storage._cdata not in self._living:
                self._living[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, address: int) -> None:
        self._now -= self._living.pop(address)


class _AllocatedOnCuda:
    """The same, as the allocator of the GPU counts it."""

    most = 0

    def __enter__(self) -> Self:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.most = torch.cuda.max_memory_allocated() - self._before


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
