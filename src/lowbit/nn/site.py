"""Sites: the state of one place in a model where the formats of a recipe are applied.

A converted model has one `Clock` (seed and step), shared by all its sites.
"""

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from lowbit import functional, ranks
from lowbit.errors import UsageError
from lowbit.methods.recipe import Recipe
from lowbit.nn.loop import Loop
from lowbit.numerics.formats import Format
from lowbit.numerics.history import Histories, advance, new_history
from lowbit.numerics.ranges import new_running_range, observed_extremes
from lowbit.numerics.rounding import CounterNoise, step_key
from lowbit.products import compiled as compiler
from lowbit.products.operators import Op
from lowbit.products.setting import Samples, Setting

# torch.compile runs what this decorates eagerly, since a converted layer counts steps and keeps ranges. It is the lazy
# form of torch.compiler.disable, which would import the whole compiler with this package.
runs_eagerly = _disable_dynamo


# A compiled model names its sites by numbers of this process: another process would lack them, or have others.
_NOT_EXPORTED = (
    "torch.export cannot take a converted model out of this process: call lowbit.restore_(model) first, or write its "
    "8-bit arithmetic with `lowbit export --to onnx`"
)


class PerThread(threading.local):
    """What each thread that runs a model keeps for itself; a copy of the model begins with nothing.

    Attributes:
        inside: whether a training forward of the converted model runs in this thread.
        compiled: whether the last forward of the model in this thread was a training forward of a compiled model.
        samples: what a gate chose for the forward of a site that runs in this thread.
    """

    inside: bool = False
    compiled: bool = False
    samples: Samples | None = None

    def __reduce__(self) -> Any:
        return type(self), ()


class Clock:
    """Seed and step of a converted model, from which all its noise is made.

    A training forward of the module that was converted is a step; hooks on it say where one begins and ends. If only
    parts of the model are called, a step begins with the first layer that already ran in the last step, so that
    whatever repeats has other noise. Evaluation is not a step and does not change anything here.

    Each step begins with new use numbers at all sites. A layer that runs twice in a step thus draws two different
    fields.

    Args:
        seed: the seed of all noise.
        free: whether no engine was asked for, so that a loaded state brings its own.

    Attributes:
        sites: every site of the conversion.
        callers: the calls of every module whose forward is watched, see `lowbit.nn.calls`.
        controller: what sets the bits of sites that are made later; None: nothing.
        loop: what the recipes ask of the training loop.
        has_state: whether `lowbit.load_state_dict` gave this clock its step.
        lacks_state: whether the weights were loaded before the first step, and the state was not.
        recalled: the key of the step whose backward runs, or ran last; None since the last step began.
    """

    has_state: bool = False
    lacks_state: bool = False
    recalled: Tensor | None = None

    def __init__(self, seed: int, *, free: bool = False) -> None:
        self.seed = seed
        self.free = free
        self.sites: list[Site] = []
        self.callers: list[Any] = []
        self.controller: Controller | None = None
        self.loop = Loop()
        self.here = PerThread()
        self.of_parts = False
        self.number = compiler.register(self)
        self.pulse = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.set_step(0)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the model alone, as that of a site."""
        return {**self.__dict__, "controller": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another clock to operators of compiled models."""
        self.__dict__.update(state)
        self.number = compiler.register(self)

    def attach(self, model: nn.Module) -> None:
        """Follow the forwards of the model that was converted."""
        called = [calls.recipe() for calls in self.callers if calls.owns]
        recipes = [*(site.recipe for site in self.sites), *(recipe for recipe in called if recipe is not None)]
        self.loop = Loop.of(model, recipes)
        model.register_forward_pre_hook(self.advance)
        model.register_forward_hook(self.leave, always_call=True)
        model.register_load_state_dict_post_hook(self.weights_loaded)

    def detach(self, module: nn.Module) -> None:
        """Remove the hooks of `attach`."""
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)

    def weights_loaded(self, *_: object) -> None:
        """Remember that the weights are those of a checkpoint, whose noise and ranges may be missing."""
        self.lacks_state = not self.has_state and not int(self.step)

    def set_step(self, step: int) -> None:
        """Set the number of training forwards done."""
        self._begin_step(torch.tensor(step, dtype=torch.int64, device="cpu"))

    def _begin_step(self, step: Tensor) -> None:
        """Go to a step; the rank is asked for at each, since processes may meet after the conversion."""
        self.step = step
        self.key = step_key(self.seed, step, rank=ranks.rank())

    def advance(self, module: nn.Module, _args: object) -> None:
        """Begin a forward of the converted model; a training forward is a new step, a recomputed one is not."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                raise UsageError(_NOT_EXPORTED)
            torch.ops.lowbit.advance(self.pulse, self.number, module.training)
            return
        if is_recomputing():
            return
        if not self.sites and not self.callers:  # every layer was restored by itself
            self.detach(module)
            return
        self.here.inside = self.here.compiled = False
        if module.training:
            self.loop.check(module, first=not int(self.step))
            self.next_step()
            self.here.inside = True

    def advance_compiled(self, training: bool) -> None:
        """`advance` for a compiled model, which does not say where its forward ends."""
        self.here.compiled = training
        if training:
            self.next_step()

    def leave(self, _module: object, _args: object, output: object) -> None:
        """End a forward of the converted model, even one that raised.

        The backward of its output is that of the present step, whichever step is the present one by then.
        """
        if torch.compiler.is_compiling() or is_recomputing():
            return
        if self.here.inside:
            recall = partial(self.recall, self.key)
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    tensor.register_hook(recall)
        self.here.inside = False

    def recall(self, key: Tensor, _: Tensor) -> None:
        """Begin the backward of a step: a layer that is run again in it draws what it drew in that step."""
        self.recalled = key

    def next_step(self, *, of_parts: bool = False) -> None:
        """Begin a step; `of_parts` says that it is outside the converted model's forward."""
        self.check_controlled()
        self._check_state()
        self.of_parts, self.recalled = of_parts, None
        # New tensors, not in place: a backward that has not run yet keeps the noise of its own forward.
        self._begin_step(self.step + 1)
        for site in self.sites:
            site.uses = 0

    def _check_state(self) -> None:
        """Warn once where the weights are those of a checkpoint, and nothing else is."""
        if self.lacks_state:
            self.lacks_state = False
            warnings.warn(
                "weights were loaded into this converted model, and lowbit's own state was not: its noise begins at "
                "step 0 and its ranges are empty. If this continues a run, save lowbit.state_dict(model) beside the "
                "weights and give it to lowbit.load_state_dict, or let an adapter of lowbit.integrations do so; if "
                "it begins one, load the weights before lowbit.convert_",
                UserWarning,
                stacklevel=2,
            )

    def check_controlled(self) -> None:
        """Raise if bits should change over the run and nothing changes them, or no longer does."""
        for site in self.sites:
            if site.controller is None and (site.recipe.is_dynamic or site.lost_controller):
                why = (
                    "this model is a copy of one whose bits a PrecisionController sets, or was loaded from its state"
                    if site.lost_controller
                    else f"{site.recipe.changes} of recipe {site.recipe.name!r} change during training"
                )
                raise UsageError(
                    f"{site.name or 'the model'}: {why}, and no controller is attached: make one with "
                    "lowbit.PrecisionController.from_recipe(model, total_steps=...), or with a schedule of your own, "
                    "and call its step(loss) after each step"
                )
        controllers = [self.controller, *(site.controller for site in self.sites)]
        for controller in {id(each): each for each in controllers}.values():
            if controller is not None:
                controller.check_forward()


class Controller(Protocol):
    """What writes the bits of a model's sites."""

    def sites(self) -> "list[Site]":
        """Every site that it writes."""

    def check_forward(self) -> None:
        """Raise if no training forward may begin."""

    def write(self) -> None:
        """Set the bits of its sites, whatever changed them meanwhile."""

    def remove(self) -> None:
        """Release all of them."""

    def take(self, layer: Any) -> None:
        """Write a converted call too, whose product just ran for the first time."""


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward, as gradient checkpointing runs a layer again."""
    return torch._C._current_graph_task_id() != -1


_OPERANDS = ("input", "weight", "grad_output")


class Site(nn.Module):
    """One place where a recipe is applied: its bits, its running input range, its use number.

    A site does not own parameters, and nothing of it enters `state_dict()`: see `lowbit.state_dict`.

    Args:
        name: the layer's name, fixed at conversion.
        part: which product of the layer this is, if it has several.
        recipe: the formats.
        clock: seed and step of the model.
        input_format: the format of the layer's input, whose running range is kept here.
        bits: the width of each operand, in an order that the layer defines. Operands of one format in several products
            have one width, the first.
        engine: how products are executed.
        leads: whether this is the first product of its layer, which runs once in each of the layer's forwards.

    Attributes:
        layer_name: the layer's name at conversion.
        name: `layer_name` with the part; it is in the noise and in every report.
        recipes: the recipe in each of its phases.
        phase: the present one, from 0.
        engines: how products are executed in each phase.
        skips: whether no `grad_weight` is computed now.
        bits: the widths in training.
        evaluation_bits: the widths in evaluation mode.
        controller: what writes both; None: they do not change.
        lost_controller: whether this is a copy of a site that has a controller, or has its state; a copy lacks one.
        histories: the largest magnitudes of each operand that its delayed scales are made from, see
            `lowbit.numerics.history`; they have no length where no scale is delayed.
        remembered_step: the step that they count as the present one.
        gated: whether a gate chooses the bits for each sample.
    """

    bits: Tensor
    evaluation_bits: Tensor
    running_range: Tensor
    histories: Tensor

    def __init__(
        self,
        *,
        name: str,
        recipe: Recipe,
        clock: Clock,
        input_format: Format,
        bits: list[int],
        engine: str,
        part: str = "",
        leads: bool = True,
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.part = part
        self.name = ".".join(filter(None, [name, part]))
        self.recipe = recipe
        self.recipes = recipe.in_phases()
        self.phase = 0
        self.clock = clock
        self.input_format = input_format
        self.keeps_range = input_format.running is not None
        self.engines = [engine] * len(self.recipes)
        self.skips = self.may_skip and not recipe.skips_at_times
        self.leads = leads
        self.uses = 0
        self.controller: Controller | None = None
        self.lost_controller = False
        self.gated = False
        self.here = PerThread()
        self.number = compiler.register(self)
        for buffer in ("bits", "evaluation_bits"):
            self.register_buffer(buffer, torch.tensor(bits, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("running_range", new_running_range(), persistent=False)
        self.remembered_step = 0
        phases = range(len(self.recipes))
        rules = [fmt.delay for phase in phases for _, _, fmt in self.formats(phase) if fmt.delay is not None]
        self.remembers = bool(rules)
        longest = max((rule.history for rule in rules), default=0)
        histories = torch.stack([new_history(longest) for _ in _OPERANDS])
        self.register_buffer("histories", histories, persistent=False)
        clock.sites.append(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of the model alone: what sets the bits of this one would never hear of the copy's steps."""
        return {
            **self.__dict__,
            "controller": None,
            "lost_controller": self.is_controlled,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another site to operators of compiled models."""
        super().__setstate__(state)
        self.number = compiler.register(self)

    @property
    def present(self) -> Recipe:
        """The recipe in the present phase."""
        return self.recipes[self.phase]

    @property
    def engine(self) -> str:
        """How products are executed in the present phase."""
        return self.engines[self.phase]

    @property
    def may_skip(self) -> bool:
        """Whether the recipe says that this layer skips `grad_weight`, always or in some steps."""
        return self.recipe.skip is not None and self.recipe.skip.takes(self.layer_name)

    def set_phase(self, phase: int) -> None:
        """Go to a phase: other formats, on the engine that was chosen for them."""
        self.phase = phase
        self.input_format = self.formats()[0][2]
        self.keeps_range = self.input_format.running is not None

    def hold(self) -> None:
        """Stay as it is now: in the present phase, at bits that no controller has to set."""
        static = self.present.replace(schedule=None, gates=None, depthwise=None, skip=None)
        self.engines = [self.engine]
        self.recipe, self.recipes, self.phase, self.skips = static, (static,), 0, False

    @property
    def is_controlled(self) -> bool:
        """Whether a controller sets the bits, or did so in the model that this is a copy of."""
        return self.controller is not None or self.lost_controller

    @property
    def samples(self) -> Samples | None:
        """What a gate chose for the forward that runs now, in this thread."""
        return self.here.samples

    @samples.setter
    def samples(self, chosen: Samples | None) -> None:
        self.here.samples = chosen

    def widths(self) -> Tensor:
        """The bits of a forward in the layer's present mode; do not change them."""
        return self.bits if self.training else self.evaluation_bits

    def widths_now(self) -> tuple[int, ...]:
        """`widths` as numbers."""
        return tuple(self.widths().tolist())

    def set_bits(self, bits: list[int], evaluation_bits: list[int]) -> None:
        """Write both in place, so that nothing is compiled again."""
        self.bits.copy_(self.bits.new_tensor(bits))
        self.evaluation_bits.copy_(self.evaluation_bits.new_tensor(evaluation_bits))

    def follow_recipe(self) -> None:
        """Drop the controller and take the recipe's bits, those of the present phase."""
        self.controller, self.lost_controller = None, False
        self.skips = self.may_skip and not self.recipe.skips_at_times
        own = [fmt.bits for _, _, fmt in self.formats()]
        self.set_bits(own, own)

    def noise(self, *, compiled: bool = False) -> CounterNoise:
        """The noise of this use of the layer; a recomputed forward draws what the first one drew.

        Args:
            compiled: whether an operator of a compiled model asks, or a layer that runs eagerly in one.
        """
        self._check_runs()
        if is_recomputing():
            self._check_recomputed()
            recalled = self.clock.recalled
            return CounterNoise(key=self.clock.key if recalled is None else recalled, layer=self.name)
        inside = self.clock.here.inside or (compiled and self.clock.here.compiled)
        if not (
            inside or self.training
        ):  # an evaluation does not change anything, so that several threads can evaluate
            return CounterNoise(key=self.clock.key, layer=self.name)
        if not inside and self.leads and (self.uses or not self.clock.step):
            self.clock.next_step(of_parts=True)
        self.uses += 1
        return CounterNoise(key=self.clock.key, layer=self.name, use=self.uses - 1)

    def _check_runs(self) -> None:
        """Raise if torch only runs the layer to see what it does, since it would not see that it keeps state."""
        if torch._C._get_tracing_state() is not None:
            transform = "torch.jit.trace"
        elif torch._C._are_functorch_transforms_active():
            transform = "a transform of torch.func"
        else:
            return
        raise RuntimeError(
            f"{self.name}: {transform} cannot look into a converted layer, which counts its steps and keeps ranges: "
            "give it the plain model, before convert_ or after lowbit.restore_"
        )

    def _check_recomputed(self) -> None:
        """Raise if the forward is stochastic and it cannot be known which of several runs is run again."""
        if not (self.present.output.input.stochastic or self.present.output.weight.stochastic):
            return
        if self.uses > 1 or (self.training and self.clock.of_parts):
            when = "outside the converted model's forward" if self.uses <= 1 else f"{self.uses} times in this step"
            raise RuntimeError(
                f"{self.name}: gradient checkpointing runs again a layer that ran {when}, and stochastic rounding in "
                "its forward cannot know which run this is. Checkpoint other layers, convert one layer per use, or "
                "convert the module whose forward you call"
            )

    def input_range(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The extremes to use for `x`: recorded in training, the running ones in evaluation, None for its own."""
        if not self.keeps_range or not x.is_floating_point() or x.is_meta:
            return None
        if is_recomputing() and self.training:
            return None  # the range of its own batch, as in the first run, which recorded it
        values = x.float() if x.dtype == torch.float16 else x
        return observed_extremes(values, self.input_format, self.running_range, training=self.training)

    def histories_now(self) -> Histories | None:
        """What operands with delayed scales take their ranges from; the first training forward of a step moves on."""
        if not self.remembers:
            return None
        rules = {operand: fmt.delay for _, operand, fmt in self.formats() if fmt.delay is not None}
        kept = {operand: self.histories[_OPERANDS.index(operand)] for operand in rules}
        if self.training and not is_recomputing() and int(self.clock.step) != self.remembered_step:
            self.remembered_step = int(self.clock.step)
            for operand, rule in rules.items():
                advance(kept[operand], rule)
        return Histories(kept=kept, records=self.training)

    def setting(self, x: Tensor) -> "Setting | Site":
        """How the products of this call are computed for input `x`; while a model is compiled, this site itself."""
        return self if torch.compiler.is_compiling() else self.setting_now(x)

    def forward_products(
        self, x: Tensor, w: Tensor, bias: Tensor | None, op: Op, dtype: torch.dtype, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]]:
        """What an operator of a compiled model calls, see `lowbit.products.compiled`."""
        return functional.without_autograd(x, w, bias, op, self.setting_now(x, compiled=True), dtype, needs)

    def setting_now(self, x: Tensor, *, compiled: bool = False) -> Setting:
        """How the products of this call are computed for input `x`."""
        if self.gated and self.here.samples is None:
            raise RuntimeError(
                f"{self.name}: this layer runs in a gated block and was called outside the block's forward. "
                "Gradient checkpointing inside gated blocks and sharing their layers with other blocks do not work: "
                "name other blocks, or leave this layer out of them with a rule"
            )
        noise = self.noise(compiled=compiled)  # first: it may begin a step
        return Setting(
            recipe=self.present,
            noise=noise,
            bits=tuple((self.bits if self.training else self.evaluation_bits).tolist()),
            input_range=self.input_range(x) if self.keeps_range else None,
            histories=None if x.is_meta else self.histories_now(),
            layer=self.name,
            engine=self.engine,
            source=self,
            samples=self.here.samples,
            skips=self.skips,
        )

    def formats(self, phase: int | None = None) -> list[tuple[str, str, Format]]:
        """The operand that each of its bits is the width of: (product, operand, format); None: in the present phase."""
        return self.recipes[self.phase if phase is None else phase].operands()

    def slots(self, *operands: str, phase: int | None = None) -> dict[int, Format]:
        """The places of these operands' widths in `bits`, and their formats; floats lack a width to set.

        A bifurcated gradient keeps its width in `grad_weight`, since its formats were chosen separately.
        """
        table = {(product, operand): fmt for product, operand, fmt in self.formats(phase)}
        gradients = {table.get((product, "grad_output")) for product in ("grad_input", "grad_weight")}
        bifurcated = ("grad_weight", "grad_output") if len(gradients - {None}) > 1 else None
        return {
            i: fmt
            for i, ((product, operand), fmt) in enumerate(table.items())
            if operand in operands and fmt.has_width and (product, operand) != bifurcated
        }

    def extra_repr(self) -> str:
        """Recipe and engine."""
        return f"{self.recipe.name}, engine={self.engine}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to another device, but not to another dtype: float16 cannot hold a range."""
        device = fn(torch.empty(0, dtype=torch.float32, device=self.bits.device)).device
        # Bits and range have values even if the parameters of the model have none yet.
        return super()._apply(lambda t: t if device.type == "meta" else t.to(device), recurse)


def product_site(*, name: str, recipe: Recipe, clock: Clock, engine: str, part: str = "", leads: bool = True) -> Site:
    """A site for the three products, with the recipe's own bits in the order of `lowbit.methods.operands.SLOTS`."""
    bits = [fmt.bits for _, _, fmt in recipe.operands()]
    return Site(
        name=name,
        recipe=recipe,
        clock=clock,
        input_format=recipe.output.input,
        bits=bits,
        engine=engine,
        part=part,
        leads=leads,
    )
