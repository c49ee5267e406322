"""The processes of a run that ``torchrun`` started: they meet, they find out together what went wrong, and they part.

Rank 0 alone writes to the run folder, the terminal and the logs; the others read.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lowbit import ranks
from lowbit.errors import ElsewhereError, UsageError, shown
from lowbit.launch import launched

T = TypeVar("T")


@contextmanager
def met() -> Iterator[None]:
    """Meet the other processes for what happens in this context, unless they have met already."""
    if launched() == 1 or dist.is_initialized():
        yield
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Numbers that processes agree on are on the CPU, gradients where the model is.
    dist.init_process_group("gloo" if device is None else "cpu:gloo,cuda:nccl", device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Leave this context on all ranks without an error, or on all with one.

    Raises:
        ElsewhereError: this rank was successful, or a lower one has the same to say.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = exchanged(None if error is None else str(error))
    failed = [rank for rank, text in enumerate(said) if text is not None]
    if error is not None and failed[0] == ranks.rank():
        raise error
    if failed:
        raise ElsewhereError(f"process {failed[0]} of {len(said)}: {said[failed[0]]}") from error


def first(ask: Callable[[], T]) -> T:
    """What rank 0 finds, for all ranks; the others do not look. Errors: as `together`."""
    found: list[Any] = [None]
    with together():
        if ranks.rank() == 0:
            found = [ask()]
    if ranks.is_one_of_several():
        dist.broadcast_object_list(found, src=0)
    answer: T = found[0]
    return answer


def exchanged(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if not ranks.is_one_of_several():
        return [value]
    every: list[Any] = [None] * ranks.world_size()
    dist.all_gather_object(every, value)
    return every


def collected(value: T) -> list[T]:
    """The values of all ranks on rank 0, in their order; nothing on the others."""
    if not ranks.is_one_of_several():
        return [value]
    every: list[Any] | None = [None] * ranks.world_size() if ranks.rank() == 0 else None
    dist.gather_object(value, every, dst=0)
    return every or []


def largest(*numbers: float) -> list[float]:
    """The largest of each number over all ranks."""
    if not ranks.is_one_of_several():
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    found: list[float] = ranks.gathered(own).amax(0).tolist()
    return found


def mean(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over all ranks, which have the same names."""
    own = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")
    return dict(zip(values, ranks.gathered(own).mean(0).tolist(), strict=True))


def check_same(settings: Mapping[str, object]) -> None:
    """Raise where the processes have different settings.

    Raises:
        UsageError: they have; the message names the first one.
    """
    every = exchanged(dict(settings))
    for rank, other in enumerate(every):
        for name, value in every[0].items():
            if other[name] != value:
                raise UsageError(
                    f"process {rank} has {name}={shown(other[name])}, and process 0 has {shown(value)}: give all the "
                    "same settings."
                )


def is_of_a_lost_one(error: BaseException) -> bool:
    """Whether an error says that another process is gone, which no class of torch does."""
    text = str(error)
    return ranks.is_one_of_several() and (
        isinstance(error, dist.DistError) or "gloo" in text or "by peer" in text or "NCCL" in text
    )
