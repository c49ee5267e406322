"""The precision controller: which bits are written when, what it refuses, and that its state resumes."""

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import PrecisionController, UsageError
from lowbit.errors import RunError
from lowbit.methods.recipe import SLOTS, Gating, Recipe
from lowbit.nn.kinds import is_depthwise
from lowbit.nn.layers import QuantLayer
from lowbit.products import watch
from lowbit.schedules import (
    SUITE,
    Constant,
    Cyclic,
    Deficit,
    Piecewise,
    Progressive,
    RangeTest,
    RangeTested,
    Rule,
    Schedule,
)

FORWARD = [i for i, (_, operand) in enumerate(SLOTS) if operand != "grad_output"]
BACKWARD = [i for i, (_, operand) in enumerate(SLOTS) if operand == "grad_output"]


def network() -> nn.Sequential:
    """Two convolutions, one of them depthwise, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def converted(recipe: str | Recipe = "w8a8g8", **arguments: Any) -> nn.Sequential:
    """The network with every layer in a recipe."""
    model = network()
    given = Recipe.from_name(recipe) if isinstance(recipe, str) else recipe
    lowbit.convert_(model, given.replace(last="convert"), **arguments)
    return model


def bits_of(model: nn.Module) -> list[list[int]]:
    """The bits of every site."""
    return [s.bits.tolist() for m in model.modules() if isinstance(m, QuantLayer) for s in m.sites()]


def bits_run(model: nn.Module, x: Tensor | None = None) -> list[int]:
    """The bits of the input of each product of a forward."""
    seen: list[int] = []
    with watch.counted_by(lambda call: seen.append(call.bits[0])):
        model(next(batches(1))[0] if x is None else x)
    return seen


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a run, the same each time."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield torch.randn(4, 1, 4, 4, generator=generator), torch.randint(5, (4,), generator=generator)


def train(
    model: nn.Module, controller: PrecisionController, steps: int, *, skip: int = 0, optimizer: Any = None
) -> list[float]:
    """Train from batch `skip` to batch `steps`; the losses."""
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x, y in list(batches(steps))[skip:]:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step(loss)
        losses.append(loss.item())
    return losses


def test_bits_follow_the_schedule_from_the_first_batch() -> None:
    """Batch t trains at schedule(t) in inputs and weights, and at the backward bits in gradients."""
    model = converted()
    schedule = Cyclic(low=3, high=8, cycles=2, total_steps=10)
    controller = PrecisionController(model, forward=schedule, backward=6)
    seen = []

    def note(call: watch.ProductCall) -> None:
        seen.append((call.product, call.bits))

    with watch.counted_by(note):
        train(model, controller, 10)

    per_step = len(seen) // 10
    for t in range(10):
        b = schedule(t)
        assert set(seen[t * per_step : (t + 1) * per_step]) == {
            ("output", (b, b)),
            ("grad_input", (6, b)),
            ("grad_weight", (6, b)),
        }
    assert {schedule(t) for t in range(10)} > {3}


def test_bits_are_written_in_place() -> None:
    """A change of bits keeps the tensor that holds them."""
    model = converted()
    site = model[0].site
    before = site.bits
    controller = PrecisionController(model, forward=Piecewise(pieces=[(0, 3), (1, 7)], total_steps=2))

    first = before.tolist()
    controller.step()

    assert site.bits is before
    assert first[0] == 3
    assert before.tolist()[0] == 7


def test_without_backward_gradients_keep_the_recipes_bits() -> None:
    """backward=None changes no bits of gradients."""
    model = converted("w8a8g5")
    PrecisionController(model, forward=3)

    assert all([b[i] for i in BACKWARD] == [5, 5] for b in bits_of(model))
    assert all([b[i] for i in FORWARD] == [3] * 4 for b in bits_of(model))


def test_backward_leaves_the_copy_of_a_bifurcated_gradient() -> None:
    """In sbm8 the gradient in grad_weight is another format: its bits stay, those in grad_input change."""
    model = converted("sbm8")
    PrecisionController(model, forward=6, backward=4)

    sites = [b for b in bits_of(model) if len(b) == len(SLOTS)]

    assert all((b[BACKWARD[0]], b[BACKWARD[1]]) == (4, 16) for b in sites)


def test_range_norm_follows() -> None:
    """The input of Range BN takes the forward bits and its gradient the backward bits."""
    model = converted("sbm8")
    PrecisionController(model, forward=6, backward=4)

    assert [b for b in bits_of(model) if len(b) == 2] == [[6, 4]]


def test_a_rule_keeps_depthwise_layers_apart() -> None:
    """A function of the layer selects depthwise convolutions, which stay at 8 and 16 bits."""
    model = converted()
    controller = PrecisionController(model, forward=3, backward=8, rules=[(is_depthwise, (8, 16))])

    assert controller.bits() == {"0": (3, 8), "3": (8, 16), "6": (3, 8)}


def test_first_rule_decides() -> None:
    """Rules by name, pattern and type are tried in order."""
    model = converted()
    rules: list[Any] = [("0", (4, None)), (nn.Conv2d, (5, 7)), (re.compile("[06]"), None)]
    controller = PrecisionController(model, forward=3, backward=6, rules=rules)

    assert controller.bits() == {"0": (4, 8), "3": (5, 7), "6": (8, 8)}


def test_evaluation_runs_at_the_highest_bits_and_training_goes_on() -> None:
    """Between two steps an evaluation runs at the highest bits; the next training forward has the schedule's again."""
    model = converted()
    controller = PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=100))

    assert bits_run(model.eval()) == [8, 8, 8]
    assert bits_run(model.train()) == [controller.forward_bits] * 3 == [3, 3, 3]


def test_evaluation_of_a_part_runs_at_the_highest_bits() -> None:
    """A part that is called on its own, as a LightningModule calls its network, has the bits of its mode too."""
    model = converted()
    PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=100))
    model(next(batches(1))[0])

    assert bits_run(model.eval()[:4]) == [8, 8]
    assert bits_run(model.train()[:4]) == [3, 3]


@pytest.mark.parametrize(("eval_bits", "expected"), [("current", 3), (5, 5), ("highest", 8)])
def test_evaluation_at_a_stated_precision(eval_bits: Any, expected: int) -> None:
    """eval_bits says at which bits evaluation runs; a layer with a rule keeps its own highest."""
    model = converted()
    schedule = Cyclic(low=3, high=8, cycles=1, total_steps=100)
    PrecisionController(model, forward=schedule, eval_bits=eval_bits, rules=[("6", (7, None))])

    assert bits_run(model.eval()) == [expected, expected, 7]


def test_evaluation_does_not_change_the_run() -> None:
    """A run with evaluations between its steps ends with the weights of the run without them."""
    weights = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = converted()
        controller = PrecisionController(model, forward=Cyclic(low=2, high=8, cycles=3, total_steps=9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(9):
            if evaluates:
                model.eval()(torch.ones(2, 1, 4, 4))
                model.train()
            train(model, controller, i + 1, skip=i, optimizer=optimizer)
        weights.append(model[0].weight)

    assert torch.equal(*weights)


def test_the_last_step_is_legal_and_a_forward_after_it_is_not() -> None:
    """After the last batch step() is legal and evaluation too; a training forward and one more step() are errors."""
    model = converted()
    controller = PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=3))
    train(model, controller, 3)
    x = next(batches(1))[0]

    assert controller.last_step == 3
    model.eval()(x)
    with pytest.raises(UsageError, match=r"after the last of total_steps=3.*total_steps"):
        model.train()(x)
    with pytest.raises(UsageError, match=r"step\(\) number 4 of a run of total_steps=3"):
        controller.step()


def test_gradient_accumulation_stays_at_one_step() -> None:
    """Several forwards between two calls of step() run at the same bits."""
    model = converted()
    PrecisionController(model, forward=Piecewise(pieces=[(0, 3), (1, 8)], total_steps=2))
    for x, y in batches(3):
        F.cross_entropy(model(x), y).backward()

    assert bits_of(model)[0][0] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to set"),
        ({"forward": "cyclic"}, r"forward='cyclic': give a Schedule, a Rule, a whole number, a Layerwise or None"),
        ({"forward": True}, "forward=True: give a Schedule"),
        ({"forward": 0}, "bits=0"),
        (
            {
                "forward": Cyclic(low=3, high=8, cycles=1, total_steps=4),
                "backward": Piecewise(pieces=[(0, 8)], total_steps=5),
            },
            "4.*5.*same total_steps",
        ),
        ({"forward": Progressive(bits=[3], grad_bits=[6], threshold=0, decay=1), "backward": 8}, "grad_bits"),
        ({"backward": Progressive(bits=[3], grad_bits=[6], threshold=0, decay=1)}, "into `forward`"),
        ({"forward": Progressive(bits=[3], grad_bits=[6], threshold=0, decay=1)}, "steps_per_epoch"),
        ({"forward": 8, "steps_per_epoch": 3}, "without a plateau rule"),
        ({"forward": 8, "eval_bits": "low"}, "eval_bits='low'"),
        ({"forward": 8, "rules": [("7", (4, 4))]}, r"rule 1, '7', decided nothing|decided no"),
        (
            {"forward": 8, "rules": [("0", (Progressive(bits=[3], grad_bits=[6], threshold=0, decay=1), 4))]},
            "goes into `forward`",
        ),
        ({"forward": 8, "blocks": ["0"]}, "without gates"),
        ({"backward": RangeTest()}, "into `forward`"),
        ({"forward": 8, "rules": [("0", (RangeTest(), 4))]}, "goes into `forward`"),
        ({"gates": Gating(choices=((3, 6), (8, 8)), targets=(3.0,)), "blocks": ["4x"]}, "unknown block '4x'"),
        (
            {"gates": Gating(choices=((3, 6), (8, 8)), targets=(3.0,)), "blocks": [re.compile("x+")]},
            r"'x\+' of blocks matches no",
        ),
        ({"gates": Gating(choices=((3, 6), (8, 8)), targets=(3.0,))}, "give a list of the names"),
        (
            {"gates": Gating(choices=((3, 6), (8, 8)), targets=(3.0,)), "blocks": ["2"]},
            "block .2. lacks a converted layer whose bits a gate could choose",
        ),
        (
            {"gates": Gating(choices=((3, 6), (8, 64)), targets=(3.0,)), "blocks": ["0"]},
            "grad_output cannot have 64 bits",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """What does not fit is a UsageError that says what was given, and the model stays free for another controller."""
    model = converted()

    with pytest.raises(UsageError, match=message):
        PrecisionController(model, **arguments)

    PrecisionController(model, forward=8)


def test_bits_that_a_format_cannot_have_name_the_layer() -> None:
    """A symmetric format has at least 2 bits: a schedule that goes to 1 is refused before the run, by layer."""
    model = converted("sbm8")

    with pytest.raises(UsageError, match=r"0 of recipe 'sbm8'.*bits=1.*2 to 16"):
        PrecisionController(model, forward=Piecewise(pieces=[(0, 8), (5, 1)], total_steps=10))


def test_a_model_of_float_formats_has_no_bits_to_set() -> None:
    """bf16 layers have no width: a controller that could set nothing is refused."""
    with pytest.raises(UsageError, match="no layer here has an integer format"):
        PrecisionController(converted("bf16"), forward=8)


def test_a_model_that_is_not_converted_is_refused() -> None:
    """A plain model has no bits."""
    with pytest.raises(UsageError, match="convert_"):
        PrecisionController(network(), forward=8)


def test_a_second_controller_is_refused_until_the_first_is_removed() -> None:
    """Also where the second one is for a part or for a model around."""
    model = converted()
    first = PrecisionController(model, forward=3)
    for other in (model, model[0], nn.Sequential(model)):
        with pytest.raises(UsageError, match=r"has a PrecisionController already.*remove\(\)"):
            PrecisionController(other, forward=4)
    first.remove()

    assert bits_of(model)[0][0] == 8
    assert not model._forward_pre_hooks.keys() - {
        k for k, h in model._forward_pre_hooks.items() if h.__name__ == "advance"
    }
    PrecisionController(model, forward=4)


def test_restore_removes_the_controller() -> None:
    """A restored model is plain: no bits, no end of training."""
    model = converted()
    PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=1)).step()
    lowbit.restore_(model)

    model.train()(next(batches(1))[0])

    assert not model._forward_pre_hooks


def test_restore_of_a_part_is_refused() -> None:
    """Restoring a part that shares its controller with other layers says so and changes nothing."""
    model = converted()
    PrecisionController(model, forward=3)

    with pytest.raises(UsageError, match=r"also controls '3'.*remove\(\)"):
        lowbit.restore_(model[0])

    assert isinstance(model[0], QuantLayer)


def test_a_shared_layer_is_set_once() -> None:
    """A layer that is used twice is one controlled layer, and trains."""
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    lowbit.convert_(model, "w8a8g8", rules=[(nn.Linear, "w8a8g8")])
    controller = PrecisionController(model, forward=4, backward=5)

    model(torch.randn(3, 6)).sum().backward()

    assert controller.bits() == {"0": (4, 5)}


def copied(model: nn.Module, way: str) -> Any:
    """A copy of a model, made in memory or through a file."""
    if way == "deepcopy":
        return copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "file"])
def test_a_copy_evaluates_and_refuses_to_train(way: str) -> None:
    """A copy has no hidden controller: it evaluates at the evaluation bits and trains with one of its own."""
    model = converted()
    controller = PrecisionController(model, forward=Piecewise(pieces=[(0, 3), (1, 8)], total_steps=5), eval_bits=6)
    twin = copied(model, way)

    assert twin[0].site.controller is None
    assert bits_run(twin.eval()) == [6, 6, 6]
    assert torch.equal(twin(next(batches(1))[0]), model.eval()(next(batches(1))[0]))
    for part in (twin.train(), twin[0]):
        with pytest.raises(UsageError, match="is a copy of one whose bits a PrecisionController sets"):
            part(next(batches(1))[0])
    own = PrecisionController(twin, forward=Piecewise(pieces=[(0, 4), (1, 7)], total_steps=5))
    own.step()
    assert bits_run(twin) == [7, 7, 7]
    assert bits_run(model.train()) == [3, 3, 3]
    assert (own.last_step, controller.last_step) == (1, 0)


def test_a_loaded_state_does_not_win_over_the_controller() -> None:
    """Bits in a state of the model that is loaded into a controlled one are those of its controller afterwards."""
    model = converted()
    state = lowbit.state_dict(model)
    PrecisionController(model, forward=3, eval_bits=4)

    lowbit.load_state_dict(model, state)

    assert bits_run(model) == [3, 3, 3]
    assert bits_run(model.eval()) == [4, 4, 4]


@pytest.mark.parametrize("eval_bits", [6, "highest"])
def test_a_saved_state_evaluates_and_refuses_to_train(eval_bits: Any) -> None:
    """What was saved in the middle of a schedule evaluates at its evaluation bits, and trains with a controller."""
    model, twin = converted(), converted()
    schedule = Cyclic(low=3, high=8, cycles=1, total_steps=10)
    train(model, PrecisionController(model, forward=schedule, eval_bits=eval_bits), 2)
    lowbit.load_state_dict(twin, lowbit.state_dict(model))

    assert bits_run(twin.eval()) == bits_run(model.eval()) == [8 if eval_bits == "highest" else eval_bits] * 3
    with pytest.raises(UsageError, match="or was loaded from its state"):
        twin.train()(next(batches(1))[0])
    PrecisionController(twin, forward=4)
    assert bits_run(twin) == [4, 4, 4]


def test_a_damaged_controlled_state_is_refused() -> None:
    """Evaluation bits that a format cannot have, or of another shape, are refused and change nothing."""
    model = converted()
    PrecisionController(model, forward=5)
    state = lowbit.state_dict(model)
    for wrong in (torch.full((6,), 1000), torch.full((5,), 8), [8] * 6):
        state["groups"][0]["sites"]["3"]["evaluation_bits"] = wrong
        with pytest.raises(UsageError, match="3: "):
            lowbit.load_state_dict(model, state)

    assert bits_run(model.eval()) == [5, 5, 5]


def test_a_copy_of_a_copy_still_knows() -> None:
    """What lost its controller once is refused in every further copy, until restore_ makes it plain."""
    model = converted()
    PrecisionController(model, forward=3)
    twin = copy.deepcopy(copy.deepcopy(model))

    with pytest.raises(UsageError, match="is a copy of one"):
        twin(next(batches(1))[0])
    lowbit.restore_(twin)
    twin(next(batches(1))[0]).sum().backward()

    assert not any(isinstance(m, QuantLayer) for m in twin.modules())


def test_a_removed_controller_leaves_a_static_copy() -> None:
    """A copy made after remove() trains at the recipe's bits, and so does one whose own controller was removed."""
    model = converted()
    controller = PrecisionController(model, forward=3)
    early = copy.deepcopy(model)
    controller.remove()
    PrecisionController(early, forward=4).remove()

    for each in (copy.deepcopy(model), early):
        assert bits_run(each) == bits_run(each.eval()) == [8, 8, 8]


def test_a_copy_of_model_and_controller_together_goes_on() -> None:
    """Copied at once they belong together: the copy's run has the bits and the losses of the original's."""
    model = converted()
    controller = PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=2, total_steps=10))
    train(model, controller, 4)
    twin, own = copy.deepcopy((model, controller))

    theirs = train(twin, own, 8, skip=4)

    assert controller.last_step == 4
    assert theirs == train(model, controller, 8, skip=4)
    assert twin[0].site.controller is own


def test_an_average_of_the_weights_evaluates() -> None:
    """Torch's moving average copies the model before and after the controller is made and evaluates at its bits."""
    model = converted()
    early = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    controller = PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=10))
    late = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    train(model, controller, 2)
    for average in (early, late):
        average.update_parameters(model)

    assert bits_run(early.eval()) == bits_run(late.eval()) == [8, 8, 8]


def test_the_end_of_the_schedule_counts_in_a_part_too() -> None:
    """A training forward of a part after the last step is the error that one of the model is."""
    model = converted()
    PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=1)).step()

    with pytest.raises(UsageError, match="after the last of total_steps=1"):
        model[0](next(batches(1))[0])


def test_a_recomputed_forward_has_the_bits_of_the_first() -> None:
    """Gradient checkpointing recomputes layers at the same bits: the gradient is that without it."""
    grads = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        inner = converted()
        outer = nn.Module()
        outer.inner = inner
        PrecisionController(inner, forward=Cyclic(low=2, high=8, cycles=1, total_steps=4), backward=4)
        x, y = next(batches(1))
        out = checkpoint(inner, x, use_reentrant=False) if recomputes else inner(x)
        F.cross_entropy(out, y).backward()
        grads.append(inner[0].weight.grad)

    assert torch.equal(*grads)


def test_a_dynamic_recipe_without_a_controller_does_not_train() -> None:
    """After convert_ with cpt and without a controller, the first training forward says what is missing."""
    model = network()
    report = lowbit.convert_(model, "cpt")

    model.eval()(next(batches(1))[0])
    for whole_or_part in (model.train(), model[:4]):
        with pytest.raises(UsageError, match=r"'cpt'.*PrecisionController.from_recipe"):
            whole_or_part(next(batches(1))[0])

    assert any("from_recipe" in note for note in report.notes)


def test_from_recipe_builds_the_schedule_of_the_recipe() -> None:
    """Cpt is 3 to 8 in 32 cycles with 8-bit gradients, and depthwise layers stay at 8 and 16."""
    model = network()
    lowbit.convert_(model, "cpt")
    controller = PrecisionController.from_recipe(model, total_steps=64)

    assert controller.bits() == {"0": (3, 8), "3": (8, 16)}
    assert [controller.forward_bits, controller.total_steps] == [3, 64]
    train(model, controller, 2)
    assert controller.forward_bits == Cyclic(low=3, high=8, cycles=32, total_steps=64)(2)


def test_from_recipe_leaves_layers_of_other_recipes() -> None:
    """A layer that a rule put into a static recipe keeps its bits."""
    model = network()
    lowbit.convert_(model, "cpt", rules=[("0", "w5a5g5")])
    controller = PrecisionController.from_recipe(model, total_steps=64)

    assert controller.bits() == {"0": (5, 5), "3": (8, 16)}


@pytest.mark.parametrize(
    ("recipes", "message"), [(("sbm8", "sbm8"), "0 recipes.*cpt, cpt-int8, dfq"), (("cpt", "pfq"), "2 recipes")]
)
def test_from_recipe_needs_one_dynamic_recipe(recipes: tuple[str, str], message: str) -> None:
    """A model of static recipes, or of two dynamic ones, has no controller to build."""
    model = network()
    lowbit.convert_(model, recipes[0], rules=[("0", recipes[1])])

    with pytest.raises(UsageError, match=message):
        PrecisionController.from_recipe(model, total_steps=64, steps_per_epoch=2)


def progressive() -> Progressive:
    """A rule that changes stage after every five epochs."""
    return Progressive(bits=[3, 5, 8], grad_bits=[6, 7, 8], threshold=100.0, decay=1.0)


def test_a_plateau_rule_sets_forward_and_backward() -> None:
    """Every 2 steps make an epoch; after 5 epochs the second stage's bits are written."""
    model = converted()
    controller = PrecisionController(model, forward=progressive(), steps_per_epoch=2)
    seen = []
    for _ in range(25):
        seen.append((controller.forward_bits, controller.backward_bits, controller.stage))
        controller.step(1.0)

    assert seen == [(3, 6, 0)] * 10 + [(5, 7, 1)] * 10 + [(8, 8, 2)] * 5
    assert bits_of(model)[0][0] == 8


def test_a_plateau_rule_sees_the_mean_of_its_epoch() -> None:
    """The rule that the controller feeds equals one that is fed the means by hand."""
    rule, by_hand = (Progressive(bits=[3, 8], grad_bits=[8, 8], threshold=0.01, decay=1.0) for _ in range(2))
    controller = PrecisionController(converted(), forward=rule, steps_per_epoch=3)
    losses = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, loss in enumerate(losses):
        controller.step(loss)
        if i % 3 == 2:
            by_hand.update(float(losses[i - 2 : i + 1].sum() / 3))

    assert rule.state_dict()["window"] == pytest.approx(by_hand.state_dict()["window"])
    assert rule.scale == pytest.approx(by_hand.scale)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, UsageError, r"step\(loss\)"),
        (torch.ones(2), UsageError, r"shape \(2,\)"),
        (float("nan"), RunError, "diverged"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_an_error(loss: Any, error: type[Exception], message: str) -> None:
    """A plateau rule needs one finite loss; after the error the controller is where it was."""
    controller = PrecisionController(converted(), forward=progressive(), steps_per_epoch=1)

    with pytest.raises(error, match=message):
        controller.step(loss)

    assert controller.last_step == 0


def schedules() -> list[Callable[[], dict[str, Any]]]:
    """What a controller can follow, made anew for each run."""
    cyclic = {"low": 3, "high": 8, "cycles": 3, "total_steps": 40}
    return [
        lambda: {"forward": Cyclic(**cyclic), "backward": 8},
        lambda: {"forward": Cyclic(**{**cyclic, "cycles": 2, "final": "high"}, **SUITE["ETH"])},
        lambda: {
            "forward": Deficit(schedule=Constant(bits=8), bits=2, start=5, length=20),
            "backward": Cyclic(**cyclic),
        },
        lambda: {"forward": progressive(), "steps_per_epoch": 3},
        lambda: {
            "forward": RangeTested(
                schedule=Cyclic(**{**cyclic, "low": 4}),
                test=RangeTest(low=4, high=8, steps_per_bit=5, threshold=0.3),
            ),
        },
    ]


@pytest.mark.parametrize("kind", range(5))
@settings(max_examples=4, deadline=None)
@given(stop=st.integers(0, 40))
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(kind: int, stop: int) -> None:
    """Saved at any step, through JSON, and loaded into new objects, a run ends with the same weights and state."""
    ends = []
    for stops in (False, True):
        torch.manual_seed(0)
        model = converted(seed=5)
        controller = PrecisionController(model, **schedules()[kind]())
        first = train(model, controller, stop if stops else 40)
        if stops:
            saved = copy.deepcopy((model.state_dict(), lowbit.state_dict(model)))
            state = json.loads(json.dumps(controller.state_dict()))
            model = converted(seed=5)
            controller = PrecisionController(model, **schedules()[kind]())
            model.load_state_dict(saved[0])
            # In either order: what the model's state says of bits never wins over the controller.
            controller.load_state_dict(state)
            lowbit.load_state_dict(model, saved[1])
            first += train(model, controller, 40, skip=stop)
        ends.append((first, [p.tolist() for p in model.parameters()], controller.state_dict()))

    assert ends[0] == ends[1]
    assert controller.last_step == 40


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"forward": Cyclic(low=4, high=8, cycles=1, total_steps=9), "backward": 8}, "other forward"),
        ({"forward": Cyclic(low=3, high=8, cycles=1, total_steps=10), "backward": 8}, "other forward"),
        ({"forward": Cyclic(low=3, high=8, cycles=1, total_steps=9), "backward": 6}, "other backward"),
        (
            {"forward": Cyclic(low=3, high=8, cycles=1, total_steps=9), "backward": 8, "rules": [("0", (8, 8))]},
            "other layers",
        ),
        ({"forward": progressive(), "steps_per_epoch": 2}, "other forward"),
    ],
)
def test_a_state_of_another_schedule_is_refused(other: dict[str, Any], message: str) -> None:
    """A changed schedule on resume is an error that names what changed, not a silent mixture."""
    first = PrecisionController(converted(), forward=Cyclic(low=3, high=8, cycles=1, total_steps=9), backward=8)
    first.step()

    with pytest.raises(UsageError, match=message):
        PrecisionController(converted(), **other).load_state_dict(first.state_dict())


def test_a_damaged_state_changes_nothing() -> None:
    """A state that lacks something or holds another rule's is refused, and the controller stays."""
    controller = PrecisionController(converted(), forward=progressive(), steps_per_epoch=1)
    controller.step(1.0)
    before = controller.state_dict()

    with pytest.raises(UsageError, match="not a state of a PrecisionController"):
        controller.load_state_dict({**before, "version": 2})
    with pytest.raises(UsageError, match="at step -3"):
        controller.load_state_dict({**before, "step": -3})
    with pytest.raises(UsageError, match="plateau rule"):
        controller.load_state_dict({**before, "rules": [{"stage": 1}]})

    assert controller.state_dict() == before


class Sawtooth:
    """A schedule of a user's own, which has no repr and no fields."""

    total_steps, max_bits = 6, 8

    def __call__(self, step: int) -> int:
        """3, 8, 3, ..."""
        return 8 if step % 2 else 3


def test_a_schedule_of_ones_own_works_and_resumes() -> None:
    """Any callable with total_steps and max_bits is a schedule; its state loads into a new object of it."""
    schedule: Schedule = Sawtooth()
    controller = PrecisionController(converted(), forward=schedule)
    controller.step()
    again = PrecisionController(converted(), forward=Sawtooth())

    again.load_state_dict(controller.state_dict())

    assert again.forward_bits == 8


def test_the_first_cycle_finds_the_lowest_bits() -> None:
    """After a range test in which losses fall from 4 bits on the cycles go on from 4."""
    schedule = RangeTested(schedule=Cyclic(low=2, high=8, cycles=2, total_steps=200))
    controller = PrecisionController(converted(), forward=schedule)
    seen = []
    while controller.last_step < 200:
        bits = controller.forward_bits
        assert bits is not None
        seen.append(bits)
        controller.step(2.0 if bits < 4 else 2.0 - 0.01 * controller.last_step)

    test = controller.range_test
    assert test is not None
    assert test.chosen == 4
    assert seen[: 2 * test.steps_per_bit] == [2] * test.steps_per_bit + [3] * test.steps_per_bit
    found = Cyclic(low=4, high=8, cycles=2, total_steps=200)
    assert seen[3 * test.steps_per_bit :] == [found(t) for t in range(3 * test.steps_per_bit, 200)]


class Follow(Rule):
    """A rule of a user's own: one bit more after each loss below 1."""

    follows, max_bits, current_bits = "step", 8, 3

    def widths(self) -> list[int]:
        """3 to 8."""
        return list(range(3, 9))

    def update(self, loss: Any) -> bool:
        """One bit more where the loss is below 1."""
        grows = loss < 1 and self.current_bits < 8
        self.current_bits += grows
        return grows

    def state_dict(self) -> dict[str, Any]:
        """The bits."""
        return {"bits": self.current_bits}

    def load_state_dict(self, state: Any) -> None:
        """The bits."""
        self.current_bits = state["bits"]


def test_a_rule_of_ones_own_sees_the_losses_and_resumes() -> None:
    """The controller feeds any rule in `forward` as it feeds its own, and leaves gradients to `backward`."""
    controller, again = (PrecisionController(converted(), forward=Follow(), backward=6) for _ in range(2))
    for loss in (2.0, 0.5, torch.tensor(0.5), 1.5):
        controller.step(loss)
    again.load_state_dict(controller.state_dict())

    assert (again.forward_bits, again.backward_bits, again.last_step) == (5, 6, 4)


class FollowBoth(Follow):
    """The same with 6 bits for gradients."""

    current_grad_bits = 6


def test_a_rule_that_sets_gradients_leaves_no_place_for_backward() -> None:
    """The bits of gradients come from the rule, and others beside them are refused."""
    controller = PrecisionController(converted(), forward=FollowBoth())

    assert controller.backward_bits == 6
    with pytest.raises(UsageError, match="sets the bits of gradients too"):
        PrecisionController(converted(), forward=FollowBoth(), backward=8)


RANKS = """
import sys
import torch, torch.distributed as dist
from torch import nn
import lowbit
from lowbit.schedules import Progressive
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = nn.Linear(4, 4)
lowbit.convert_(model, "w8a8g8", rules=[(nn.Linear, "w8a8g8")])
rule = Progressive(bits=[3, 8], grad_bits=[8, 8], threshold=0.01, decay=1.0)
bits = lowbit.PrecisionController(model, forward=rule, steps_per_epoch=2)
seen = []
for t in range(16):
    bits.step(1.0 + (0.5 if rank else -0.5) * (t % 4 // 2))  # each rank's loss moves, their mean does not
    seen.append(bits.forward_bits)
print(seen, rule.state_dict())
dist.destroy_process_group()
"""


def test_every_rank_decides_alike(tmp_path: Any) -> None:
    """On two processes whose own losses are no plateau and whose mean is one, both switch at the same step."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [run.communicate(timeout=100)[0] for run in runs]

    assert printed[0] == printed[1]
    assert printed[0].startswith(str([3] * 9 + [8] * 7))


def test_print_shows_each_layer_and_where_its_bits_come_from() -> None:
    """The table has a row per layer."""
    schedule = Cyclic(low=3, high=8, cycles=1, total_steps=9)
    shown = str(PrecisionController(converted(), forward=schedule, rules=[("3", (8, 16))]))

    assert "step 0 of 9" in shown
    assert re.search(r"^ *0 +3 +8 +Cyclic$", shown, re.MULTILINE)
    assert re.search(r"^ *3 +8 +16 +8 bits$", shown, re.MULTILINE)


@pytest.mark.parametrize("bits", [33, 1000, 2**70])
def test_bits_of_evaluation_are_those_of_the_formats(bits: int) -> None:
    """A width that no format here has is refused when the controller is made, not in the first evaluation."""
    model = converted()

    with pytest.raises(UsageError, match=f"bits={bits}"):
        PrecisionController(model, forward=4, eval_bits=bits)

    PrecisionController(model, forward=4, eval_bits=8)
