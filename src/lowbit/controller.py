"""The precision controller: what writes the bits of a converted model while it trains.

Notation: t step (the batch counted from 0); forward bits are those of `input` and `weight`, backward bits those of
`grad_output`.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit.checks import check_keys, check_type, check_whole, checked, is_finite, is_whole
from lowbit.convert import Matcher, matches
from lowbit.errors import UsageError, shown, unknown
from lowbit.formats import Zero, check_bits
from lowbit.nn.gate import Block, Gates, release
from lowbit.nn.layers import QuantLayer
from lowbit.nn.site import Site
from lowbit.recipe import Gating, Recipe, recipes
from lowbit.schedules import RANGE_TEST, Constant, Cyclic, PlateauRule, RangeTest, Rule, Schedule, Source
from lowbit.tables import text_table

Bits = Source | int
EvalBits = int | Literal["highest", "current"]
# Which layers, and their (forward, backward) bits; None for either leaves the recipe's own.
LayerRule = tuple[Matcher | Callable[[nn.Module], bool], tuple[Bits | None, Bits | None] | None]

_MOST_LOOKS = 10**6

# (forward, backward) bits; None leaves the recipe's own.
_Widths = tuple[int | None, int | None]
_MOST_STEPS = 2**63 - 1


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution with several groups of one input channel each."""
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels


@dataclass(frozen=True, eq=False)
class _Layer:
    """One controlled layer: where its bits come from and which numbers of its sites they are."""

    name: str
    sites: tuple[Site, ...]
    forward: Source | None
    backward: Source | None
    has_rule: bool = False

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The recipe's bits of a site; all sites of a layer have the same."""
        return tuple(fmt.bits for _, _, fmt in self.sites[0].formats())

    @cached_property
    def places(self) -> tuple[frozenset[int], frozenset[int]]:
        """The places in a site's bits that forward and backward bits stand at."""
        return frozenset(self.sites[0].slots("input", "weight")), frozenset(self.sites[0].slots("grad_output"))

    def values(self, forward: int | None, backward: int | None) -> list[int]:
        """All bits of a site: the recipe's own where None is given."""
        wide, back = self.places
        given = [forward if i in wide else backward if i in back else None for i in range(len(self.own))]
        return [own if bits is None else bits for own, bits in zip(self.own, given, strict=True)]


class PrecisionController:
    """Sets the bits of a converted model's layers over a run, like a learning-rate scheduler sets rates.

    Call `step(loss)` after each step. Batch t trains at the bits of step t, which are set when the controller is made
    and by each `step`; a forward in evaluation mode runs at `eval_bits`. Bits are written in place into tensors, so a
    change neither recompiles nor allocates.

    Args:
        model: a converted model.
        forward: bits of `input` and `weight`, a schedule, a rule such as `schedules.Progressive`, or a number; None
            leaves them. ``Cyclic(low="range-test", ...)`` trains the first cycle as a range test and goes on with
            the width that it finds.
        backward: bits of `grad_output` in `grad_input`, and in `grad_weight` where the recipe has the same format in
            both (it does not bifurcate). None: what the rule in `forward` says, else the recipe's own.
        rules: pairs (which layers, (forward, backward)) for layers with bits of their own; which: an exact name, a
            compiled pattern of a whole name, an exact type, or a function of the layer. The first match decides; None
            in place of the pair leaves a layer to its recipe.
        gates: what chooses bits for each sample in `blocks`.
        blocks: names or patterns of names of the blocks that `gates` are for.
        eval_bits: forward bits in evaluation: ``"highest"`` that each layer ever takes, ``"current"``, or a number for
            all layers without a rule.
        steps_per_epoch: steps whose mean loss a plateau rule takes; needed iff there is one.
        range_test: how ``low="range-test"`` is found; None: from 2 bits on, the first cycle divided among the widths
            (10 steps each at least), a gain of more than 1 % of the loss.

    Attributes:
        gates: the gates, whose parameters train with the model's; None without.

    Raises:
        UsageError: schedules of different lengths, bits that a format cannot have, a rule or block that matches
            nothing, a model that is not converted, has no bits to set, or has a controller already.
    """

    gates: Gates | None

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        forward: Bits | None = None,
        backward: Bits | None = None,
        rules: Sequence[LayerRule] = (),
        gates: Gating | None = None,
        blocks: Sequence[str | re.Pattern[str]] = (),
        eval_bits: EvalBits = "highest",
        steps_per_epoch: int | None = None,
        range_test: RangeTest | None = None,
    ) -> None:
        self._forward, self._backward = _source("forward", forward), _source("backward", backward)
        if self._forward is None and self._backward is None and gates is None and not rules:
            raise UsageError("a controller with nothing to set: give forward, backward, gates or rules")
        if _is_rule(self._forward) and self._backward is not None and not isinstance(self._forward, RangeTest):
            raise UsageError(
                f"forward={self._forward!r} sets the bits of gradients too: leave `backward` out, or "
                "give grad_bits=[...]"
            )
        if _is_rule(self._backward):
            raise UsageError(f"backward={self._backward!r}: give a schedule or a number; a rule goes into `forward`")
        if eval_bits not in get_args(get_args(EvalBits)[1]) and not _is_count(eval_bits):
            raise UsageError(f"eval_bits={eval_bits!r}: give a number of bits, 'highest' or 'current'")
        self._eval_bits = eval_bits
        self._layers = self._plan(model, rules)
        chosen = _blocks(model, blocks) if gates is not None else []
        if blocks and gates is None:
            raise UsageError(f"blocks={list(blocks)} without gates: gates choose their bits; leave blocks out")
        pinned = {site for layer in self._layers if layer.has_rule for site in layer.sites}
        self.gates = None if gates is None else Gates([_block(*b, pinned) for b in chosen], gates)
        self._targets = () if gates is None else gates.targets
        self._plateau = None if gates is None else gates.rule()
        self.total_steps = self._common_length()
        self._test = self._range_test(range_test)
        self._steps_per_epoch = self._check_epochs(steps_per_epoch)
        self._step = 0
        self._losses, self._counted = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        self._fingerprint = self._check_widths()
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
        range_test: RangeTest | None = None,
    ) -> "PrecisionController":
        """The controller that the recipe of a converted model asks for: its schedule or its gates.

        Args:
            model: a model converted with a recipe such as ``"cpt"``, ``"pfq"``, ``"dfq"``, ``"fractrain"``.
            total_steps: length of the run.
            steps_per_epoch: needed for plateau rules and for times in epochs.
            blocks: needed for gates: the names of the blocks that they choose bits for.
            rules: as for the class; they come before the recipe's own for depthwise convolutions.
            eval_bits: as for the class.
            range_test: as for the class.

        Raises:
            UsageError: the model has no recipe whose bits change, or several; or as for the class.
        """
        layers = _layers(model)
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
        if recipe.depthwise and any(is_depthwise(layer) for _, layer in layers if _recipe_of(layer) == recipe):
            own.append((lambda layer: _recipe_of(layer) == recipe and is_depthwise(layer), recipe.depthwise))
        if any(_recipe_of(layer) != recipe for _, layer in layers):
            own.append((lambda layer: _recipe_of(layer) != recipe, None))
        if recipe.gates is not None and not blocks:
            raise UsageError(
                f"recipe {recipe.name!r} gates blocks: give their names or patterns, e.g. "
                r"blocks=[re.compile(r'groups\.\d\.\d')]"
            )
        forward: Bits | None = None
        backward: Bits | None = None
        if recipe.schedule is not None:
            forward = recipe.schedule.forward.build(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
            if recipe.schedule.backward is not None:
                backward = recipe.schedule.backward.build(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        controller = cls(
            model,
            forward=forward,
            backward=backward,
            rules=[*rules, *own],
            gates=recipe.gates,
            blocks=blocks,
            eval_bits=eval_bits,
            steps_per_epoch=steps_per_epoch if _is_rule(forward) or (recipe.gates and recipe.gates.rule()) else None,
            range_test=range_test,
        )
        controller.total_steps = total_steps
        return controller

    @property
    def last_step(self) -> int:
        """How often `step` was called: the number of the batch that trains next."""
        return self._step

    @property
    def forward_bits(self) -> int | None:
        """Forward bits of the next batch in layers without a rule; None where the recipe or a gate decides."""
        return self._now(self._forward)

    @property
    def backward_bits(self) -> int | None:
        """Backward bits of the next batch in layers without a rule; None where the recipe or a gate decides."""
        return self._backward_now(self._forward, self._backward)

    @property
    def stage(self) -> int | None:
        """The stage of the plateau rule, from 0; None without one."""
        rule = self._plateau or self._forward
        return rule.stage if isinstance(rule, PlateauRule) else None

    @property
    def range_test(self) -> RangeTest | None:
        """The range test of the first cycle, done or not; None without one."""
        return self._test

    def bits(self) -> dict[str, tuple[int | None, int | None]]:
        """The (forward, backward) bits of each controlled layer in the next training forward, by its name.

        Of each the first that can be set: a recipe may have bits that differ between products. None where none can,
        and where a gate chooses.
        """
        table: dict[str, tuple[int | None, int | None]] = {}
        for layer in self._layers:
            if layer.sites[0].gated:
                table[layer.name] = (None, None)
                continue
            values = layer.values(*self._present(layer, training=True))
            first = [min(places, default=None) for places in layer.places]
            table[layer.name] = (
                None if first[0] is None else values[first[0]],
                None if first[1] is None else values[first[1]],
            )
        return table

    def sites(self) -> list[Site]:
        """Every site that it writes."""
        return [site for layer in self._layers for site in layer.sites]

    def step(self, loss: Tensor | float | None = None) -> None:
        """Go on to the next batch, after the optimizer's step of the present one.

        Args:
            loss: of the batch, one number; needed by plateau rules and range tests, and by them alone.

        Raises:
            UsageError: past the end of the schedule, or a loss is needed and missing.
            RunError: a rule met a loss that is not finite.
        """
        if self.total_steps is not None and self._step >= self.total_steps:
            raise UsageError(
                f"step() number {self._step + 1} of a run of total_steps={self.total_steps}: give the schedule as many "
                "total_steps as the run has"
            )
        self._feed(loss)
        self._step += 1
        self.write()

    def state_dict(self) -> dict[str, Any]:
        """All that the controller remembers, the weights of its gates included: plain values and tensors."""
        return {
            "version": 1,
            "fingerprint": self._fingerprint,
            "step": self._step,
            "losses": float(self._losses),
            "counted": self._counted,
            "rules": [rule.state_dict() for rule in self._rules()],
            "gates": None if self.gates is None else self.gates.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, for the same model and schedules; else nothing changes.

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
        counted = check_whole("load_state_dict: counted", state["counted"], 0, (self._steps_per_epoch or 1) - 1)
        if not is_finite(state["losses"]) or (not counted and state["losses"]):
            raise UsageError(
                f"load_state_dict: losses={shown(state['losses'])} of {counted} steps: expected the finite sum of the "
                "losses of so many steps, 0 of none"
            )
        rules = self._rules()
        if not isinstance(state["rules"], list) or len(state["rules"]) != len(rules):
            raise UsageError(f"load_state_dict: rules={shown(state['rules'])}: expected a list of {len(rules)} states")
        if self.gates is None and state["gates"] is not None:
            raise UsageError("load_state_dict: the state is of a controller with gates, and this one has none")
        before = [rule.state_dict() for rule in rules]
        try:
            for rule, saved in zip(rules, state["rules"], strict=True):
                rule.load_state_dict(saved)
            if self.gates is not None:
                self.gates.load_state_dict(state["gates"])
        except Exception as error:  # a rule of a user's own raises what it likes
            for rule, saved in zip(rules, before, strict=True):
                rule.load_state_dict(saved)
            raise UsageError(f"load_state_dict: {error}") from error
        self._step, self._counted = state["step"], counted
        self._losses = torch.tensor(state["losses"], dtype=torch.float64, device="cpu")
        self._follow_rules()
        self.write()

    def _check_fingerprint(self, saved: object) -> None:
        """Raise where a state is of other schedules, layers or gates."""
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
        """Let go of the model: hooks and gates go, and every layer has its recipe's bits again."""
        if self.gates is not None:
            self.gates.detach()
        for site in self.sites():
            site.follow_recipe()
        self._layers = []

    def __str__(self) -> str:
        """A table of the controlled layers and their bits now."""
        rows = [
            [
                layer.name or "(model)",
                *("-" if b is None else str(b) for b in bits),
                "a gate" if layer.sites[0].gated else _shown(layer.forward),
            ]
            for layer, bits in zip(self._layers, self.bits().values(), strict=True)
        ]
        length = "without end" if self.total_steps is None else f"of {self.total_steps}"
        return f"step {self._step} {length}\n\n" + text_table(["layer", "forward", "backward", "from"], rows)

    # Planning: what sets which bits.

    def _plan(self, model: nn.Module, rules: Sequence[LayerRule]) -> list[_Layer]:
        planned, used = [], set()
        for name, layer in _layers(model):
            sites = tuple(layer.sites())
            if taken := [site for site in sites if site.controller is not None]:
                raise UsageError(
                    f"{taken[0].name or 'the model'} has a PrecisionController already: a model has one; call remove() "
                    "on the first, or set its layers apart by rules"
                )
            index = next((i for i, (which, _) in enumerate(rules) if _matches(which, name, layer)), None)
            used.add(index)
            if index is None:
                planned.append(_Layer(name, sites, self._forward, self._backward))
            else:
                pair = rules[index][1] or (None, None)
                forward, backward = _source(f"rule {index + 1}", pair[0]), _source(f"rule {index + 1}", pair[1])
                if _is_rule(forward) or _is_rule(backward) or _asks_for_test(forward) or _asks_for_test(backward):
                    raise UsageError(
                        f"rule {index + 1}: what follows the loss goes into `forward`; a rule takes schedules and "
                        "numbers"
                    )
                planned.append(_Layer(name, sites, forward, backward, has_rule=True))
        for index, (which, _) in enumerate(rules):
            if index not in used:
                shown = which.pattern if isinstance(which, re.Pattern) else getattr(which, "__name__", which)
                raise UsageError(
                    f"rule {index + 1}, {shown!r}, decided no converted layer that an earlier rule did not"
                )
        return planned

    def _sources(self) -> list[Source]:
        every = [s for layer in self._layers for s in (layer.forward, layer.backward)]
        return [s for i, s in enumerate(every) if s is not None and all(s is not other for other in every[:i])]

    def _rules(self) -> list[Any]:
        """What has a state: the rule in `forward`, the range test, the plateau rule of the gates."""
        forward = [self._forward] if _is_rule(self._forward) and self._forward is not self._test else []
        return [*forward, *(rule for rule in (self._test, self._plateau) if rule is not None)]

    def _common_length(self) -> int | None:
        lengths = {s.total_steps for s in self._sources() if isinstance(s, Schedule)} - {None}
        if len(lengths) > 1:
            raise UsageError(f"schedules of {sorted(map(str, lengths))} steps: give all of them the same total_steps")
        return next(iter(lengths), None)

    def _range_test(self, given: RangeTest | None) -> RangeTest | None:
        forward = self._forward
        if isinstance(forward, RangeTest) and given is None:
            return forward
        if not isinstance(forward, Cyclic) or forward.low != RANGE_TEST:
            if given is not None:
                raise UsageError(f"range_test={given!r} goes with forward=Cyclic(low='range-test', ...)")
            return None
        if given is not None and given.high != forward.high:
            raise UsageError(f"range_test up to {given.high} bits for a schedule up to {forward.high}: give one number")
        test = given or RangeTest.of_first_cycle(forward)
        if test.most_steps > forward.total_steps // 2:
            raise UsageError(
                f"a range test of up to {test.most_steps} steps in a run of {forward.total_steps} takes more than half "
                f"of it: {test.steps_per_bit} steps at each width; train longer, take fewer, or give `low` a number"
            )
        return test

    def _check_epochs(self, steps_per_epoch: int | None) -> int | None:
        needed = self.stage is not None
        if needed and not _is_count(steps_per_epoch):
            raise UsageError(
                f"steps_per_epoch={steps_per_epoch!r}: a plateau rule takes the mean loss of so many steps; give a "
                "whole number, 1 or more"
            )
        if not needed and steps_per_epoch is not None:
            raise UsageError(f"steps_per_epoch={steps_per_epoch} without a plateau rule: leave it out")
        return steps_per_epoch

    def _check_widths(self) -> dict[str, Any]:
        """Raise where a format cannot have the bits that it would get; what identifies the schedules of a state."""
        kinds, seen = {}, {}
        for known in self._sources():
            widths = _widths(known)
            seen[id(known)] = set(widths)
            kinds[id(known)] = f"{type(known).__name__} {zlib.crc32(repr(widths).encode()):08x}"
        found = False
        evaluation = () if isinstance(self._eval_bits, str) else (self._eval_bits,)
        for layer in self._layers:
            grads = getattr(layer.forward, "grad_bits", ()) if layer.backward is None else ()
            for site in layer.sites:
                for source, slots, more in (
                    (layer.forward, site.slots("input", "weight"), () if layer.has_rule else evaluation),
                    (layer.backward, site.slots("grad_output"), grads),
                ):
                    for fmt in slots.values():
                        found = True
                        for bits in seen.get(id(source), set()) | set(more):
                            _check_width(site, bits, fmt.zero)
        if not found:
            raise UsageError(
                "no layer here has an integer format, so there are no bits to set: convert the model with a recipe of "
                "integer formats, e.g. sbm8-cpt"
            )
        main = {"forward": self._forward, "backward": self._backward}
        return {
            **{name: "none" if source is None else kinds.get(id(source), "unused") for name, source in main.items()},
            "layers": "; ".join(
                f"{layer.name}: {kinds.get(id(layer.forward), '-')}, {kinds.get(id(layer.backward), '-')}"
                for layer in self._layers
            ),
            "gates": "none" if self.gates is None else repr((self.gates.blocks, self.gates.gating)),
        }

    def _attach(self, model: nn.Module) -> None:
        release(model)  # of what a copy has left of another controller
        self._take()
        if self.gates is not None:
            parameter = next(model.parameters(), None)
            self.gates.to("cpu" if parameter is None else parameter.device)
            self.gates.attach(model)
        self._follow_rules()
        self.write()

    def _take(self) -> None:
        """Be the controller of its sites."""
        for site in self.sites():
            site.controller, site.lost_controller = self, False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of model and controller together is of both: the copied sites have the copied controller."""
        self.__dict__.update(state)
        self._take()

    # Running.

    def check_forward(self) -> None:
        """Raise where no training forward may begin: the schedule is over."""
        if self.total_steps is not None and self._step >= self.total_steps:
            raise UsageError(
                f"a training forward after the last of total_steps={self.total_steps} steps: give the schedule as many "
                "total_steps as the run has, or call model.eval() to evaluate"
            )

    def _now(self, source: Source | None) -> int | None:
        if source is None:
            return None
        live: Source = self._live(source)
        if isinstance(live, Schedule):
            return live(self._step if live.total_steps is None else min(self._step, live.total_steps - 1))
        return live.current_bits

    def _live(self, source: Source) -> Source:
        """The range test in place of a schedule that waits for it, and the schedule with its choice once it is over."""
        if self._test is None or not isinstance(source, Cyclic) or source.low != RANGE_TEST:
            return source
        return replace(source, low=self._test.current_bits) if self._test.done else self._test

    def _backward_now(self, forward: Source | None, backward: Source | None) -> int | None:
        if backward is None and forward is not None and not isinstance(forward, Schedule):
            return forward.current_grad_bits
        return self._now(backward)

    def _present(self, layer: _Layer, *, training: bool) -> tuple[int | None, int | None]:
        """The (forward, backward) bits of a layer now; None leaves the recipe's."""
        forward = self._now(layer.forward)
        if not training and layer.forward is not None and self._eval_bits != "current":
            own = isinstance(self._eval_bits, str) or layer.has_rule
            forward = self._live(layer.forward).max_bits if own else int(self._eval_bits)
        return forward, self._backward_now(layer.forward, layer.backward)

    def write(self) -> None:
        """Set the bits of the step that comes next and of an evaluation before it, whatever wrote them since."""
        now: dict[tuple[int, int, bool], tuple[_Widths, _Widths]] = {}
        for layer in self._layers:
            key = (id(layer.forward), id(layer.backward), layer.has_rule)
            if key not in now:
                now[key] = self._present(layer, training=True), self._present(layer, training=False)
            training, evaluation = now[key]
            for site in layer.sites:
                site.set_bits(layer.values(*training), layer.values(*evaluation))

    def _feed(self, loss: Tensor | float | None) -> None:
        """Show the loss to the rules that follow it, the same number on every rank."""
        testing = self._test is not None and not self._test.done
        if not testing and self.stage is None:
            return
        if loss is None:
            raise UsageError("step() without a loss: a plateau rule or a range test needs step(loss)")
        if not isinstance(loss, Tensor):
            check_type("loss", loss, float)
        value = torch.as_tensor(
            loss, dtype=torch.float64, device=loss.device if isinstance(loss, Tensor) else "cpu"
        ).detach()
        if value.numel() != 1:
            raise UsageError(f"step() with a loss of shape {tuple(value.shape)}: give one number, e.g. its mean")
        value = value.reshape(())
        if testing and self._test is not None:
            self._test.update(_mean_over_ranks(value))
        if self.stage is not None:
            assert self._steps_per_epoch is not None
            losses, counted = self._losses.to(value.device) + value, self._counted + 1
            if counted == self._steps_per_epoch:
                mean = _mean_over_ranks(losses / counted)
                losses, counted = torch.zeros((), dtype=torch.float64, device="cpu"), 0
                rule = self._plateau or self._forward
                assert isinstance(rule, PlateauRule)
                rule.update(mean)
            self._losses, self._counted = losses, counted
        self._follow_rules()

    def _follow_rules(self) -> None:
        """Take over the target that the plateau rule is at."""
        if self.gates is not None:
            self.gates.target = self._targets[0 if self._plateau is None else self._plateau.stage]


def _layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """The converted layers of a model with their names, in order."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLayer)]
    if not found:
        raise UsageError("nothing in this model is converted: call lowbit.convert_(model, recipe) first")
    return found


def _recipe_of(layer: nn.Module) -> Recipe:
    assert isinstance(layer, QuantLayer)
    return layer.sites()[0].recipe


def _matches(which: Matcher | Callable[[nn.Module], bool], name: str, layer: nn.Module) -> bool:
    if callable(which) and not isinstance(which, type):
        return bool(which(layer))
    return matches(which, name, layer)


def _blocks(model: nn.Module, given: Sequence[str | re.Pattern[str]]) -> list[tuple[str, nn.Module]]:
    """The blocks of these names or patterns, in the model's order; none lies in another."""
    modules = dict(model.named_modules())
    if isinstance(given, str | re.Pattern) or not given:
        raise UsageError(f"blocks={given!r}: give a list of the names or patterns of the blocks that gates are for")
    for which in given:
        if not isinstance(which, str | re.Pattern):
            raise UsageError(f"block {which!r}: give a name or a compiled pattern of whole names")
        if not any(matches(which, name, module) for name, module in modules.items()):
            shown = which.pattern if isinstance(which, re.Pattern) else which
            if isinstance(which, str):
                raise unknown("block", shown, (name for name in modules if name))
            raise UsageError(
                f"the pattern {shown!r} of blocks matches no module of the model: it must match whole names"
            )
    chosen = {name: module for name, module in modules.items() if any(matches(w, name, module) for w in given)}
    for name in chosen:
        if outer := [other for other in chosen if other != name and name.startswith(f"{other}." if other else "")]:
            raise UsageError(f"block {name!r} lies in block {outer[0]!r}: a layer has one gate; name one of the two")
    return list(chosen.items())


def _block(name: str, module: nn.Module, pinned: set[Site]) -> Block:
    """What gates need to know of a block."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantLayer)]
    gated = [site for layer in layers for site in layer.sites() if site not in pinned and len(site.slots("weight")) > 0]
    if not gated:
        raise UsageError(f"block {name!r} has no converted layer whose bits a gate could choose")
    for layer in layers:
        if getattr(layer, "batch_first", True) is False:
            raise UsageError(
                f"block {name!r}: {layer.sites()[0].name} has batch_first=False; gates need samples on the first axis"
            )
    first: Any = next(layer for layer in layers if layer.sites()[0] in gated or layer.sites()[0] in pinned)
    inputs = next(
        int(getattr(first, attribute))
        for attribute in ("in_channels", "in_features", "input_size", "embed_dim")
        if hasattr(first, attribute)
    )
    return Block(
        name=name,
        module=module,
        gated=gated,
        inputs=inputs,
        channels_last=not isinstance(first, nn.modules.conv._ConvNd),
    )


def _source(what: str, given: Any) -> Source | None:
    """A number as a constant schedule; a UsageError unless it is something with bits."""
    if given is None or isinstance(given, Schedule | Rule):
        return given
    if is_whole(given):
        return Constant(bits=given)
    raise UsageError(
        f"{what}={shown(given)}: give a number of bits, a schedule, or a rule such as schedules.Progressive"
    )


def _is_rule(source: object) -> bool:
    return isinstance(source, Rule) and not isinstance(source, Schedule)


def _asks_for_test(source: object) -> bool:
    return isinstance(source, Cyclic) and source.low == RANGE_TEST


def _is_count(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 1


def _widths(source: Source) -> list[int]:
    """The bits of every step (of a million of them where there are more), of every stage, of every width of a test."""
    if isinstance(source, Cyclic) and source.low == RANGE_TEST:
        return list(range(min(2, source.high), source.high + 1))
    if isinstance(source, Schedule):
        total = source.total_steps or 1
        return [source(step) for step in range(0, total, -(-total // _MOST_LOOKS))] + [source.max_bits]
    if isinstance(source, RangeTest):
        return list(range(source.low, source.high + 1))
    return [*getattr(source, "bits", ()), source.max_bits]


def _check_width(site: Site, bits: int, zero: Zero) -> None:
    try:
        check_bits(bits, zero)
    except UsageError as error:
        raise UsageError(f"{site.name or 'the model'} of recipe {site.recipe.name!r}: {error}") from error


def _mean_over_ranks(value: Tensor) -> float:
    """The mean of one number over all processes of a distributed run, bit for bit the same on each of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return float(value)
    # Gathered and summed in the order of ranks: a reduction may add in another order on another rank.
    every = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(every, value)
    return float(torch.stack(every).mean())


def _shown(source: Source | None) -> str:
    if source is None:
        return "the recipe"
    return f"{source.bits} bits" if isinstance(source, Constant) else type(source).__name__
