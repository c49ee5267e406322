"""The precision controller: it writes the bits of a converted model while the model trains.

Notation: t step (the batch counted from 0); forward bits are those of `input` and `weight`, backward bits those of
`grad_output`.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lowbit.conversion.state import clocks
from lowbit.errors import UsageError, shown
from lowbit.inputs.checks import check_keys, check_type, check_whole, checked, is_finite, is_whole
from lowbit.methods.dynamic import Gating
from lowbit.methods.names import recipes
from lowbit.methods.recipe import Recipe
from lowbit.nn.gate import Gates, release
from lowbit.nn.kinds import is_depthwise
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Site
from lowbit.precision.blocks import gated_block, named_blocks
from lowbit.precision.layers import (
    Bits,
    ControlledLayer,
    EvalBits,
    LayerRule,
    Widths,
    as_source,
    bits_at,
    checked_sources,
    controlled_layer,
    controlled_layers,
    quantized_layers,
    recipe_of,
    sources_of,
    table,
)
from lowbit.precision.losses import Losses
from lowbit.precision.measuring import Measuring
from lowbit.precision.phases import timed_layers
from lowbit.schedules import Follower, LayerBits, Layerwise, PlateauRule, Progressive, RangeTest, RangeTested, Rule

_MOST_STEPS = 2**63 - 1


class PrecisionController:
    """Sets the bits of a converted model's layers over a run, as a learning-rate scheduler sets rates.

    Call `step(loss)` after each step. Batch t trains at the bits of step t, which are set when the controller is made
    and by each `step`; a forward in evaluation mode runs at `eval_bits`. Bits are written in place into tensors, so a
    change neither recompiles nor allocates.

    Args:
        model: a converted model.
        forward: bits of `input` and `weight`, a schedule, a rule such as `schedules.Progressive`, or a number; None
            leaves them. `schedules.RangeTested`, whose first cycle is a range test, needs the loss of every step.
            `schedules.GradientNoise` and `schedules.Budget` give each layer its own bits, gradients included.
        backward: bits of `grad_output` in `grad_input`, and also in `grad_weight` if the recipe has the same format in
            both (it does not bifurcate). None: what the rule in `forward` says, or the recipe's own.
        rules: pairs (which layers, (forward, backward)) for layers with other bits. Which: an exact name, a compiled
            pattern of a whole name, an exact type, or a function of the layer. The first match decides. None in place
            of the inner pair leaves a layer to its recipe.
        gates: what chooses bits for each sample in `blocks`.
        blocks: names or patterns of names of the blocks that `gates` are for.
        eval_bits: forward bits in evaluation: the ``"highest"`` that each layer ever takes, the ``"current"`` ones, or
            a number for all layers without a rule.
        steps_per_epoch: number of steps whose mean loss a plateau rule takes, and the unit of phases that start in
            epochs; needed iff there is one of these.
        total_steps: length of the run; None: that of the schedules. Phases that start at a fraction of the run need it.

    Attributes:
        gates: the gates, whose parameters train with those of the model; None without gates.

    Raises:
        UsageError: schedules of different lengths, bits that a format cannot have, a rule or block that matches
            nothing, or a model that is not converted, lacks bits to set, or has a controller already.
    """

    gates: Gates | None

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        forward: Bits | Layerwise | None = None,
        backward: Bits | Layerwise | None = None,
        rules: Sequence[LayerRule] = (),
        gates: Gating | None = None,
        blocks: Sequence[str | re.Pattern[str]] = (),
        eval_bits: EvalBits = "highest",
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        self._layerwise = forward if isinstance(forward, Layerwise) else None
        self._forward = None if isinstance(forward, Layerwise) else as_source("forward", forward)
        if isinstance(backward, Layerwise):
            raise UsageError(f"backward={backward!r}: a rule that gives each layer its own bits goes into `forward`")
        self._backward = as_source("backward", backward)
        self._measuring: Measuring | None = None
        if self._layerwise is not None and (backward is not None or gates is not None):
            raise UsageError(
                f"forward={forward!r} sets the bits of every operand of each layer: leave `backward` and `gates` out"
            )
        if total_steps is not None:
            check_whole("total_steps", total_steps, 1, _MOST_STEPS)
        if self._forward is not None and self._forward.grad_widths() and self._backward is not None:
            raise UsageError(
                f"forward={self._forward!r} sets the bits of gradients too: leave `backward` out, or "
                "give grad_bits=[...]"
            )
        if isinstance(self._backward, Rule):
            raise UsageError(f"backward={self._backward!r}: give a schedule or a number; a rule goes into `forward`")
        if eval_bits not in get_args(get_args(EvalBits)[1]) and not _is_count(eval_bits):
            raise UsageError(f"eval_bits={eval_bits!r}: give a number of bits, 'highest' or 'current'")
        self._eval_bits = eval_bits
        self._rules = tuple(rules)
        self._clocks = clocks(model)
        self._layers = controlled_layers(model, self._layerwise or self._forward, self._backward, rules)
        if self._layerwise is not None:
            self._layerwise.begin([layer.name for layer in self._follow_layerwise()])
        chosen = named_blocks(model, blocks) if gates is not None else []
        if blocks and gates is None:
            raise UsageError(f"blocks={list(blocks)} without gates: gates choose their bits; leave blocks out")
        pinned = {site for layer in self._layers if layer.has_rule for site in layer.sites}
        self.gates = None if gates is None else Gates([gated_block(*b, pinned) for b in chosen], gates)
        self._targets = () if gates is None else gates.targets
        self._plateau = None if gates is None else gates.rule()
        self.total_steps = self._common_length(total_steps)
        self._steps_per_epoch = steps_per_epoch
        self._timed = timed_layers(
            [layer.sites for layer in self._layers], total_steps=self.total_steps, steps_per_epoch=steps_per_epoch
        )
        given = (self._forward, self._layerwise, self._backward, gates)
        if all(each is None for each in given) and not rules and not self._timed:
            raise UsageError("a controller with nothing to set: give forward, backward, gates or rules")
        self._losses = Losses(steps_per_epoch=self._check_epochs(steps_per_epoch))
        self._step = 0
        self._fingerprint = self._identify()
        self._attach(model)

    @classmethod
    @checked
    def from_recipe(
        cls,
        model: nn.Module,
        *,
        total_steps: int,
        steps_per_epoch: int | None = None,
        blocks: Sequence[str | re.Pattern[str]] = (),
        rules: Sequence[LayerRule] = (),
        eval_bits: EvalBits = "highest",
    ) -> "PrecisionController":
        """The controller for what changes over a run in a converted model's recipe: schedule, gates, phases, skipping.

        Args:
            model: a model converted with a recipe such as ``"cpt"``, ``"pfq"``, ``"dfq"``, ``"heal"``.
            total_steps: length of the run.
            steps_per_epoch: needed for plateau rules and for times in epochs.
            blocks: needed for gates: names or patterns of the blocks that they choose bits for.
            rules: as for the class; they come before the recipe's own for depthwise convolutions.
            eval_bits: as for the class.

        Raises:
            UsageError: the model lacks a recipe whose bits change, or has several; and as for the class.
        """
        layers = quantized_layers(model)
        found = list(dict.fromkeys(s.recipe for _, layer in layers for s in layer.sites() if s.recipe.is_dynamic))
        if len(found) != 1:
            names = [recipe.name for recipe in found]
            dynamic = [name for name in recipes()[:-1] if Recipe.from_name(name).is_dynamic]
            raise UsageError(
                f"from_recipe: {len(names)} recipes of this model have bits that change {names or ''}: convert it with "
                f"one of {', '.join(dynamic)}, or make a PrecisionController with a schedule of your own"
            )
        recipe = found[0]
        own: list[LayerRule] = []
        if recipe.depthwise and any(is_depthwise(layer) for _, layer in layers if recipe_of(layer) == recipe):
            own.append((lambda layer: recipe_of(layer) == recipe and is_depthwise(layer), recipe.depthwise))
        if any(recipe_of(layer) != recipe for _, layer in layers):
            own.append((lambda layer: recipe_of(layer) != recipe, None))
        if recipe.gates is not None and not blocks:
            raise UsageError(
                f"recipe {recipe.name!r} gates blocks: give their names or patterns, e.g. "
                r"blocks=[re.compile(r'groups\.\d\.\d')]"
            )
        forward, backward = (
            None if template is None else template.build(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
            for template in ((recipe.schedule.forward, recipe.schedule.backward) if recipe.schedule else (None, None))
        )
        by_epoch = recipe.gates.rule() if recipe.gates else forward
        in_epochs = any(str(phase.start).endswith("ep") for phase in recipe.phases)
        return cls(
            model,
            forward=forward,
            backward=backward,
            rules=[*rules, *own],
            gates=recipe.gates,
            blocks=blocks,
            eval_bits=eval_bits,
            steps_per_epoch=steps_per_epoch
            if in_epochs or (by_epoch is not None and by_epoch.follows == "epoch")
            else None,
            total_steps=total_steps,
        )

    @property
    def last_step(self) -> int:
        """How often `step` was called: the number of the batch that trains next."""
        return self._step

    @property
    def forward_bits(self) -> int | None:
        """Forward bits of the next batch in layers without a rule; None if the recipe or a gate decides."""
        return bits_at(self._forward, self._step)

    @property
    def backward_bits(self) -> int | None:
        """Backward bits of the next batch in layers without a rule; None if the recipe or a gate decides."""
        if self._backward is None and self._forward is not None:
            return self._forward.grad_at(self._step)
        return bits_at(self._backward, self._step)

    @property
    def stage(self) -> int | None:
        """The stage of the plateau rule, or the phase, from 0; None without one."""
        rule = self._plateau or self._forward
        if isinstance(rule, PlateauRule | Progressive):
            return rule.stage
        phases = [timed.at(self._step)[0] for timed in self._timed if timed.starts]
        return max(phases, default=None)

    @property
    def range_test(self) -> RangeTest | None:
        """The range test of the first cycle, done or not; None without one."""
        test = self._forward.test if isinstance(self._forward, RangeTested) else self._forward
        return test if isinstance(test, RangeTest) else None

    def bits(self) -> dict[str, Widths]:
        """The (forward, backward) bits of each controlled layer in the next training forward, by its name.

        It gives the first bits of each that can be set, since a recipe may have others in other products. They are None
        where none can be set, and where a gate chooses.
        """
        return {layer.name: layer.first(layer.training(self._step)) for layer in self._layers}

    def sites(self) -> list[Site]:
        """Every site that it writes."""
        return [site for layer in self._layers for site in layer.sites]

    def phases(self, step: int) -> tuple[tuple[int, bool], ...]:
        """The phase of each layer that has some, and whether it skips `grad_weight`, in a step of the run."""
        return tuple(timed.at(step) for timed in self._timed)

    def go_to(self, step: int) -> None:
        """Go to a step of the run, for a plan of it; what follows the run, and not only the step, cannot.

        Raises:
            UsageError: a rule or gates follow the run, or the step lies outside it.
        """
        if self._followers() or self._layerwise is not None or self.gates is not None:
            raise UsageError("go_to: what follows the run cannot be taken to a step of it")
        check_whole("step", step, 0, (_MOST_STEPS if self.total_steps is None else self.total_steps) - 1)
        self._step = step
        self.write()

    def step(self, loss: Tensor | float | None = None) -> None:
        """Go on to the next batch; call it after the optimizer's step.

        Args:
            loss: of the batch, one number; only plateau rules and range tests need it.

        Raises:
            UsageError: the schedule is over, or a loss is needed and missing.
            RunError: a rule met a loss that is not finite.
        """
        if self.total_steps is not None and self._step >= self.total_steps:
            raise UsageError(
                f"step() number {self._step + 1} of a run of total_steps={self.total_steps}: give the schedule as many "
                "total_steps as the run has"
            )
        self._losses.feed(loss, self._followers())
        if self._layerwise is not None and self._measuring is not None:
            measuring, self._measuring = self._measuring, None
            self._layerwise.take(measuring.finish())
        self._step += 1
        self._follow_plateau()
        self.write()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the controller remembers, including the weights of its gates: plain values and tensors."""
        return {
            "version": 1,
            "fingerprint": self._fingerprint,
            "step": self._step,
            "losses": float(self._losses.sum),
            "counted": self._losses.count,
            "rules": [rule.state_dict() for rule in self._with_states()],
            "gates": None if self.gates is None else self.gates.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave for the same model and schedules; if it raises, nothing changes.

        Raises:
            UsageError: the state is of another version or of other schedules, or damaged.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or not is_whole(state.get("version")) or state["version"] != 1:
            raise UsageError("load_state_dict: this is not a state of a PrecisionController, version 1")
        check_keys("load_state_dict: the state", state, own)
        self._check_fingerprint(state["fingerprint"])
        if not is_whole(state["step"]) or not 0 <= state["step"] <= (
            _MOST_STEPS if (n := self.total_steps) is None else n
        ):
            raise UsageError(f"load_state_dict: the state is at step {shown(state['step'])} of {self.total_steps}")
        counted = check_whole("load_state_dict: counted", state["counted"], 0, (self._losses.steps_per_epoch or 1) - 1)
        if not is_finite(state["losses"]) or (not counted and state["losses"]):
            raise UsageError(
                f"load_state_dict: losses={shown(state['losses'])} of {counted} steps: expected the finite sum of the "
                "losses of so many steps, 0 of none"
            )
        rules = self._with_states()
        if not isinstance(state["rules"], list) or len(state["rules"]) != len(rules):
            raise UsageError(f"load_state_dict: rules={shown(state['rules'])}: expected a list of {len(rules)} states")
        if self.gates is None and state["gates"] is not None:
            raise UsageError("load_state_dict: the state is of a controller with gates, and this one lacks them")
        before = [rule.state_dict() for rule in rules]
        try:
            for rule, saved in zip(rules, state["rules"], strict=True):
                rule.load_state_dict(saved)
            if self.gates is not None:
                self.gates.load_state_dict(state["gates"])
        except Exception as error:  # a user's rule may raise anything
            for rule, saved in zip(rules, before, strict=True):
                rule.load_state_dict(saved)
            raise UsageError(f"load_state_dict: {error}") from error
        self._stop_measuring()
        self._step = state["step"]
        self._losses.sum = torch.tensor(state["losses"], dtype=torch.float64, device="cpu")
        self._losses.count = counted
        self._follow_plateau()
        self.write()

    def _check_fingerprint(self, saved: object) -> None:
        """Raise if a state is of other schedules, layers or gates."""
        check_type("load_state_dict: fingerprint", saved, dict[str, str])
        assert isinstance(saved, dict)
        different = [
            key for key in dict.fromkeys([*self._fingerprint, *saved]) if self._fingerprint.get(key) != saved.get(key)
        ]
        if different:
            raise UsageError(
                f"load_state_dict: the state is of a controller with other {', '.join(different)}: make "
                "this one with the arguments, for the model, that it was saved with"
            )

    def remove(self) -> None:
        """Release the model: hooks and gates are removed, and every layer has its recipe's bits again."""
        self._stop_measuring()
        if self.gates is not None:
            self.gates.detach()
        for site in self.sites():
            site.follow_recipe()
        for clock in self._clocks:
            clock.controller = None
        self._layers, self._timed, self._clocks = [], [], []

    def __str__(self) -> str:
        """A table of the controlled layers and their bits now."""
        length = "without end" if self.total_steps is None else f"of {self.total_steps}"
        return f"step {self._step} {length}\n\n{table(self._layers, self._step)}"

    def _followers(self) -> list[Follower]:
        """What has a state and may need the loss: the rule in `forward`, and the plateau rule of the gates."""
        forward = [self._forward] if isinstance(self._forward, Rule) else []
        return [*forward, *([] if self._plateau is None else [self._plateau])]

    def _with_states(self) -> "list[Follower | Layerwise]":
        """All that remembers something of the run."""
        return [*self._followers(), *([] if self._layerwise is None else [self._layerwise])]

    def _follow_layerwise(self) -> list[ControlledLayer]:
        """The layers to which a rule gives their own bits."""
        return [layer for layer in self._layers if isinstance(layer.forward, LayerBits)]

    def _stop_measuring(self) -> None:
        if self._measuring is not None:
            self._measuring.stop()
            self._measuring = None

    def _common_length(self, given: int | None) -> int | None:
        lengths = {given, *(source.total_steps for source in sources_of(self._layers))} - {None}
        if len(lengths) > 1:
            raise UsageError(f"schedules of {sorted(map(str, lengths))} steps: give all of them the same total_steps")
        return next(iter(lengths), None)

    def _check_epochs(self, steps_per_epoch: int | None) -> int | None:
        needed = any(follower.follows == "epoch" for follower in self._followers())
        if not needed and any(
            str(phase.start).endswith("ep") for timed in self._timed for phase in timed.sites[0].recipe.phases
        ):
            return None  # the phases took it
        if needed and not _is_count(steps_per_epoch):
            raise UsageError(
                f"steps_per_epoch={steps_per_epoch!r}: a plateau rule takes the mean loss of so many steps; give a "
                "whole number, 1 or more"
            )
        if not needed and steps_per_epoch is not None:
            raise UsageError(f"steps_per_epoch={steps_per_epoch} without a plateau rule: leave it out")
        return steps_per_epoch

    def _identify(self) -> dict[str, str]:
        """What identifies the schedules, layers and gates of a state."""
        needs_bits = not self._timed and not any(clock.callers for clock in self._clocks)
        kinds = checked_sources(self._layers, self._eval_bits, needs_bits=needs_bits)
        main = {"forward": self._forward, "backward": self._backward}
        return {
            **({} if self._layerwise is None else {"layerwise": repr(self._layerwise)}),
            **{name: "none" if source is None else kinds.get(id(source), "unused") for name, source in main.items()},
            "layers": "; ".join(
                f"{layer.name}: {kinds.get(id(layer.forward), '-')}, {kinds.get(id(layer.backward), '-')}"
                for layer in self._layers
                if not layer.called
            ),
            "gates": "none" if self.gates is None else repr((self.gates.blocks, self.gates.gating)),
            **({"phases": self._phases_in_words()} if self._timed else {}),
        }

    def _phases_in_words(self) -> str:
        """When the layers change their formats or skip, as a saved state has it."""
        called = {site for layer in self._layers if layer.called for site in layer.sites}
        timed = [t for t in self._timed if t.sites[0] not in called]
        return "; ".join(f"{t.sites[0].layer_name}: {t.starts}, {t.skip}, {t.turn}" for t in timed)

    def _attach(self, model: nn.Module) -> None:
        release(model)  # of what a copy has left of another controller
        self._take()
        if self.gates is not None:
            parameter = next(model.parameters(), None)
            self.gates.to("cpu" if parameter is None else parameter.device)
            self.gates.attach(model)
        self._follow_plateau()
        self.write()

    def _take(self) -> None:
        """Become the controller of its sites."""
        for site in self.sites():
            site.controller, site.lost_controller = self, False
        for clock in self._clocks:
            clock.controller = self

    def take(self, layer: QuantLayer) -> None:
        """Write a product in a function too, which just ran for the first time.

        Raises:
            UsageError: its formats cannot have the bits that it would get.
        """
        name = layer.sites()[0].name
        if self._layerwise is not None:
            warnings.warn(
                f"{name}: this product first ran after the controller was made, and {type(self._layerwise).__name__} "
                "gives bits to the layers that it began with: it keeps its recipe's bits. Run one forward before you "
                "make the controller",
                UserWarning,
                stacklevel=2,
            )
        forward = None if self._layerwise is not None else self._forward
        _, taken = controlled_layer(name, layer, forward, self._backward, self._rules)
        checked_sources([taken], self._eval_bits, needs_bits=False)
        self._layers.append(taken)
        self._timed += timed_layers(
            [taken.sites],
            total_steps=self.total_steps,
            steps_per_epoch=self._steps_per_epoch,
            turn=sum(timed.skip is not None for timed in self._timed),
        )
        self._take()
        self.write()

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not observe the step that its original is in."""
        return {**self.__dict__, "_measuring": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied together, model and controller stay together: the copied sites have the copied controller."""
        self.__dict__.update(state)
        self._take()

    def check_forward(self) -> None:
        """Raise if no training forward may begin, as the schedule is over; begin to measure if this step is for it."""
        if self.total_steps is not None and self._step >= self.total_steps:
            raise UsageError(
                f"a training forward after the last of total_steps={self.total_steps} steps: give the schedule as many "
                "total_steps as the run has, or call model.eval() to evaluate"
            )
        if self._layerwise is not None and self._measuring is None and self._layerwise.measures(self._step):
            self._measuring = Measuring(self._follow_layerwise())

    def write(self) -> None:
        """Set the bits of the next step and of an evaluation before it, whatever changed them meanwhile."""
        for timed in self._timed:  # before the bits, which are those of the phase
            timed.write(self._step)
        now: dict[tuple[int, int, bool], tuple[Widths, Widths]] = {}
        for layer in self._layers:
            key = (id(layer.forward), id(layer.backward), layer.has_rule)
            if key not in now:
                now[key] = layer.training(self._step), layer.evaluation(self._step, self._eval_bits)
            layer.write(*now[key])

    def _follow_plateau(self) -> None:
        """Give the gates the target of the plateau rule's present stage."""
        if self.gates is not None:
            self.gates.target = self._targets[0 if self._plateau is None else self._plateau.stage]


def _is_count(given: object) -> bool:
    return is_whole(given) and given >= 1
