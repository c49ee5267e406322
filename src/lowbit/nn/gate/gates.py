"""The gates of a model: what is gated, and what runs before and around each block.

Notation: as in `lowbit.nn.gate`.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ranks
from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_keys, is_like
from lowbit.methods.dynamic import Gating
from lowbit.nn.gate.cost import SKIP, bits_at, cost_of, direction, shortcut_of
from lowbit.nn.gate.mixing import At, output_mixed, with_skips
from lowbit.nn.gate.network import RecurrentGate, pooled
from lowbit.nn.layers import sites_of
from lowbit.nn.site import Site, is_recomputing, runs_eagerly
from lowbit.numerics.element import Zero
from lowbit.numerics.formats import check_bits
from lowbit.products.setting import Samples
from lowbit.products.watch import ProductCall, counted_by


@dataclass(eq=False)
class Block:
    """A block whose bits are gated.

    Args:
        name: its name in the model.
        module: the block.
        gated: the sites whose bits are chosen.
        inputs: channels of its input.
        channels_last: whether these are the last axis of the input, as for linear layers, or the second.
    """

    name: str
    module: nn.Module
    gated: list[Site]
    inputs: int
    channels_last: bool


class _Forward(threading.local):
    """What gates remember of the forward that runs in a thread, or of its latest one; a copy begins with nothing.

    Attributes:
        masks: by block, of the latest training forward.
        counts: how many samples took each choice, by block.
        state: the state of the LSTM after the previous block.
        inside: whether the gated model's forward runs.
    """

    def __init__(self) -> None:
        self.masks: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}
        self.state: tuple[Tensor, Tensor] | None = None
        self.inside = False

    def __reduce__(self) -> Any:
        return type(self), ()


class _GatedBlock(nn.Module):
    """A block that asks its gates before it runs; `Gates.attach` changes the class of the plain block to this."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        gates, index = self.__dict__["_lowbit_gates"]
        return gates.run(index, super().forward, args, kwargs)


@cache
def _gated(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gated{plain.__name__}", (_GatedBlock, plain), {"__module__": plain.__module__})


class Gates(nn.Module):
    """The gates of a model: each block has a head on its pooled input, and all share one LSTM and one projection.

    A `lowbit.PrecisionController` makes and attaches them. Give their parameters to the optimizer, and add `penalty()`
    to the loss of each step. Before a block runs, its gate chooses one pair of bits for each sample. The block's
    layers then run the samples of each choice together, and what no sample chose is not executed.

    Args:
        blocks: the gated blocks, in order.
        gating: choices, target and sizes.

    Attributes:
        target: the cost to train towards now, in percent of full precision.
    """

    sizes: Tensor
    costs: Tensor

    def __init__(self, blocks: Sequence[Block], gating: Gating) -> None:
        super().__init__()
        self._blocks = list(blocks)
        self._gating = gating
        self._check_choices()
        hidden, features = gating.hidden, gating.features
        self.heads = nn.ModuleList(
            nn.Linear(block.inputs, features)
            if hidden is None
            else nn.Sequential(nn.Linear(block.inputs, hidden), nn.ReLU(), nn.Linear(hidden, features))
            for block in blocks
        )
        self.gate = RecurrentGate(features=features, state=gating.state, choices=len(gating.choices))
        # MACs of each block, and its cost at each choice in MACs of full precision, as of the latest training forward.
        self.register_buffer("sizes", torch.zeros(len(blocks), dtype=torch.float64, device="cpu"))
        self.register_buffer("costs", self.sizes.new_zeros(len(blocks), len(gating.choices)))
        self.target = gating.targets[0]
        self._now = _Forward()
        self._handles: list[Any] = []
        self._last_cost: float | None = None

    def _check_choices(self) -> None:
        for block in self._blocks:
            for site in block.gated:
                for operand, place in (("input", 0), ("grad_output", 1)):
                    for fmt in site.slots(operand).values():
                        for pair in self._gating.choices:
                            if pair[place]:
                                _check_width(site, operand, pair[place], fmt.zero)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Continue from what `state_dict` gave; if any tensor does not fit, nothing changes.

        Raises:
            UsageError: a tensor is missing, unknown, of another shape or dtype, or has a nan or inf.
        """
        own = self.state_dict()
        check_keys("state of the gates", state_dict, own)
        for name, saved in state_dict.items():
            like = own[name]
            if not is_like(saved, like):
                raise UsageError(
                    f"state of the gates: {name} is {shown(saved)}: expected {like.dtype} of shape {tuple(like.shape)}"
                )
            if not bool(saved.isfinite().all()) or (name in ("sizes", "costs") and bool((saved < 0).any())):
                raise UsageError(f"state of the gates: {name} has values that it cannot have")
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the gated blocks."""
        return tuple(block.name for block in self._blocks)

    @property
    def gating(self) -> Gating:
        """The settings that they were made from."""
        return self._gating

    @property
    def choices(self) -> tuple[tuple[int, int], ...]:
        """The pairs (bits of `input`, bits of `grad_output`)."""
        return self._gating.choices

    def histogram(self) -> Tensor:
        """How many samples took each choice in the latest forward: int64 ``(n, K)``."""
        none = torch.zeros(len(self.choices), dtype=torch.int64, device="cpu")
        return torch.stack([self._now.counts.get(i, none) for i in range(len(self._blocks))])

    @property
    def cost(self) -> float | None:
        """The cost of the batch of the last `penalty`, in percent of full precision."""
        return self._last_cost

    def penalty(self) -> Tensor:
        """The cost term of the loss for the latest training forward: ``r beta C``, a scalar with a gradient.

        ``C = sum over samples, blocks, choices of mask (w a + w g + a g)/32**2 m/mean(m)``, where equal weighting
        leaves m/mean(m) out, and r is `direction` for the cost ``100 C / (3 B n)``. It is a sum over the batch, not
        a mean. In a distributed run, B are the samples of all ranks, which all call this, and gradients are averaged.

        Raises:
            UsageError: no training forward ran since the last call.
        """
        if len(self._now.masks) < len(self._blocks):
            missing = [block.name for i, block in enumerate(self._blocks) if i not in self._now.masks]
            raise UsageError(
                f"penalty() without a training forward of block {missing[0]!r} before it: call it once after each "
                "model(x) in training mode; a block that the model does not always run cannot be gated"
            )
        masks = torch.stack([self._now.masks[i] for i in range(len(self._blocks))])
        unit = self.sizes.mean() if self._gating.weighting == "macs" else self.sizes.unsqueeze(1)
        total = (masks * (self.costs / unit).to(masks).unsqueeze(1)).sum()
        cost = ranks.gathered(total.detach().double()).mean().item()
        self._last_cost = 100 * cost / (3 * masks.shape[0] * masks.shape[1])
        self._now.masks = {}
        gating = self._gating
        sign = direction(self._last_cost, target=self.target, band=gating.band, inside=gating.inside)
        # Data parallel training averages gradients over ranks, and the term is a sum over the samples of all.
        penalty: Tensor = sign * gating.strength * ranks.world_size() * total
        return penalty

    def attach(self, model: nn.Module) -> None:
        """Change the class of each block to its gated twin; hooks on `model` begin and end each forward."""
        for index, block in enumerate(self._blocks):
            plain: Any = block.module
            plain.__class__ = _gated(plain.__class__)
            plain.__dict__["_lowbit_gates"] = (self, index)
            for site in block.gated:
                site.gated = True
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        """Make every block plain again."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            module: Any = block.module
            module.__class__ = type(block.module).__mro__[2]
            del module.__dict__["_lowbit_gates"]
            for site in block.gated:
                site.gated = False

    @runs_eagerly
    def _begin(self, model: nn.Module, _args: object) -> None:
        if is_recomputing():
            return
        self._now.state, self._now.inside = None, True
        self._now.counts = {}
        if model.training:
            self._now.masks = {}

    @runs_eagerly
    def _end(self, *_: object) -> None:
        if not is_recomputing():
            self._now.state, self._now.inside = None, False

    @runs_eagerly
    def run(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block with the bits that its gate chooses for each sample of its first argument."""
        block = self._blocks[index]
        if is_recomputing():
            raise RuntimeError(
                f"{block.name}: gradient checkpointing runs a gated block again, which would choose again from the "
                "state of another block. Do not checkpoint inside or around gated blocks"
            )
        if not self._now.inside:
            raise RuntimeError(f"{block.name}: a gated block runs only within the forward of the model it is gated in")
        if index in self._now.counts:
            raise RuntimeError(f"{block.name}: this gated block runs twice in one forward, and a block has one gate")
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1 if block.channels_last else 1] != block.inputs:
            given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            axis = "last" if block.channels_last else "second"
            raise UsageError(
                f"{block.name}: the first argument of this gated block is {given}; it must be a tensor (B, ...) whose "
                f"{axis} axis has the {block.inputs} channels of the block's first layer. Name other blocks"
            )
        mask = self._decide(index, x)
        choice = mask.argmax(1)
        self._now.counts[index] = torch.bincount(choice, minlength=len(self.choices)).cpu()
        mixes_outputs = self._gating.mixing == "output" and block.module.training
        if (mixes_outputs or SKIP in self.choices) and (len(args) > 1 or kwargs):
            raise UsageError(
                f"{block.name}: a gated block whose outputs are mixed or that may be skipped takes one argument, its "
                f"input; this one got {len(args) + len(kwargs)}"
            )

        def at(part: Tensor, chosen: Tensor, told: Tensor | None = None) -> Any:
            return self._execute(block, chosen, told, lambda: forward(part, *args[1:], **kwargs))

        shortcut = self._way_past(block)
        self._measure_first(index, x, at)
        with self._measured(index):
            if mixes_outputs:
                return output_mixed(x, mask, self.choices, at, shortcut)
            if SKIP not in self.choices:
                return at(x, choice, mask)
            return with_skips(x, mask, choice, self.choices.index(SKIP), at, shortcut)

    def _decide(self, index: int, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            features = self.heads[index](pooled(x, channels_last=self._blocks[index].channels_last))
            mask: Tensor
            mask, self._now.state = self.gate(features, self._now.state)
        if self._blocks[index].module.training:
            self._now.masks[index] = mask
        return mask

    def _way_past(self, block: Block) -> Callable[[Tensor], Tensor] | None:
        """The way of a sample that skips the block, at the recipe's bits; None if it passes unchanged."""
        path = shortcut_of(block.module)
        if path is None:
            return None

        def past(x: Tensor) -> Tensor:
            for site in block.gated:
                site.samples = Samples(
                    choice=torch.zeros(len(x), dtype=torch.int64, device=x.device), bits=(site.widths_now(),)
                )
            try:
                y: Tensor = path(x)
                return y
            finally:
                for site in block.gated:
                    site.samples = None

        return past

    def _execute(self, block: Block, choice: Tensor, mask: Tensor | None, run: Callable[[], Any]) -> Any:
        """Run the block with these choices at its gated sites."""
        for site in block.gated:
            bits = tuple(None if p == SKIP else tuple(bits_at(site, p).tolist()) for p in self.choices)
            site.samples = Samples(choice=choice, bits=bits, mask=mask)
        try:
            return run()
        finally:
            for site in block.gated:
                site.samples = None

    @contextmanager
    def _measured(self, index: int) -> Iterator[None]:
        """Count the MACs of the block's sites while it runs in training, and what each choice costs."""
        block = self._blocks[index]
        macs: dict[Site, int] = {}
        samples: dict[Site, int] = {}

        def count(call: ProductCall) -> None:
            if call.product == "output" and isinstance(call.source, Site):
                macs[call.source] = macs.get(call.source, 0) + call.macs
                samples[call.source] = samples.get(call.source, 0) + call.input[0]

        if not block.module.training:
            yield
            return
        with counted_by(count):
            yield
        self._keep_sizes(index, {site: macs[site] / samples[site] for site in macs})

    def _measure_first(self, index: int, x: Tensor, at: At) -> None:
        """If all of the first batch may skip a block, learn the block's MACs from one sample without any change."""
        block = self._blocks[index]
        if SKIP not in self.choices or not block.module.training or self.sizes[index] > 0:
            return
        modes = [(module, module.training) for module in block.module.modules()]
        macs: dict[Site, int] = {}

        def count(call: ProductCall) -> None:
            if isinstance(call.source, Site):
                macs[call.source] = macs.get(call.source, 0) + call.macs

        block.module.eval()
        try:
            with torch.no_grad(), counted_by(count):
                first = next(k for k, pair in enumerate(self.choices) if pair != SKIP)
                at(x[:1], torch.full((1,), first, dtype=torch.int64, device=x.device))
        finally:
            for module, mode in modes:
                module.training = mode
        self._keep_sizes(index, {site: float(count) for site, count in macs.items()})

    def _keep_sizes(self, index: int, macs: dict[Site, float]) -> None:
        """Keep what one sample costs at each choice, if the block ran."""
        if macs:
            block = self._blocks[index]
            self.sizes[index] = sum(macs.values())
            costs = [cost_of(block.module, macs, pair) for pair in self.choices]
            self.costs[index] = torch.tensor(costs, dtype=torch.float32, device=self.costs.device)


def release(model: nn.Module) -> None:
    """Remove controllers, or what a copy has left of them, from a model; its bits are then the recipes'."""
    sites = sites_of(model)
    for controller in {id(site.controller): site.controller for site in sites}.values():
        if controller is not None:
            controller.remove()
    for gates in {id(owner): owner for m in model.modules() if (owner := gates_of(m)) is not None}.values():
        gates.detach()
    for site in sites:
        site.follow_recipe()


def gates_of(module: nn.Module) -> Gates | None:
    """The gates that choose the bits of this block; None for any other module."""
    gates: Gates | None = module.__dict__.get("_lowbit_gates", (None,))[0]
    return gates


def _check_width(site: Site, operand: str, bits: int, zero: Zero) -> None:
    try:
        check_bits(bits, zero)
    except UsageError as error:
        raise UsageError(f"{site.name}: {operand} cannot have {bits} bits: {error}") from error
