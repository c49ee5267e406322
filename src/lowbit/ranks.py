"""The processes of a distributed run, as `torch.distributed` has them; outside of one there is one process of rank 0.

What is gathered is added up in the order of ranks: a reduction may add in another order on another rank, and decisions
that follow from its result would differ.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def is_one_of_several() -> bool:
    """Whether this process is one of several that have met."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if is_one_of_several() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The tensors of all processes of a group, which have one shape, along a new first axis, in the order of ranks."""
    if not is_one_of_several():
        return x.unsqueeze(0)
    x = x.contiguous()
    every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, x, group=group)
    return torch.stack(every)
