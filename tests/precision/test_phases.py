"""Formats that switch at steps, and weight gradients that are skipped: what runs, what it costs, exact resume."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController, Recipe
from lowbit.errors import UsageError
from lowbit.evidence.plan import plan
from lowbit.methods.recipe import from_toml

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
HEAL = Recipe.from_name("mxfp4").then("mxfp8", start=2, name="mine")
SPARSE = Recipe.from_name("int8").replace(skip=Recipe.from_name("sparse").skip)


def network(recipe: Recipe | str, *, engine: str = "auto", steps: int = 4) -> tuple[nn.Sequential, PrecisionController]:
    """Two linear layers with their controller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    lowbit.convert_(model, recipe, engine=engine)
    return model, PrecisionController.from_recipe(model, total_steps=steps)


def train(model: nn.Module, bits: PrecisionController, steps: int, optimizer: torch.optim.Optimizer) -> None:
    """So many steps."""
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """With momentum and decay, which move a weight even if its gradient is zero."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def formats(model: nn.Module) -> set[str]:
    """The formats that a forward and a backward really run."""
    with lowbit.verify(model) as proof:
        model(X).square().mean().backward()
    return {operand.format for row in proof.rows for operand in row.operands.values()}


def remarks(model: nn.Module) -> str:
    """What a proof of one step says besides its tables."""
    with lowbit.verify(model) as proof:
        model(X).square().mean().backward()
    return " ".join(proof.remarks)


def test_formats_switch_at_the_step() -> None:
    """All operands are E2M1 before the start of the second phase, and E4M3 from it on, in evaluation too."""
    model, bits = network(HEAL)
    seen = []
    for _ in range(4):
        assert f"phase {int(bits.stage or 0) + 1} of 2" in remarks(model)
        seen.append((formats(model), bits.stage))
        model.eval()
        seen.append((formats(model), bits.stage))
        model.train()
        bits.step()

    four, eight = {str(HEAL.output.input)}, {str(HEAL.phases[0].output.input)}
    assert seen == [(four, 0)] * 4 + [(eight, 1)] * 4


def test_each_phase_equals_its_recipe() -> None:
    """A step in either phase gives bit for bit what the recipe of that phase alone gives."""
    model, bits = network(HEAL)
    bits.go_to(3)
    alone = copy.deepcopy(model)
    lowbit.restore_(alone)
    lowbit.convert_(alone, "mxfp8")

    healed = model(X)
    assert torch.equal(healed, alone(X))
    bits.go_to(1)
    assert not torch.equal(healed, model(X))


@pytest.mark.parametrize("recipe", [HEAL, Recipe.from_name("int8").then("bf16", start=2), SPARSE], ids=lambda r: r.name)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_resume_is_exact(recipe: Recipe, k: int) -> None:
    """4 steps = k steps + save + load + 4 - k steps, bit for bit, in every phase."""
    model, bits = network(recipe)
    optimizer = sgd(model)
    train(model, bits, k, optimizer)
    saved: Any = copy.deepcopy(
        (model.state_dict(), lowbit.state_dict(model), bits.state_dict(), optimizer.state_dict())
    )
    train(model, bits, 4 - k, optimizer)

    again, bits = network(recipe)
    optimizer = sgd(again)
    again.load_state_dict(saved[0])
    lowbit.load_state_dict(again, saved[1])
    bits.load_state_dict(saved[2])
    optimizer.load_state_dict(saved[3])
    train(again, bits, 4 - k, optimizer)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(_bits(model), _bits(again), strict=True))


def _bits(model: nn.Module) -> list[tuple[str, int, Tensor]]:
    return [(s.name, s.phase, s.bits) for m in model.modules() for s in getattr(m, "sites", list)()]


def test_a_loaded_model_without_a_controller_evaluates_in_the_saved_phase() -> None:
    """The phase is part of `lowbit.state_dict`."""
    model, bits = network(HEAL)
    bits.go_to(3)
    state = lowbit.state_dict(model)
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    lowbit.convert_(other, HEAL)
    other.load_state_dict(model.state_dict())
    before = other.eval()(X)
    lowbit.load_state_dict(other, state)

    assert torch.equal(other(X), model.eval()(X))
    assert not torch.equal(other(X), before)


def test_another_phase_plan_is_refused() -> None:
    """A state of a run that switches at step 2 is not one of a run that switches at step 3."""
    _, bits = network(HEAL)
    _, other = network(HEAL.tuned(starts=[3]))

    with pytest.raises(UsageError, match="other phases"):
        other.load_state_dict(bits.state_dict())


def test_the_ledger_of_a_healed_run_is_the_planned_one() -> None:
    """The plan has 4 bits before the switch and 8 after it, as the run has."""
    model, bits = network(HEAL)
    planned = plan(model, X, steps=4)
    model, bits = network(HEAL)
    with lowbit.Meter(model) as meter:
        for _ in range(4):
            model(X).sum().backward()
            meter.step()
            bits.step()

    assert planned.totals() == meter.ledger.totals()
    assert {total.product.bits for total in planned.totals()} == {(4, 4), (8, 8)}


def test_each_phase_has_its_engine() -> None:
    """int8 codes run on the int8 engine, and the phase whose formats it refuses on reference."""
    model, bits = network(Recipe.from_name("int8").then("mxfp8", start=1), engine="auto")
    sites = [layer.sites()[0] for layer in model.modules() if hasattr(layer, "sites")]
    first = [site.engine for site in sites]
    bits.go_to(1)

    assert first == ["int8", "int8"]
    assert [site.engine for site in sites] == ["reference", "reference"]


def test_an_engine_that_a_later_phase_lacks_is_refused_at_conversion() -> None:
    """engine="int8" with a phase of mxfp8 raises before anything trains."""
    model = nn.Sequential(nn.Linear(64, 8))

    with pytest.raises(UsageError, match="cannot run as asked"):
        lowbit.convert_(model, Recipe.from_name("int8").then("mxfp8", start="0.5"), engine="int8")


def test_a_probe_measures_the_present_phase() -> None:
    """The operands of a probe in the second phase of int8 at 4 and 8 bits have 8 bits."""
    recipe = Recipe.from_name("int8:w4a4g4").then("int8", start=2)
    model, bits = network(recipe)
    bits.go_to(2)

    found = lowbit.probe(model, [X], lambda m, x: m(x).square().mean(), bits=[3])
    assert {row.bits for row in found.operands} == {8}
    assert set(found.present.values()) == {8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[phases]]\nstart = "0.9"\nrecipe = "cpt"', "itself changes"),
        ('[[phases]]\nstart = "0.9"\nrecipe = "sbm8"', "normalisation"),
        ('[[phases]]\nstart = "0.9"\nrecipe = "sbm8-cpt"', "leaves the last layer"),
        ('[[phases]]\nstart = 0\nrecipe = "mxfp8"', "later start"),
        ('[[phases]]\nrecipe = "mxfp8"', "lack start"),
        ('[[phases]]\nstart = 1\nrecipe = "mxfp9"', "mxfp9"),
        ('[[phases]]\nstart = 1\nrecipe = "mxfp8"\nfirst = "leave"', "first"),
        ("phases = 3", "write a table"),
        ("skip = { update_every = 1 }", "update_every"),
        ("skip = { stagger = true }", "stagger"),
        ('skip = { skip_layers = "(" }', "regular expression"),
    ],
)
def test_what_no_run_could_have_is_refused(text: str, message: str) -> None:
    """A recipe with such phases or skipped steps does not load, and the message says why."""
    with pytest.raises(UsageError, match=message):
        from_toml("mine", f'base = "mxfp4"\n{text}')


@pytest.mark.parametrize(("starts", "message"), [([3, 2], "order of time"), ([2, 9], "after the last")])
def test_phases_lie_in_the_run_in_order(starts: list[int], message: str) -> None:
    """The controller refuses starts that only the length of the run shows to be wrong."""
    recipe = Recipe.from_name("mxfp4").then("mxfp6", start=2).then("mxfp8", start=3)

    with pytest.raises(UsageError, match=message):
        network(recipe.tuned(starts=starts))


def test_training_without_a_controller_is_refused() -> None:
    """A recipe with phases would otherwise silently stay in the first."""
    model = nn.Sequential(nn.Linear(64, 8))
    lowbit.convert_(model, HEAL)

    with pytest.raises(UsageError, match="the formats of recipe 'mine' change"):
        model(X)


def test_a_skipped_gradient_is_none_and_the_weight_stays() -> None:
    """Momentum and decay leave the weight of a skipped layer alone, its bias trains, and no product ran."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    lowbit.convert_(model, "int8", rules=[("2", from_toml("frozen", 'base = "int8"\ngrad_weight = "skip"'))])
    before = copy.deepcopy(model.state_dict())
    with lowbit.verify(model) as proof:
        model(X).square().mean().backward()
    gradient = model[2].weight.grad
    sgd(model).step()
    after = model.state_dict()

    assert gradient is None
    assert {(row.layer, row.product) for row in proof.rows} == {
        ("0", "output"),
        ("0", "grad_weight"),
        ("2", "output"),
        ("2", "grad_input"),
    }
    assert "2: grad_weight was skipped" in str(proof)
    assert [name for name in after if torch.equal(before[name], after[name])] == ["2.weight"]


def test_layers_take_turns() -> None:
    """With two turns each step computes one of two gradients, and the ledger has half of their bit operations."""
    model, bits = network("sparse")
    planned = plan(model, X, steps=4)
    whole = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    lowbit.convert_(whole, "int8")
    trained = []
    for _ in range(4):
        model(X).square().mean().backward()
        trained.append([layer.weight.grad is not None for layer in (model[0], model[2])])
        model.zero_grad()
        bits.step()

    def cost(ledger: Any) -> int:
        return sum(t.bit_operations for t in ledger.totals() if t.product.product == "grad_weight")

    assert trained == [[True, False], [False, True]] * 2
    assert 2 * cost(planned) == cost(plan(whole, X, steps=4))


def test_a_compiled_model_skips_too() -> None:
    """The gradients of a compiled model are None in the same steps, and equal elsewhere."""
    eager, bits = network("sparse", engine="reference")
    model, own = network("sparse", engine="reference")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        eager(X).square().mean().backward()
        compiled(X).square().mean().backward()
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)
        eager.zero_grad(), model.zero_grad()
        bits.step(), own.step()


def test_a_pattern_that_matches_no_layer_is_refused() -> None:
    """`skip_layers` names a layer that is converted, or the conversion raises."""
    recipe = Recipe.from_name("sparse").tuned(skip_layers="blocks.*")

    with pytest.raises(UsageError, match="matches the whole name of no converted layer"):
        lowbit.convert_(nn.Sequential(nn.Linear(64, 8)), recipe)
