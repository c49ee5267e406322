"""Every public callable with every wrong argument: an error that names it, and a later good call works."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import hardware, schedules
from lowbit.errors import RunError, UsageError, shown
from lowbit.evidence.plan import parse_schedule
from lowbit.inputs.checks import fits
from lowbit.methods.recipe import Gating, GradInput, GradWeight, Output, Phase, RangeNorm, Recipe, Scheduling, Skipping
from lowbit.numerics.elements import Integer
from lowbit.numerics.formats import BF16, FP32, integer
from lowbit.schedules import Constant, Cyclic, RangeTest, Template

BAD: list[Any] = [
    *(None, True, -5, 0, 3, 1.5, math.nan, math.inf, 2**70, 10**5000, 1j),
    *("x", "", "8", b"x", [], [None], (), (1, 2), ["x"], {}, {"x": 1}, object(), int, abs, re.compile("x")),
    *(torch.zeros(2), torch.zeros(()), nn.ReLU(), nn.ReLU, Constant(bits=4), BF16),
]


def fresh(recipe: str = "w8a8g8") -> nn.Module:
    """A small converted model."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    lowbit.convert_(model, Recipe.from_name(recipe).replace(last="convert"))
    return model


def plain() -> nn.Module:
    """The same, not converted."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def loss_of(model: nn.Module, x: Any) -> Tensor:
    """A loss for the probe."""
    loss: Tensor = model(x).square().mean()
    return loss


def metered(call: str, **arguments: Any) -> None:
    """A method of a meter that has a forward to count."""
    model = fresh()
    with lowbit.Meter(model) as meter:
        model(torch.ones(2, 4)).sum().backward()
        getattr(meter, call)(**arguments)


@cache
def ledger() -> lowbit.Ledger:
    """A ledger of one step."""
    return lowbit.plan(fresh(), torch.ones(2, 4), steps=1)


def entered(model: Any) -> Any:
    """A proof of a step."""
    with lowbit.verify(model) as proof:
        model(torch.linspace(-1, 2, 32).reshape(8, 4)).square().sum().backward()
    return proof


class Subject(NamedTuple):
    """What is called, what a good call gives it, and what documents its arguments where that is something else."""

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    documented: Any = None

    def parameters(self) -> dict[str, Any]:
        """Its arguments and their annotations."""
        target: Any = self.documented or self.call
        if isinstance(target, type):
            hints = get_type_hints(target if is_dataclass(target) else target.__init__)
        else:
            hints = get_type_hints(target if inspect.isroutine(target) else type(target).__call__)
        found = inspect.signature(target).parameters.values()
        return {p.name: hints.get(p.name, Any) for p in found if p.name != "self"}


LAYER = {"kernel": 3, "output_size": 4, "stride": 1, "in_channels": 4, "out_channels": 4, "batch": 1}
SBM = Recipe.from_name("sbm8")
CPT = Recipe.from_name("cpt")
HEAL = Recipe.from_name("heal")
U8 = integer(bits=8, zero="integer")

# What is called, and what a good call gives it. The signature says which other arguments there are.
SUBJECTS: dict[str, Subject] = {
    "convert_": Subject(lowbit.convert_, lambda: {"model": plain(), "recipe": "sbm8"}),
    "restore_": Subject(lowbit.restore_, lambda: {"model": fresh()}),
    "state_dict": Subject(lowbit.state_dict, lambda: {"model": fresh()}),
    "load_state_dict": Subject(lowbit.load_state_dict, lambda: {"model": fresh(), "state": lowbit.state_dict(fresh())}),
    "plan": Subject(lowbit.plan, lambda: {"model": fresh(), "inputs": torch.ones(2, 4), "steps": 2}),
    "probe": Subject(
        lowbit.probe, lambda: {"model": fresh(), "batches": [torch.ones(2, 4)], "loss": loss_of, "bits": [4]}
    ),
    "range_test": Subject(
        lowbit.range_test,
        lambda: {"model": fresh(), "step_fn": lambda: 0.5, "steps_per_bit": 4, "low": 2, "high": 4},
    ),
    "verify": Subject(entered, lambda: {"model": fresh()}, lowbit.verify),
    "PrecisionController": Subject(lowbit.PrecisionController, lambda: {"model": fresh(), "forward": 4}),
    "PrecisionController.from_recipe": Subject(
        lowbit.PrecisionController.from_recipe,
        lambda: {"model": fresh("cpt"), "total_steps": 64},
    ),
    "PrecisionController.step": Subject(
        lowbit.PrecisionController(
            fresh(),
            forward=schedules.Progressive(bits=[3, 4], grad_bits=[8, 8], threshold=0.1, decay=0.5),
            steps_per_epoch=1,
        ).step,
        lambda: {"loss": 0.5},
    ),
    "Meter": Subject(lowbit.Meter, lambda: {"model": fresh()}),
    "Meter.step": Subject(partial(metered, "step"), dict, lowbit.Meter.step),
    "Meter.evaluated": Subject(
        partial(metered, "evaluated"), lambda: {"name": "accuracy", "score": 0.5}, lowbit.Meter.evaluated
    ),
    "Ledger": Subject(lowbit.Ledger, dict),
    "Ledger.totals": Subject(lowbit.Ledger().totals, dict),
    "Ledger.add_note": Subject(lowbit.Ledger().add_note, lambda: {"note": "x"}),
    "Ledger.until": Subject(ledger().until, lambda: {"step": 1}),
    "Cost": Subject(lowbit.Cost, lambda: {"ledger": ledger()}),
    "Cost.terms": Subject(lowbit.Cost(ledger()).terms, dict),
    "Recipe": Subject(Recipe, lambda: {f.name: getattr(SBM, f.name) for f in fields(SBM)}),
    "Recipe.from_name": Subject(Recipe.from_name, lambda: {"name": "sbm8"}),
    "Recipe.replace": Subject(SBM.replace, dict, Recipe),
    "Recipe.tuned": Subject(CPT.tuned, dict, Cyclic),
    "Recipe.with_bits": Subject(CPT.with_bits, lambda: {"weight": 4, "input": 4, "grad_output": 8}),
    "Output": Subject(Output, lambda: {"input": U8, "weight": FP32}),
    "GradInput": Subject(GradInput, lambda: {"grad_output": U8, "weight": FP32}),
    "GradWeight": Subject(GradWeight, lambda: {"grad_output": U8, "input": FP32}),
    "RangeNorm": Subject(RangeNorm, lambda: {"input": U8, "grad_output": U8}),
    "Scheduling": Subject(Scheduling, lambda: {"forward": Template(kind="constant", settings=(("bits", 4),))}),
    "Gating": Subject(Gating, lambda: {"choices": ((3, 6), (4, 8)), "targets": (3.0,)}),
    "Integer": Subject(Integer, lambda: {"bits": 8, "zero": "symmetric"}),
    "Constant": Subject(Constant, lambda: {"bits": 4}),
    "Constant()": Subject(Constant(bits=4), lambda: {"step": 1}),
    "Piecewise": Subject(schedules.Piecewise, lambda: {"pieces": [(0, 4)], "total_steps": 9}),
    "Piecewise()": Subject(schedules.Piecewise(pieces=[(0, 4)], total_steps=9), lambda: {"step": 1}),
    "Cyclic": Subject(Cyclic, lambda: {"low": 3, "high": 8, "cycles": 2, "total_steps": 9}),
    "Cyclic()": Subject(Cyclic(low=3, high=8, cycles=2, total_steps=9), lambda: {"step": 1}),
    "Deficit": Subject(
        schedules.Deficit,
        lambda: {"schedule": Constant(bits=8), "bits": 4, "start": 0, "length": 3},
    ),
    "GradientNoise": Subject(schedules.GradientNoise, lambda: {"bits": [4, 8]}),
    "Budget": Subject(schedules.Budget, lambda: {"bits": [4, 8], "budget": 0.5}),
    "Phase": Subject(Phase, lambda: {"start": 3, **vars(HEAL.phases[0])}),
    "Skipping": Subject(Skipping, lambda: {"update_every": 2}),
    "Recipe.then": Subject(SBM.then, lambda: {"recipe": "fp32", "start": 3}),
    "PlateauRule": Subject(schedules.PlateauRule, lambda: {"stages": 2, "threshold": 0.1, "decay": 0.5}),
    "PlateauRule.update": Subject(
        schedules.PlateauRule(stages=2, threshold=0.1, decay=0.5).update,
        lambda: {"epoch_loss": 1.0},
    ),
    "Progressive": Subject(
        schedules.Progressive,
        lambda: {"bits": [3, 4], "grad_bits": [6, 8], "threshold": 0.1, "decay": 0.5},
    ),
    "RangeTest": Subject(RangeTest, dict),
    "RangeTest.update": Subject(RangeTest(low=2, high=9).update, lambda: {"measure": 1.0}),
    "RangeTested": Subject(
        schedules.RangeTested, lambda: {"schedule": Cyclic(low=2, high=4, cycles=2, total_steps=90)}
    ),
    "kind_settings": Subject(schedules.kind_settings, lambda: {"kind": "cyclic"}),
    "Template": Subject(Template, lambda: {"kind": "constant", "settings": (("bits", 4),)}),
    "Template.build": Subject(Template(kind="constant", settings=(("bits", 4),)).build, lambda: {"total_steps": 9}),
    "parse_steps": Subject(schedules.parse_steps, lambda: {"given": "0.5", "total_steps": 9}),
    "parse_schedule": Subject(parse_schedule, lambda: {"text": "3-8x2", "total_steps": 9}),
    "bit_operations": Subject(schedules.bit_operations, lambda: {"schedule": Constant(bits=4), "grad_bits": 8}),
    "saving": Subject(schedules.saving, lambda: {"schedule": Constant(bits=4)}),
    "BitFusion": Subject(hardware.BitFusion, dict),
    "BitFusion.estimate": Subject(hardware.BitFusion().estimate, lambda: {**LAYER, "input_bits": 8, "weight_bits": 8}),
    "BitFusion.training": Subject(
        hardware.BitFusion().training,
        lambda: {**LAYER, "input_bits": 8, "weight_bits": 8, "grad_bits": 8, "input_size": 4},
    ),
    "Energies": Subject(hardware.Energies, dict),
    "Estimate": Subject(
        hardware.Estimate,
        lambda: {
            **{"macs": 1, "compute_cycles": 1, "stall_cycles": 0, "memory_cycles": 0, "seconds": 1.0, "core_nj": 1.0},
            "stores": (hardware.Store(name="dram", read=1, written=1, energy_nj=1.0),),
        },
    ),
    "Store": Subject(hardware.Store, lambda: {"name": "dram", "read": 1, "written": 1, "energy_nj": 1.0}),
    "accelerator": Subject(hardware.accelerator, lambda: {"name": "bitfusion"}),
    "as_matrix": Subject(hardware.as_matrix, lambda: {"product": ledger().products[0]}),
    "BitFusion.product": Subject(hardware.BitFusion().product, lambda: {"product": ledger().products[0]}),
    "total": Subject(
        hardware.total,
        lambda: {"estimates": [hardware.BitFusion().estimate(**LAYER, input_bits=8, weight_bits=8)]},
    ),
}

# What a message calls an argument.
CALLED = {"given": "time"}

# What the library gives and nobody makes, protocols, and errors.
NOT_CALLED = {
    *("Probe", "Proof", "RangeTestResult", "Report", "RunError", "UsageError", "VerificationError"),
    *("ACCELERATORS", "Accelerator", "Loop", "Matrix", "TrainingEstimate", "Tried", "Curve"),
    *("Called", "Follower", "LayerBits", "Layerwise", "PureSchedule", "Rule", "Schedule", "Source"),
    *("Measure", "Option", "allocate"),  # of rules among themselves
    *("recipes", "tripwire"),  # without arguments
    *("Advice", "advise"),  # advise times steps for seconds; its own tests refuse what it does not take
    *("freeze_", "thaw_", "scale_sim", "zigzag"),  # their own tests do
}


def test_every_public_callable_is_called() -> None:
    """A new export gets its line above."""
    public = {n for n in lowbit.__all__ if callable(getattr(lowbit, n))} | set(hardware.__all__)
    exported = {name: getattr(schedules, name) for name in schedules.__all__}
    public |= {name for name, value in exported.items() if inspect.isclass(value) or inspect.isfunction(value)}

    assert sorted(public - set(SUBJECTS) - NOT_CALLED) == []


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_wrong_argument_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What its annotation does not allow raises and is named; what it allows works or raises this library's errors."""
    subject = SUBJECTS[name]
    subject.call(**subject.good())
    complaints = []
    for parameter, hint in subject.parameters().items():
        for bad in BAD:
            try:
                subject.call(**subject.good() | {parameter: bad})
            except Exception as error:
                said = str(error)
                ours = isinstance(error, UsageError | RunError) and "\n" not in said and len(said) < 1500
                # What a user's own model or function raises is the user's.
                theirs = fits(bad, hint) and parameter in ("inputs", "loss", "step_fn", "batches")
                if not theirs and not (ours and (CALLED.get(parameter, parameter) in said or fits(bad, hint))):
                    complaints.append(f"{parameter}={shown(bad)}: {type(error).__name__}: {said[:150]}")
            else:
                if not fits(bad, hint):
                    complaints.append(f"{parameter}={shown(bad)} was taken")
        subject.call(**subject.good())

    assert complaints == []
    assert capsys.readouterr().err == ""
