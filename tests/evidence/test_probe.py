"""The probe: what it measures, and the bits that it suggests."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.errors import UsageError
from lowbit.evidence.probe import Probe, Sensitivity, probe, with_forward_bits
from lowbit.methods.recipe import Recipe


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def converted(recipe: str = "sbm8") -> nn.Sequential:
    """A network that separates two classes, with one layer of large and one of small influence."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, Recipe.from_name(recipe).replace(first="convert", last="convert"))
    return model


BATCHES = [(torch.randn(20, 12), torch.randint(4, (20,))) for _ in range(2)]


def test_errors_are_those_that_verify_measures() -> None:
    """SQNR, cosine and clipped share of each operand are those of a proof of the same step."""
    model = converted()
    found = probe(model, BATCHES[:1], loss, bits=[4])
    with lowbit.verify(model.train()) as proof:
        loss(model, BATCHES[0]).backward()

    rows = {(row.layer, row.product, row.operand): row for row in found.operands}
    assert len(rows) == 2 * (3 * 3) - 2
    for row in proof.rows:
        for name, operand in row.operands.items():
            seen = rows[row.layer, row.product, name]
            assert (seen.sqnr_db, seen.cosine, seen.clipped) == (operand.sqnr_db, operand.cosine, operand.clipped)
            assert seen.bits_needed == operand.bits_needed


def test_underflow_is_counted() -> None:
    """Values that are small against the largest become 0, and a tensor of equal values loses none."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    lowbit.convert_(model, "sbm8")
    x = torch.full((5, 8), 1e-4)
    x[:, 0] = 1.0
    batch = (x, torch.zeros(5, dtype=torch.int64))

    rows = {(row.product, row.operand): row for row in probe(model, [batch], loss, bits=[4]).operands}
    assert rows["output", "input"].underflowed == pytest.approx(7 / 8)
    assert rows["output", "weight"].underflowed < 0.1


def test_the_model_is_left_alone() -> None:
    """Weights, gradients, bits, ranges, step and mode are what they were, and so is torch's generator."""
    model = converted().eval()
    before = lowbit.state_dict(model)
    weights = [p.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    probe(model, BATCHES, loss, bits=[2, 4])
    after = lowbit.state_dict(model)

    assert torch.equal(generator, torch.get_rng_state())
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert after["groups"][0]["step"] == before["groups"][0]["step"]
    for name, site in before["groups"][0]["sites"].items():
        assert torch.equal(site["bits"], after["groups"][0]["sites"][name]["bits"])


def test_a_probe_repeats() -> None:
    """The same probe gives the same figures, stochastic rounding and dropout included."""
    model = converted()
    model.insert(1, nn.Dropout(0.3))

    assert str(probe(model, BATCHES, loss, bits=[3])) == str(probe(model, BATCHES, loss, bits=[3]))


def test_sensitivity_is_the_loss_at_those_bits() -> None:
    """The change of a layer is that of a model converted with this layer alone in these bits."""
    model = converted("sbm8-cpt")
    found = probe(model, BATCHES[:1], loss, bits=[2])
    other = converted("sbm8-cpt")
    lowbit.restore_(other)
    recipe = Recipe.from_name("sbm8-cpt").replace(first="convert", last="convert")
    lowbit.convert_(other, recipe, rules=[("2", with_forward_bits(recipe, 2))])
    with torch.no_grad():
        expected = float(loss(other, BATCHES[0])) - found.loss

    (change,) = [s.loss_change for s in found.sensitivities if (s.layer, s.bits) == ("2", 2)]
    assert change == pytest.approx(expected, abs=1e-7)
    assert change != 0


def test_present_bits_change_nothing() -> None:
    """At the bits it has, a layer's loss change is exactly 0."""
    found = probe(converted(), BATCHES, loss, bits=[4, 8])

    assert {s.loss_change for s in found.sensitivities if s.bits == 8} == {0.0}


def test_bit_operations_are_those_of_the_widths() -> None:
    """A layer at b bits takes b² + 8 b + 16 b per MAC: its bf16 gradient keeps 16."""
    found = probe(converted(), BATCHES[:1], loss, bits=[4])

    operations = {(s.layer, s.bits): s.bit_operations for s in found.sensitivities}
    macs = 20 * 16 * 16
    assert operations["2", 4] == macs * (4 * 4 + 8 * 4 + 16 * 4)
    assert operations["2", 8] == macs * (8 * 8 + 8 * 8 + 16 * 8)


def made(changes: dict[str, dict[int, float]]) -> Probe:
    """A probe with these loss changes by layer and bits; b bits cost b² bit operations."""
    recipe = Recipe.from_name("w8a8g8")
    return Probe(
        loss=1.0,
        operands=[],
        sensitivities=[
            Sensitivity(layer=layer, bits=bits, loss_change=change, bit_operations=bits * bits)
            for layer, each in changes.items()
            for bits, change in each.items()
        ],
        recipes=dict.fromkeys(changes, recipe),
        present=dict.fromkeys(changes, 8),
    )


def test_the_sensitive_layer_keeps_its_bits() -> None:
    """Under a budget the layer whose loss suffers most keeps bits and the other gives them up."""
    found = made({"a": {2: 5.0, 4: 2.0, 8: 0.0}, "b": {2: 0.1, 4: 0.05, 8: 0.0}})

    suggestion = found.suggest(0.6)
    assert [(layer, recipe.output.weight.bits) for layer, recipe in suggestion.rules] == [("b", 2)]
    assert suggestion.share == (64 + 4) / 128
    assert suggestion.loss_change == pytest.approx(0.1)


@pytest.mark.parametrize("budget", [0.07, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0])
def test_suggestions_are_near_the_best_of_all(budget: float) -> None:
    """The loss is at most that of the best assignment at a budget less one layer's largest step."""
    layers = {"a": {2: 0.9, 4: 0.2, 8: 0.0}, "b": {2: 0.3, 4: 0.2, 8: 0.0}, "c": {2: 0.2, 4: 0.01, 8: 0.0}}
    suggestion = made(layers).suggest(budget)

    def best(limit: float) -> float:
        all_bits = [
            (sum(b * b for b in bits), sum(layers[name][b] for name, b in zip(layers, bits, strict=True)))
            for bits in product((2, 4, 8), repeat=3)
        ]
        return min((change for cost, change in all_bits if cost <= limit), default=9.0)

    assert suggestion.share <= budget
    assert best(budget * 192) - 1e-12 <= suggestion.loss_change <= best(budget * 192 - 48) + 1e-12


def test_rules_are_taken_by_convert() -> None:
    """The rules convert a fresh model to the suggested bits, layer by layer."""
    suggestion = probe(converted(), BATCHES, loss, bits=[3, 4]).suggest(0.5)
    model = converted()
    lowbit.restore_(model)
    report = lowbit.convert_(model, "sbm8", rules=suggestion.rules)

    wanted = {layer: recipe.output.weight.bits for layer, recipe in suggestion.rules}
    assert wanted
    bits = {row.name: row.bits["output"] for row in report.rows}
    assert all(bits[layer] == f"{b}x{b}" for layer, b in wanted.items())
    assert suggestion.share <= 0.5


def test_a_full_budget_changes_nothing_that_helps() -> None:
    """With all the bit operations of now, no layer's loss rises."""
    assert probe(converted(), BATCHES, loss, bits=[4]).suggest(1.0).loss_change <= 0


@pytest.mark.parametrize("budget", [0, -1, 1.5])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    """A budget is a share above 0 and at most 1."""
    with pytest.raises(UsageError, match="budget="):
        made({"a": {2: 1.0, 8: 0.0}}).suggest(budget)


def test_a_budget_below_the_fewest_bits_says_what_is_possible() -> None:
    """The message has the smallest share that the probed bits allow."""
    with pytest.raises(UsageError, match=r"take 0\.062"):
        made({"a": {2: 1.0, 8: 0.0}}).suggest(0.01)


def test_layers_that_did_not_run_are_named() -> None:
    """A converted layer outside these batches has no figures and is named."""
    model = converted()
    model.append(nn.Identity())
    model[5].idle = nn.Linear(2, 2)
    lowbit.restore_(model)
    lowbit.convert_(model, "sbm8")

    found = probe(model, BATCHES, loss, bits=[4])
    assert list(found.idle) == ["5.idle"]
    assert "never ran: 5.idle" in str(found)


def test_layers_of_several_products_are_one() -> None:
    """An LSTM is probed as one layer, which is what a rule can address."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.lstm(x)[0][:, -1])
            return y

    model = Model()
    lowbit.convert_(model, "sbm8")
    found = probe(model, [(torch.randn(6, 3, 4), torch.randint(3, (6,)))], loss, bits=[3])

    assert {s.layer for s in found.sensitivities} == {"lstm", "head"}


@pytest.mark.parametrize(
    ("recipe", "batches", "bits", "message"),
    [
        ("sbm8", [], [4], "no batch"),
        ("fp32", BATCHES, [4], "nothing in this model is converted to integer"),
        ("sbm8", BATCHES, [1], "bits=1"),
        ("sbm8", BATCHES, [17], "bits=17"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    recipe: str, batches: list[tuple[Tensor, Tensor]], bits: list[int], message: str
) -> None:
    """Each wrong request is a UsageError before anything runs."""
    with pytest.raises(UsageError, match=message):
        probe(converted(recipe), batches, loss, bits=bits)


@pytest.mark.parametrize("name", ["cpt", "cpt-int8", "pfq", "dfq", "fractrain"])
def test_a_dynamic_recipe_is_probed_at_the_bits_of_its_formats(name: str) -> None:
    """Without a controller a probe runs, at constant bits, and suggests recipes that need none."""
    recipe = Recipe.from_name(name)

    found = probe(converted(name), BATCHES, loss, bits=[2])

    assert set(found.present.values()) == {recipe.output.weight.bits}
    assert not any(recipe.is_dynamic for recipe in found.recipes.values())
    assert any(s.loss_change != 0 for s in found.sensitivities)


def test_a_controller_does_not_undo_the_bits_that_are_tried() -> None:
    """A model whose controller says 3 bits has the sensitivities of one without, and keeps its controller's bits."""
    found = []
    for controlled in (True, False):
        model = converted("sbm8-cpt")
        if controlled:
            controller = lowbit.PrecisionController(model, forward=3)
            controller.step()
        found.append([s.loss_change for s in probe(model, BATCHES, loss, bits=[2, 4]).sensitivities])
        bits = int(model[0].site.bits[0])
        assert bits == (3 if controlled else 8)

    assert found[0] == found[1]
    assert any(change != 0 for change in found[0])
