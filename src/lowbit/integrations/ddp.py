"""DistributedDataParallel: gradients exchanged as 8-bit codes with error feedback, and ranges shared by all ranks.

Notation: W processes, g_r the gradient of rank r, e_r what rank r has not sent yet, Q blocks of 8-bit codes with a
scale each. Rank r sends ``Q(g_r + e_r)`` and keeps ``e_r = g_r + e_r - Q(g_r + e_r)``. Every block has an owner, which
averages it, and sends the average in codes too, with an e of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowbit import ranks
from lowbit.errors import UsageError
from lowbit.evidence.meter import Meter
from lowbit.inputs.checks import check_keys, check_whole, checked, is_like
from lowbit.nn.layers import sites_of
from lowbit.numerics.formats import integer
from lowbit.numerics.quantizer import encode

_CODES = integer(bits=8, zero="symmetric")
_SCALE_BYTES = 4


class Int8AllReduce:
    """The exchange of gradients of one DistributedDataParallel in 8 bits, a quarter of the bytes of float32.

    >>> exchange = Int8AllReduce(ddp)

    What rounding takes from a gradient is added to the next one (error feedback), on the rank that rounds. All ranks
    decode the same codes, so they stay equal bit for bit. Blocks lie within parameters, so the result does not depend
    on DDP's buckets. Call it before the first backward; `no_sync` works as ever.

    Args:
        ddp: whose gradients are exchanged.
        block: values that share a scale.
        smallest: parameters of fewer values are exchanged in full.
        meter: what counts the bytes that this process sends, in the ledger's `sent_bytes`.

    Raises:
        UsageError: `ddp` is not a DistributedDataParallel, or a number is out of range.

    Source: Seide et al. 2014, 1-bit stochastic gradient descent (error feedback); Tang et al. 2019, DoubleSqueeze,
    arXiv:1905.05957 (on both ways), here with 8 bits.
    """

    @checked
    def __init__(self, ddp: nn.Module, *, block: int = 256, smallest: int = 1024, meter: Meter | None = None) -> None:
        if not isinstance(ddp, DistributedDataParallel):
            raise UsageError(f"Int8AllReduce: a {type(ddp).__name__}: give a DistributedDataParallel")
        self.block = check_whole("block", block, 2, 2**20)
        self.smallest = check_whole("smallest", smallest, 1)
        self.meter = meter
        self.group = ddp.process_group
        self.world = self.group.size()
        self._names = {p: name for name, p in ddp.module.named_parameters()}
        # By the name of a parameter (blocks of each rank, W, block) and (blocks of this rank, block).
        self._own: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        ddp.register_comm_hook(None, self._exchange)

    def _exchange(
        self,
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch's own annotation, which it checks
    ) -> torch.futures.Future[torch.Tensor]:
        """DDP's hook: the averaged gradients of a bucket."""
        pairs = [(self._names[p], g) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        small = [g for _, g in pairs if g.numel() < self.smallest]
        large = [(name, g) for name, g in pairs if g.numel() >= self.smallest]
        if self.world > 1:
            if small:
                self._average_in_full(small)
            if large:
                self._average(large)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def _average_in_full(self, gradients: list[Tensor]) -> None:
        """Write the averages of small gradients in their places."""
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=self.group)
        flat /= self.world
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view_as(g))
        # A ring sends each value once to be added up and once as the sum.
        self._count(2 * (self.world - 1) * flat.numel() * flat.element_size() // self.world)

    def _average(self, gradients: list[tuple[str, Tensor]]) -> None:
        """Write the averages of large gradients in their places."""
        names = [name for name, _ in gradients]
        parts = [self._blocks(g) for _, g in gradients]
        counts = [len(part) for part in parts]
        mine, self_sent = self._feed(torch.cat(parts), self._own, names, counts)
        received = torch.empty_like(mine)
        dist.all_to_all_single(received, mine, group=self.group)
        mean = self._decoded(received).mean(0)
        message, others = self._feed(mean, self._mean, names, counts)
        every = message.new_empty(self.world, *message.shape[1:])
        dist.all_gather(list(every), message[0], group=self.group)
        averages = self._decoded(every).transpose(0, 1)
        for (_, g), average in zip(gradients, averages.split(counts), strict=True):
            g.copy_(average.reshape(-1)[: g.numel()].view_as(g))
        self._count((self.world - 1) * (self_sent // self.world + others))

    def _blocks(self, g: Tensor) -> Tensor:
        """A gradient as (blocks of each rank, W, block), float32, with zeros behind it."""
        whole = self.world * self.block
        number = -(-g.numel() // whole)
        x = torch.zeros(number * whole, dtype=torch.float32, device=g.device)
        x[: g.numel()] = g.flatten()
        return x.view(number, self.world, self.block)

    def _feed(self, x: Tensor, errors: dict[str, Tensor], names: list[str], counts: list[int]) -> tuple[Tensor, int]:
        """The message of values with what was not sent before, (receivers, bytes), and its number of bytes."""
        parts = zip(names, torch.zeros_like(x).split(counts), strict=True)
        x = x + torch.cat([errors.get(name, nothing) for name, nothing in parts])
        found = encode(x, _CODES, dims=(x.dim() - 1,))
        assert found.steps is not None
        scale = found.steps.scale
        rest = x - found.dequantize()
        rest[~rest.isfinite()] = 0  # inf and nan are sent, once
        errors.update(zip(names, rest.split(counts), strict=True))
        codes = found.q.nan_to_num(0).to(torch.int8)
        if x.dim() == 2:  # the owner's averages go to all
            codes, scale = codes.unsqueeze(1), scale.unsqueeze(1)
        receivers = codes.shape[1]
        message = torch.cat(
            [
                codes.transpose(0, 1).reshape(receivers, -1).view(torch.uint8),
                scale.transpose(0, 1).reshape(receivers, -1).contiguous().view(torch.uint8),
            ],
            dim=1,
        )
        return message, message.numel()

    def _decoded(self, messages: Tensor) -> Tensor:
        """The values of messages (M, bytes), ``(M, blocks, block)``."""
        number = messages.shape[1] // (self.block + _SCALE_BYTES)
        codes = messages[:, : number * self.block].contiguous().view(torch.int8).view(-1, number, self.block)
        scale = messages[:, number * self.block :].contiguous().view(torch.float32).view(-1, number, 1)
        return codes * scale

    def _count(self, sent: int) -> None:
        if self.meter is not None:
            self.meter.sent(sent)

    def state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet. Every rank has its own, to be saved by each."""
        return {
            "version": 1,
            "world": self.world,
            "own": {name: e.clone() for name, e in self._own.items()},
            "mean": {name: e.clone() for name, e in self._mean.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` of this rank gave.

        Raises:
            UsageError: it is of another number of processes, other parameters or other blocks.
        """
        check_keys("Int8AllReduce.load_state_dict: the state", state, ("version", "world", "own", "mean"))
        if state["version"] != 1 or state["world"] != self.world:
            raise UsageError(
                f"Int8AllReduce.load_state_dict: a state of {state['world']} processes, here are {self.world}: what "
                "one process has not sent belongs to it. Go on without this state: the rest of one step is lost"
            )
        shapes = {name: self._blocks(p.detach()) for p, name in self._names.items() if p.numel() >= self.smallest}
        for kind, wanted in (("own", shapes), ("mean", {name: x[:, 0] for name, x in shapes.items()})):
            for name, value in state[kind].items():
                if name not in wanted or not is_like(value, wanted[name]):
                    raise UsageError(
                        f"Int8AllReduce.load_state_dict: {kind} of {name!r} does not fit: give the same model, block "
                        "and smallest"
                    )
        self._own = {name: e.clone() for name, e in state["own"].items()}
        self._mean = {name: e.clone() for name, e in state["mean"].items()}


@checked
def average_buffers_(model: nn.Module) -> None:
    """Give every rank what the buffers of all ranks have seen, so that all go on alike; call it after each update.

    It is for ``DistributedDataParallel(..., forward_sync_buffers=False)`` (before torch 2.13 ``broadcast_buffers``) and
    for FSDP. Running ranges and statistics become means, and the magnitudes of delayed scales the largest. The mean of
    batch normalisation's running variances lacks the variance between the means of the ranks' batches. By default, DDP
    begins each forward with the buffers of rank 0 instead.

    Args:
        model: the same on all ranks.
    """
    if not ranks.is_one_of_several():
        return
    largest = {id(site.histories) for site in sites_of(model)}
    buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
    if not buffers:
        return
    every = ranks.gathered(torch.cat([b.detach().double().flatten() for b in buffers]))
    equal = (every == every[0]).all(0)
    means, most = every.mean(0).where(~equal, every[0]), every.amax(0)
    sizes = [b.numel() for b in buffers]
    with torch.no_grad():
        for b, mean, highest in zip(buffers, means.split(sizes), most.split(sizes), strict=True):
            b.copy_((highest if id(b) in largest else mean).view_as(b))


def full_exchange_bytes(model: nn.Module, *, sharded: bool) -> int:
    """The bytes that this process sends in a step that exchanges all gradients as they are, in a ring.

    A ring sends each gradient once to be added up and once as the sum. If parameters are sharded, it is added up, and
    the parameter sent twice: for the forward, and for the backward.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    world = ranks.world_size()
    return (3 if sharded else 2) * (world - 1) * size // world


@checked
def average_ranges_(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' running input ranges; call it on all ranks, before one saves or evaluates.

    It is for ``DistributedDataParallel(..., forward_sync_buffers=False)`` (before torch 2.13 ``broadcast_buffers``) and
    for FSDP, where each rank records the ranges of its own samples. By default, DDP begins each forward with the
    buffers of rank 0, and so with its ranges. With the mean, every rank evaluates alike, and a checkpoint of rank 0 has
    seen the samples of all.

    Args:
        model: a converted model, the same on all ranks.

    Raises:
        UsageError: nothing in the model is converted.
    """
    sites = list(sites_of(model))
    if not sites:
        raise UsageError("average_ranges_: nothing in this model is converted; call lowbit.convert_ first")
    own = torch.stack([site.running_range.double() for site in sites])
    for site, (low, high, _) in zip(sites, ranks.gathered(own).mean(0).tolist(), strict=True):
        site.running_range[0], site.running_range[1] = low, high
