"""Memory that a forward pass holds for its backward: measured, not modelled."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
