"""What to train a model with on this machine: real steps of several variants timed side by side, before you pay.

A variant is a precision (fp32, bf16 autocast, a recipe inside bf16 autocast or not) and a memory format. All are timed
in paired rounds, and the slow ones drop out early. What single layers cost is only a hint: a layer is advised to stay
as it is only if a whole step without it was faster.
"""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.conversion.convert import convert_
from lowbit.conversion.rules import as_recipe, some
from lowbit.errors import UsageError, shown
from lowbit.evidence.timeline import Timeline, tensors_in, timeline
from lowbit.inputs.checks import checked, is_finite
from lowbit.machine import here, paired, ratio
from lowbit.methods.recipe import Recipe
from lowbit.nn import kinds
from lowbit.nn.layers import converted_layers
from lowbit.tables import Table, html_of, json_text

Loss = Callable[[Any], Tensor]

RECIPES = ("int8", "sbm8")
"""What is tried unless recipes are named: those whose products run on 8-bit units."""

_GAIN = 1.02  # a difference below 2 % is within the noise of a shared machine
_SLOW = 1.25  # a variant this many times slower than the fastest in its first rounds is not timed further
_FIRST, _MOST = 2, 15  # rounds before variants drop out, and at most
_SHOWN = 8  # rows of the table of layers


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a step is run.

    Args:
        recipe: name of a recipe; None: the plain model.
        autocast: whether the forward runs in bf16 autocast.
        channels_last: whether parameters and images with 4 axes lie in channels last.
    """

    recipe: str | None = None
    autocast: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        plain = "bf16 autocast" if self.autocast else "fp32"
        name = plain if self.recipe is None else self.recipe + (" in bf16 autocast" if self.autocast else "")
        return name + (", channels last" if self.channels_last else "")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One variant's steps.

    Args:
        variant: how they were run.
        ms: median milliseconds of a step.
        to_fp32: how many times as fast as the model as it is, in fp32; the median over paired rounds.
        to_bf16: the same against the faster of the plain model's variants in bf16 autocast.
        rounds: rounds that counted.
    """

    variant: Variant
    ms: float
    to_fp32: float
    to_bf16: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """Where the time of a step goes: a module, or what runs in it outside its own modules.

    Args:
        name: its name; ``""`` is the root: functions that it calls itself, the loss, and the update.
        type: its type.
        plain_ms: milliseconds, forward and backward, in the fastest variant of the plain model.
        ms: the same in the fastest variant.
    """

    name: str
    type: str
    plain_ms: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A whole step with some layers left plain, against the step with all of them converted.

    Args:
        layers: their names.
        speed: how many times as fast as with them converted; the median over paired rounds.
    """

    layers: tuple[str, ...]
    speed: float

    @property
    def gains(self) -> bool:
        """Whether leaving them plain makes the step faster by more than noise."""
        return self.speed >= _GAIN


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was measured and what follows from it; `print` shows it.

    Args:
        timed: the variants, fastest first.
        shares: where the time goes, longest first.
        trials: layers that looked slower converted than plain, each with a check by whole steps.
        notes: what a reader must know.
    """

    timed: tuple[Timed, ...]
    shares: tuple[Share, ...]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    @property
    def fastest(self) -> Variant:
        """The fastest variant; one of the plain model unless a recipe gains more than noise."""
        plain = next(t for t in self.timed if t.variant.recipe is None)
        first = self.timed[0]
        return first.variant if plain.ms >= _GAIN * first.ms else plain.variant

    @property
    def rules(self) -> list[tuple[str, None]]:
        """Rules for `convert_` that leave plain the layers without which the whole step was faster."""
        return [(name, None) for trial in self.trials if trial.gains for name in trial.layers]

    @property
    def code(self) -> str:
        """The lines that make the fastest variant of a model."""
        best, lines = self.fastest, []
        if best.channels_last:
            lines.append("model = model.to(memory_format=torch.channels_last)  # and the images")
        if best.recipe is not None:
            rules = f", rules={self.rules}" if self.rules else ""
            lines.append(f'lowbit.convert_(model, "{best.recipe}"{rules})')
        if best.autocast:
            lines.append('with torch.autocast("cpu", torch.bfloat16): ...  # around the forward and the loss')
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts()))

    def _repr_html_(self) -> str:
        return html_of(self._parts())

    def _parts(self) -> list[str | Table]:
        speeds = [
            [str(t.variant), f"{t.ms:.1f}", f"{t.to_fp32:.2f}", f"{t.to_bf16:.2f}", str(t.rounds)] for t in self.timed
        ]
        longest = self.shares[:_SHOWN]
        places = [[s.name or "(model)", s.type, f"{s.plain_ms:.2f}", f"{s.ms:.2f}"] for s in longest]
        rest = self.shares[_SHOWN:]
        if rest:
            sums = [f"{sum(s.plain_ms for s in rest):.2f}", f"{sum(s.ms for s in rest):.2f}"]
            places.append([f"{len(rest)} others", "", *sums])
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for share in self.shares:
            totals[share.type][0] += share.plain_ms
            totals[share.type][1] += share.ms
        by_kind = sorted(totals.items(), key=lambda item: -item[1][1])
        columns = ["plain ms", "fastest ms"]
        parts: list[str | Table] = [
            self._verdict(),
            Table(["variant", "ms a step", "speed to fp32", "to bf16", "rounds"], speeds),
            "Where the time goes, forward and backward (timed layer by layer, which costs time itself):",
            Table(["kind", *columns], [[kind, f"{a:.2f}", f"{b:.2f}"] for kind, (a, b) in by_kind[:_SHOWN]]),
            Table(["layer", "kind", *columns], places),
        ]
        parts += [self._of_trial(trial) for trial in self.trials]
        return [*parts, *("note: " + note for note in self.notes)]

    def _verdict(self) -> str:
        best = next(t for t in self.timed if t.variant == self.fastest)
        speeds = f"{best.to_fp32:.2f} times fp32 as it is, {best.to_bf16:.2f} times bf16 autocast"
        head = f"fastest here: {best.variant} ({speeds})"
        if best.variant.recipe is None:
            head += "\nNo recipe gains more than 2 % on this model and machine."
        return f"{head}\n{self.code}".rstrip()

    def _of_trial(self, trial: Trial) -> str:
        names = some(trial.layers)
        if trial.gains:
            return f"Leave {names} plain: the whole step is {trial.speed:.2f} times as fast without them converted."
        return (
            f"{names}: slower alone, but the whole step without them converted is {trial.speed:.2f} times as fast. "
            "Convert them."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "version": 1,
            "fastest": asdict(self.fastest),
            "rules": [name for name, _ in self.rules],
            "code": self.code,
            "timed": [asdict(t) for t in self.timed],
            "shares": [asdict(share) for share in self.shares],
            "trials": [{**asdict(trial), "gains": trial.gains} for trial in self.trials],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json_text(self.to_dict())


def mean_square(output: Any) -> Tensor:
    """The loss that stands for a model's own: `output.loss` where there is one, else the mean square of the outputs.

    Raises:
        UsageError: the output holds no tensor of real numbers that needs a gradient.
    """
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        return loss
    found = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
    if not found:
        raise UsageError(
            f"advise: the model's output, {shown(output)}, holds no tensor that needs a gradient: give loss=, a "
            "function of the output"
        )
    return torch.stack([t.float().square().mean() for t in found]).sum()


@checked
def advise(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | None = None,
    recipes: Sequence[str | Recipe] = RECIPES,
    seconds: float = 12.0,
) -> Advice:
    """Time real training steps of a model in fp32, bf16 autocast and recipes, and say which is fastest here.

    A step is a forward in training mode, a backward, and an update by SGD with momentum (rate 0). The model, its
    parameters and torch's random state are left as they are: copies train. The layers that look slower converted than
    plain are then left plain in a step of their own, which alone decides what is advised.

    Args:
        model: a plain model on the CPU.
        batch: its input: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        loss: a function of the model's output that returns a scalar; None: `mean_square`.
        recipes: recipes to try, each inside bf16 autocast and, unless it asks for that, alone.
        seconds: about how long to measure; every variant takes at least two steps, and a warm-up.

    Returns:
        what was measured, and the advice.

    Raises:
        UsageError: a model that is converted already or not on the CPU, one without parameters that train, a batch that
            it does not take, an unknown recipe, no time.
    """
    if not is_finite(seconds) or seconds <= 0:
        raise UsageError(f"advise: seconds={shown(seconds)} must be a positive number")
    if converted_layers(model):
        raise UsageError("advise: this model is converted already: lowbit.restore_(model) first")
    if elsewhere := {p.device.type for p in model.parameters()} - {"cpu"}:
        raise UsageError(f"advise: the model is on {', '.join(sorted(elsewhere))}, and only the CPU is timed")
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("advise: no parameter of this model needs a gradient, so there is no training step")
    chosen = {recipe.name: recipe for recipe in map(as_recipe, recipes)}
    if len(chosen) != len(recipes):
        raise UsageError("advise: two of the recipes have the same name")
    if other := [r.name for r in chosen.values() if r.autocast is not None and r.autocast.dtype != "bf16"]:
        raise UsageError(f"advise: steps are timed in fp32 and in bf16 autocast, and {other[0]} asks for another one")
    with torch.random.fork_rng(devices=[]):
        return _Bench(model, batch, loss or mean_square, chosen, seconds).advice()


class _Bench:
    """The copies of a model, and the steps that train them."""

    def __init__(self, model: nn.Module, batch: Any, loss: Loss, recipes: Mapping[str, Recipe], seconds: float) -> None:
        self.loss, self.recipes, self.seconds = loss, recipes, seconds
        self.notes: list[str] = []
        images = any(p.dim() == 4 for p in model.parameters())
        self.formats = (False, True) if images and not _is_channels_last(model) else (False,)
        self.plain = {last: _copy(model, last) for last in self.formats}
        self.batches = {last: _batch(batch, last) for last in self.formats}
        # All copies of one memory format share their parameters: they take the memory of one model.
        self.optimizers = {
            last: torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.0, momentum=0.9)
            for last, plain in self.plain.items()
        }

    def advice(self) -> Advice:
        began = time.perf_counter()
        models: dict[Variant, nn.Module] = {}
        for last in self.formats:
            for autocast in (False, True):
                models[Variant(autocast=autocast, channels_last=last)] = self.plain[last]
                for name, recipe in self.recipes.items():
                    if recipe.autocast is not None and not autocast:
                        continue
                    variant = Variant(recipe=name, autocast=autocast, channels_last=last)
                    models[variant] = self.converted(variant)
        taken = self.race(models, 0.6 * self.seconds)
        timed = _timed(taken)
        plain = next(t.variant for t in timed if t.variant.recipe is None)
        best = timed[0].variant
        shares, slower = self.shares(plain, best, models)
        trials = [] if best.recipe is None else self.trials(best, slower, began + self.seconds)
        return Advice(timed=tuple(timed), shares=tuple(shares), trials=tuple(trials), notes=(str(here()), *self.notes))

    def converted(self, variant: Variant, leave: Sequence[str] = ()) -> nn.Module:
        """A converted copy that shares its parameters with the plain one."""
        assert variant.recipe is not None
        plain = self.plain[variant.channels_last]
        model = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        rules = [(name, None) for name in leave]
        report = convert_(model, self.recipes[variant.recipe], rules=rules, strict=False)
        alone = variant.autocast is (self.recipes[variant.recipe].autocast is not None)  # once for each recipe
        if not leave and alone and not variant.channels_last:
            left = [row.name for row in report.rows if not row.converted and row.weights]
            engines = {e for row in report.rows if row.converted for e in row.engines.values()}
            if left:
                self.notes.append(f"{variant.recipe} leaves {some(left)} as they are; print(convert_(...)) says why")
            if engines == {"reference"}:
                self.notes.append(f"{variant.recipe} is simulated on this machine: print(convert_(...)) says why")
        return model

    def step(self, model: nn.Module, variant: Variant) -> None:
        """One training step."""
        optimizer = self.optimizers[variant.channels_last]
        self.loss_of(model, variant).backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss_of(self, model: nn.Module, variant: Variant) -> Tensor:
        args, kwargs = self.batches[variant.channels_last]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=variant.autocast):
            return self.loss(model(*args, **kwargs))

    def race(self, models: Mapping[Variant, nn.Module], seconds: float) -> dict[Variant, list[float]]:
        """Seconds of each variant by round; those far behind the fastest leave after the first rounds."""
        names = {str(variant): variant for variant in models}
        steps = {name: partial(self.step, models[v], v) for name, v in names.items()}
        began = time.perf_counter()
        taken = paired(steps, _FIRST, warm_up=1)
        least = {name: min(ran) for name, ran in taken.items()}
        fastest = min(least.values())
        # fp32 and the best of plain bf16 stay: speeds are told against them.
        bases = (str(Variant()), min((n for n, v in names.items() if _is_bf16(v)), key=lambda n: least[n]))
        kept = {n: step for n, step in steps.items() if n in bases or least[n] <= _SLOW * fastest}
        left = seconds - (time.perf_counter() - began)
        rounds = min(_MOST, int(left / sum(least[name] for name in kept)))
        if rounds > 0:
            for name, more in paired(kept, rounds, warm_up=0).items():
                taken[name] += more
        return {names[name]: ran for name, ran in taken.items()}

    def shares(
        self, plain: Variant, best: Variant, models: Mapping[Variant, nn.Module]
    ) -> tuple[list[Share], list[str]]:
        """Where the time of two variants goes, and the layers that look slower converted."""
        first, second = (self.time_modules(models[v], v) for v in (plain, best))
        types = {name: kinds.plain_type(m).__name__ for name, m in models[best].named_modules()}
        shares = [
            Share(name=name, type=kind, plain_ms=1e3 * first.get(name, 0.0), ms=1e3 * second.get(name, 0.0))
            for name, kind in types.items()
            if first.get(name) or second.get(name)
        ]
        layers = converted_layers(models[best])
        slower = [s.name for s in shares if s.name in layers and s.ms > s.plain_ms]
        return sorted(shares, key=lambda share: -share.ms), slower

    def time_modules(self, model: nn.Module, variant: Variant) -> dict[str, float]:
        """Seconds of each module, the smallest of three steps."""
        found: list[Timeline] = []
        for _ in range(3):
            with timeline(model) as times:
                self.loss_of(model, variant).backward()
            found.append(times)
            self.optimizers[variant.channels_last].zero_grad()
        names = {name for times in found for name in (*times.forward, *times.backward)}
        return {name: min(times.seconds(name) for times in found) for name in names}

    def trials(self, best: Variant, slower: Sequence[str], until: float) -> list[Trial]:
        """Whole steps without the layers that looked slower: all at once, then one by one while there is time."""
        if not slower:
            return []
        sets = [tuple(slower), *((name,) for name in slower if len(slower) > 1)]
        found: list[Trial] = []
        for leave in sets:
            if found and (time.perf_counter() > until or found[0].gains):
                break
            found.append(self.trial(best, leave))
        return found

    def trial(self, best: Variant, leave: tuple[str, ...]) -> Trial:
        """A whole step without some layers converted, against the one with all of them."""
        if len(leave) == len(converted_layers(self.converted(best))):
            without = self.plain[best.channels_last]
        else:
            without = self.converted(best, leave)
        steps = {
            "all": partial(self.step, self.converted(best), best),
            "without": partial(self.step, without, best),
        }
        taken = paired(steps, 5, warm_up=1)
        return Trial(layers=leave, speed=ratio(taken["all"], taken["without"]))


def _timed(taken: Mapping[Variant, Sequence[float]]) -> list[Timed]:
    """The variants, fastest first, with their speeds in the rounds that they share with what they are compared with."""
    medians = {variant: statistics.median(ran) for variant, ran in taken.items()}
    fp32 = taken[Variant()]
    bf16 = taken[min(filter(_is_bf16, taken), key=lambda v: medians[v])]

    def speed(base: Sequence[float], ran: Sequence[float]) -> float:
        rounds = min(len(base), len(ran))
        return ratio(base[:rounds], ran[:rounds])

    found = [
        Timed(variant=v, ms=1e3 * medians[v], to_fp32=speed(fp32, ran), to_bf16=speed(bf16, ran), rounds=len(ran))
        for v, ran in taken.items()
    ]
    return sorted(found, key=lambda t: t.ms)


def _is_bf16(variant: Variant) -> bool:
    """Whether it is the plain model in bf16 autocast."""
    return variant.recipe is None and variant.autocast


def _is_channels_last(model: nn.Module) -> bool:
    """Whether no 4-axis parameter would change its order in channels last."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def _copy(model: nn.Module, channels_last: bool) -> nn.Module:
    """A copy in training mode, without gradients."""
    copied = copy.deepcopy(model).train()
    for p in copied.parameters():
        p.grad = None
    return copied.to(memory_format=torch.channels_last) if channels_last else copied  # type: ignore[call-overload]


def _batch(batch: Any, channels_last: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model; images in the memory format of the parameters."""

    def laid(value: Any) -> Any:
        images = channels_last and isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if images else value

    if isinstance(batch, Mapping):
        return (), {name: laid(value) for name, value in batch.items()}
    return tuple(map(laid, batch if isinstance(batch, tuple) else (batch,))), {}
