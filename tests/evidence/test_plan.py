"""Plans: the ledger of a run before it runs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.plan import parse_schedule, plan
from lowbit.schedules import SUITE, Constant, Cyclic, Piecewise
from lowbit.train import models
from lowbit.train.data import Task


def small(recipe: str | None = "w8a8g8") -> nn.Sequential:
    """A convolution, a normalisation and a linear layer, all converted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    if recipe is not None:
        lowbit.convert_(
            model, lowbit.Recipe.from_name(recipe).replace(first="convert", last="convert"), engine="reference"
        )
    return model


X = torch.randn(6, 3, 8, 8)


def real(model: nn.Module, x: Any, steps: int = 1) -> Ledger:
    """The ledger of steps that ran."""
    with lowbit.Meter(model) as meter:
        for _ in range(steps):
            model(x).sum().backward()
            meter.step()
    return meter.ledger


@pytest.mark.parametrize("recipe", [None, "fp32", "bf16", "sbm8", "sbm8-hoffer", "sbm8-cpt", "w4a4g6"])
def test_a_plan_is_what_runs(recipe: str | None) -> None:
    """The plan's totals, in both conventions, its steps and the bytes it holds are those of the run."""
    model = small(recipe)
    planned, ran = plan(model, X, steps=3), real(model, X, steps=3)

    for convention in ("as-ran", "as-charged"):
        assert planned.totals(convention) == ran.totals(convention)
    assert planned.steps == ran.steps
    assert planned.layers == ran.layers


def test_planned_memory_is_what_is_held() -> None:
    """The bytes held for the backward follow from the shapes."""
    model = small("sbm8")

    assert plan(model, X, steps=1).held_bytes == real(model, X).held_bytes


@pytest.mark.parametrize("name", ["gpt", "lstm"])
@pytest.mark.parametrize("recipe", ["fp32", "sbm8"])
def test_a_plan_of_a_text_model_is_what_runs(name: str, recipe: str) -> None:
    """Embeddings, attention and recurrent layers are planned as they run."""
    torch.manual_seed(0)
    model, x = models.build(name, Task(kind="text", shape=(6,), classes=20)), torch.randint(20, (2, 6))
    lowbit.convert_(model, recipe, engine="reference")

    def macs(ledger: Ledger) -> dict[tuple[str, str, tuple[int, int]], int]:
        found: dict[tuple[str, str, tuple[int, int]], int] = {}
        for t in ledger.totals():
            key = (t.product.layer, t.product.product, t.product.bits)
            found[key] = found.get(key, 0) + t.macs
        return found

    assert macs(plan(model, x, steps=1)) == macs(real(model, x))


def test_the_model_is_not_changed() -> None:
    """A plan leaves values, bits, mode and device of the model alone."""
    model = small().eval()
    before = [p.clone() for p in model.parameters()]
    plan(model, X, steps=2, forward=3)

    assert all(map(torch.equal, before, model.parameters()))
    assert model[0].site.bits.tolist() == [8] * 6
    assert not model.training


def test_bits_follow_the_schedules() -> None:
    """Forward bits go to input and weight, backward bits to the gradient, at each step."""
    schedule = Piecewise(pieces=[(0, 4), (1, 6)], total_steps=3)
    ledger = plan(small(), X, steps=3, forward=schedule, backward=8)

    ran = {(t.product.product, t.product.bits): t.calls for t in ledger.totals() if t.product.layer == "4"}
    assert ran == {
        ("output", (4, 4)): 1,
        ("output", (6, 6)): 2,
        ("grad_input", (8, 4)): 1,
        ("grad_input", (8, 6)): 2,
        ("grad_weight", (8, 4)): 1,
        ("grad_weight", (8, 6)): 2,
    }


def test_a_bifurcated_gradient_keeps_its_second_format() -> None:
    """Backward bits of sbm8 change grad_input only: its grad_weight is bf16."""
    ledger = plan(small("sbm8"), X, steps=1, forward=5, backward=6)

    bits = {t.product.product: t.product.bits for t in ledger.totals() if t.product.layer == "4"}
    assert bits == {"output": (5, 5), "grad_input": (6, 5), "grad_weight": (16, 5)}


def test_equal_bits_share_a_program() -> None:
    """A cycle of six widths over many steps has six programs."""
    schedule = Cyclic(low=3, high=8, cycles=2, total_steps=200)

    assert len(plan(small(), X, steps=200, forward=schedule).programs) == 6


def test_batches_of_several_arguments() -> None:
    """A tuple is called as arguments, a dict by names, with a loss that says what is trained."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"y": self.layer(x) * scale}

    x, scale = torch.randn(3, 4), torch.ones(2)
    plans = [
        plan(Model(), (x, scale), steps=1),
        plan(Model(), {"x": x, "scale": scale}, steps=1, loss=lambda out: F.relu(out["y"]).sum()),
    ]

    assert plans[0].totals() == plans[1].totals()
    assert len(plans[0].totals()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 5, "forward": Cyclic(low=3, high=8, cycles=1, total_steps=4)}, "total_steps=4"),
        ({"steps": 1, "forward": 0}, "bits=0"),
        ({"steps": 1, "backward": 33}, "33"),
    ],
)
def test_impossible_plans_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Each wrong argument is a UsageError that says what was given."""
    with pytest.raises(UsageError, match=message):
        plan(small(), X, **arguments)


@pytest.mark.parametrize("recipe", [None, "fp32", "bf16"])
def test_a_schedule_needs_bits_to_set(recipe: str | None) -> None:
    """A model without integer formats has no bits for a schedule."""
    with pytest.raises(UsageError, match="nothing in this model has bits"):
        plan(small(recipe), X, steps=1, forward=4)


def test_a_model_that_needs_values_is_refused() -> None:
    """Control flow on values cannot be planned, and the message says what to do."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(RunError, match="needs values"):
        plan(Model(), torch.randn(3, 4), steps=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", Constant(bits=8)),
        ("3-8", Cyclic(low=3, high=8, cycles=32, total_steps=640)),
        ("3-8x4", Cyclic(low=3, high=8, cycles=4, total_steps=640)),
        ("RTH:4-6", Cyclic(low=4, high=6, cycles=8, total_steps=640, **SUITE["RTH"])),
        ("4,6@320,8@0.9", Piecewise(pieces=[("0", 4), ("320", 6), ("0.9", 8)], total_steps=640)),
    ],
)
def test_schedules_from_text(text: str, expected: Any) -> None:
    """Each form gives the schedule it stands for, at every step."""
    found = parse_schedule(text, total_steps=640)

    assert [found(step) for step in range(640)] == [expected(step) for step in range(640)]


@pytest.mark.parametrize("text", ["", "x", "3-", "8-3", "XX:3-8", "4,", "4@9ep", "3-8x0", "33"])
def test_other_texts_are_refused(text: str) -> None:
    """What is no schedule is a UsageError."""
    with pytest.raises(UsageError):
        parse_schedule(text, total_steps=640)


@pytest.mark.parametrize("controlled", [False, True])
def test_a_plan_of_cpt_is_what_a_controller_runs(controlled: bool) -> None:
    """A plan of the schedule equals the run's ledger, before a controller is attached and after; it stays attached."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4))
    lowbit.convert_(model, lowbit.Recipe.from_name("cpt").tuned(cycles=2), engine="reference")
    schedule = Cyclic(low=3, high=8, cycles=2, total_steps=6)
    if controlled:
        controller = lowbit.PrecisionController.from_recipe(model, total_steps=6)
    planned = plan(model, X, steps=6, forward=schedule, backward=8)
    if not controlled:
        controller = lowbit.PrecisionController.from_recipe(model, total_steps=6)
    with lowbit.Meter(model) as meter:
        for _ in range(6):
            model(X).sum().backward()
            meter.step()
            controller.step()

    assert planned.totals() == meter.ledger.totals()
    assert controller.last_step == 6
