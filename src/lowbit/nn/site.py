"""Sites: the state of one place in a model where the formats of a recipe are applied.

A converted model has one `Clock` (seed and step), shared by all its sites.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from lowbit.errors import UsageError
from lowbit.formats import Format, Integer
from lowbit.products import Samples, Setting
from lowbit.ranges import new_running_range, observed_extremes
from lowbit.recipe import SLOTS, Recipe
from lowbit.rounding import CounterNoise, step_key

# torch.compile leaves what this decorates to run eagerly: a converted layer counts steps and keeps ranges. It is the
# lazy form of torch.compiler.disable, which would import the whole compiler with this package.
runs_eagerly = _disable_dynamo


class Clock:
    """Seed and step of a converted model: what all its noise is made from.

    `advance` is the model's forward pre-hook. It counts training forwards and starts the use numbers of all
    sites anew, so that a layer that runs twice in a step draws two different fields.

    Args:
        seed: the seed of all noise.
        free: whether nobody asked for an engine: a loaded state then brings its own.
    """

    def __init__(self, seed: int, *, free: bool = False) -> None:
        self.seed = seed
        self.free = free
        self.sites: list[Site] = []
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Set the number of training forwards done."""
        self._begin_step(torch.tensor(step, dtype=torch.int64, device="cpu"))

    def _begin_step(self, step: Tensor) -> None:
        """Go to a step; the rank is asked for at each, since processes may meet after the conversion."""
        self.step = step
        self.key = step_key(self.seed, step, rank=rank_of_process())

    @runs_eagerly
    def advance(self, module: nn.Module, _args: object) -> None:
        """Begin a forward of the converted model; a training forward is a new step, a recomputed one is not."""
        if is_recomputing():
            return
        if not self.sites:  # every layer was restored on its own
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook == self.advance]:
                del module._forward_pre_hooks[key]
            return
        if module.training:
            self._check_controlled()
            # New tensors, not in place: a backward that is still to come keeps the noise of its own forward.
            self._begin_step(self.step + 1)
        for site in self.sites:
            site.uses = 0

    def _check_controlled(self) -> None:
        """Raise where a recipe's bits should change over the run and nothing changes them."""
        for site in self.sites:
            if site.recipe.is_dynamic and site.controller is None:
                raise UsageError(
                    f"{site.name or 'the model'}: the bits of recipe {site.recipe.name!r} change during training, and "
                    "no controller is attached: make one with lowbit.PrecisionController.from_recipe(model, "
                    "total_steps=...) and call its step(loss) after each step"
                )


def rank_of_process() -> int:
    """The rank of this process in a distributed run; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Controller(Protocol):
    """What writes the bits of a model's sites."""

    def sites(self) -> "list[Site]":
        """Every site that it writes."""

    def remove(self) -> None:
        """Let go of all of them."""


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward: gradient checkpointing running a layer again."""
    return torch._C._current_graph_task_id() != -1


class Site(nn.Module):
    """One place where a recipe is applied: its bits, its running input range, its use number.

    A site owns no parameter and nothing of it enters `state_dict()`: see `lowbit.state_dict`.

    Args:
        name: the layer's name, fixed at conversion: part of the noise and of every report.
        recipe: the formats.
        clock: seed and step of the model.
        input_format: the format of the layer's input, whose running range is kept here.
        bits: the width of each operand, in the order that the layer gives them meaning. Operands of one format in
            several products have one width: the first.
        engine: how products are executed.

    Attributes:
        controller: what writes the bits during training; None: they stay.
        gated: whether a gate chooses the bits for each sample.
        samples: what it chose for the forward that runs now.
    """

    bits: Tensor
    running_range: Tensor

    def __init__(
        self, *, name: str, recipe: Recipe, clock: Clock, input_format: Format, bits: list[int], engine: str
    ) -> None:
        super().__init__()
        self.name = name
        self.recipe = recipe
        self.clock = clock
        self.input_format = input_format
        self.engine = engine
        self.uses = 0
        self.controller: Controller | None = None
        self.gated = False
        self.samples: Samples | None = None
        self.register_buffer("bits", torch.tensor(bits, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("running_range", new_running_range(), persistent=False)
        clock.sites.append(self)

    def noise(self) -> CounterNoise:
        """The noise of this use of the layer; a recomputed forward draws what the first one drew."""
        if not is_recomputing():
            self.uses += 1
        elif self.uses > 1 and (self.recipe.output.input.stochastic or self.recipe.output.weight.stochastic):
            raise RuntimeError(
                f"{self.name}: gradient checkpointing runs again a layer that ran {self.uses} times in this step, "
                "and stochastic rounding in its forward cannot know which run this is. Checkpoint other layers, or "
                "convert one layer per use"
            )
        return CounterNoise(key=self.clock.key, layer=self.name, use=0 if is_recomputing() else self.uses - 1)

    def input_range(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The extremes to use for `x`: recorded in training, the running ones in evaluation, None for its own."""
        if not isinstance(self.input_format, Integer) or not x.is_floating_point() or x.is_meta:
            return None
        if is_recomputing() and self.training:
            return None  # that of its own batch, as in the first run, which recorded it
        values = x.float() if x.dtype == torch.float16 else x
        return observed_extremes(values, self.input_format, self.running_range, training=self.training)

    def setting(self, x: Tensor) -> Setting:
        """How the products of this call are computed for input `x`."""
        if self.gated and self.samples is None:
            raise RuntimeError(
                f"{self.name}: this layer runs in a gated block and was called outside of the block's forward. "
                "Gradient checkpointing inside gated blocks and sharing their layers with other blocks do not work: "
                "name other blocks, or leave this layer out of them with a rule"
            )
        return Setting(
            recipe=self.recipe,
            noise=self.noise(),
            bits=self.bits.clone(),  # a backward keeps the bits of its forward
            input_range=self.input_range(x),
            layer=self.name,
            engine=self.engine,
            source=self,
            samples=self.samples,
        )

    def formats(self) -> list[tuple[str, str, Format]]:
        """What each of its bits is the width of: (product, operand, format)."""
        norm = self.recipe.normalization
        if len(self.bits) == len(SLOTS) or norm is None:
            return self.recipe.operands()
        return [("output", "input", norm.input), ("grad_input", "grad_output", norm.grad_output)]

    def slots(self, *operands: str) -> dict[int, Integer]:
        """Where the widths of these operands stand in `bits`, and their formats; floats have no width to set.

        A bifurcated gradient keeps its width in `grad_weight`: its formats were chosen apart.
        """
        table = {(product, operand): fmt for product, operand, fmt in self.formats()}
        gradients = {table.get((product, "grad_output")) for product in ("grad_input", "grad_weight")}
        bifurcated = ("grad_weight", "grad_output") if len(gradients - {None}) > 1 else None
        return {
            i: fmt
            for i, ((product, operand), fmt) in enumerate(table.items())
            if operand in operands and isinstance(fmt, Integer) and (product, operand) != bifurcated
        }

    def extra_repr(self) -> str:
        """Recipe and engine."""
        return f"{self.recipe.name}, engine={self.engine}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to another device, not to another dtype: a range in float16 would not be one."""
        device = fn(torch.empty(0, dtype=torch.float32, device=self.bits.device)).device
        # Bits and range are values, also of a model whose parameters have none yet.
        return super()._apply(lambda t: t if device.type == "meta" else t.to(device), recurse)


def product_site(*, name: str, recipe: Recipe, clock: Clock, engine: str) -> Site:
    """A site for the three products, with the recipe's own bits in the order of `lowbit.recipe.SLOTS`."""
    bits = [fmt.bits for _, _, fmt in recipe.operands()]
    return Site(name=name, recipe=recipe, clock=clock, input_format=recipe.output.input, bits=bits, engine=engine)
