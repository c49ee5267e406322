"""The cost of a run as text, JSON and CSV."""

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.metrics import METRICS
from lowbit.evidence.plan import plan
from lowbit.evidence.records import Product
from lowbit.hardware import BitFusion, Estimate, Store
from lowbit.report.cost import Cost
from lowbit.schedules import Piecewise


def ledger(recipe: str = "w8a8g8", steps: int = 4) -> Ledger:
    """A planned run whose last layer is left in full precision and whose bits change half-way."""
    with torch.device("meta"):
        body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
        model, x = body.append(nn.Linear(8 * 64, 5)), torch.zeros(2, 3, 8, 8)
    lowbit.convert_(model, lowbit.Recipe.from_name(recipe).replace(first="convert", last="leave"))
    forward = Piecewise(pieces=[(0, 4), (steps // 2, 8)], total_steps=steps)
    return plan(model, x, steps=steps, forward=forward, name="small")


def scored() -> Ledger:
    """A run whose best evaluation came after two of its four steps."""
    plain, run = ledger(), Ledger(model="small", layers=["0", "2", "4", "idle"])
    for product in plain.products:
        run.intern(product)
    for step in plain.steps:
        run.add_step(plain.programs[step.program], samples=step.samples)
        if step.step in (1, 3):
            score = 0.9 if step.step == 1 else 0.8
            run.add_evaluation(plain.programs[0], samples=2, name="accuracy", score=score)
    run.add_note("a remark")
    return run


def test_the_text_has_every_layer_and_metric() -> None:
    """Each layer has a line with the range of its bits, each metric one with its unit."""
    text = str(Cost(ledger()))

    first = next(line for line in text.splitlines() if line.split()[:1] == ["0"])
    assert first.split()[:5] == ["0", "conv2d", "4..8x4..8", "-", "8x4..8"]
    assert all(metric.name in text and metric.unit in text for metric in METRICS)
    assert "4 steps, 8 samples" in text
    assert "BitFusion" not in text


def test_shares_of_the_layers_are_the_whole() -> None:
    """The shares of the bit operations add up to 100 %."""
    lines = str(Cost(ledger())).splitlines()
    shares = [float(line.split()[-1]) for line in lines if line.split()[:1] in (["0"], ["2"], ["4"])]

    assert sum(shares) == pytest.approx(100, abs=0.02)


def test_both_conventions_and_both_ends_are_given() -> None:
    """Whole run and until the best checkpoint, as it ran and as charged: four totals of each metric."""
    data = Cost(scored()).to_dict()
    macs = next(metric for metric in data["metrics"] if metric["name"] == "MACs")

    whole, best = macs["whole_run"], macs["until_best"]
    assert whole["as-ran"]["total"] == 2 * best["as-ran"]["total"]
    assert whole["as-charged"]["grad_input"] == whole["as-charged"]["output"] > whole["as-ran"]["grad_input"]
    assert data["best"] == {"name": "accuracy", "score": 0.9, "step": 2}


def test_bits_until_the_best_checkpoint_are_those_of_its_steps() -> None:
    """The first half ran in 4 bits, so it costs less than half of the bit operations."""
    metrics = {metric["name"]: metric for metric in Cost(scored()).to_dict()["metrics"]}

    gbitops = metrics["GBitOPs"]
    assert gbitops["until_best"]["as-ran"]["total"] < 0.5 * gbitops["whole_run"]["as-ran"]["total"]


def test_remarks_name_what_is_not_in_the_figures() -> None:
    """Idle layers, uncounted operators, evaluations, memory and notes stand below the tables."""
    text = str(Cost(scored(), measured={"energy": "not available here"}))

    assert "never ran, so they cost nothing: idle." in text
    assert "aten.relu 4" in text
    assert "evaluations: 2" in text
    assert "held for the backward" in text
    assert "energy: not available here" in text
    assert "note: a remark" in text
    assert "best: accuracy 0.9 after 2 steps." in text


def test_hardware_adds_cycles_and_energy() -> None:
    """With an array each layer has cycles and energy, and the products add up to the total."""
    data = Cost(ledger(), BitFusion()).to_dict()

    parts = [data["hardware"][name] for name in ("output", "grad_input", "grad_weight")]
    assert data["hardware"]["total"]["cycles"] == sum(part["cycles"] for part in parts)
    known = [row for row in data["layers"] if "cycles" in row]
    assert sum(row["cycles"] for row in known) == data["hardware"]["total"]["cycles"]
    assert all(row["loops"] for row in known)


def test_layers_in_full_precision_are_estimated_by_a_rule_that_is_said() -> None:
    """A layer of 32 x 32 bits has an estimate, and the text and the data name it with the rule."""
    cost = Cost(ledger(), BitFusion())

    assert list(cost.to_dict()["assumed"].values()) == [["4"]]
    assert "assumed for 4: widths above 16 bits: b bits are charged as ceil(b/8) parts of 8 bits" in str(cost)
    assert cost.not_estimated() == {}


def test_the_saving_against_full_precision_is_given() -> None:
    """What runs in 4 and 8 bits would take more at 32 x 32: just what the same plan in fp32 costs."""
    cost = Cost(ledger(), BitFusion())
    with torch.device("meta"):
        body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
        plain, x = body.append(nn.Linear(8 * 64, 5)), torch.zeros(2, 3, 8, 8)
    lowbit.convert_(plain, lowbit.Recipe.from_name("fp32").replace(first="convert", last="convert"))
    full = Cost(plan(plain, x, steps=4), BitFusion()).on_hardware()["total"]

    ran, wide = cost.on_hardware()["total"], cost.in_full_precision()
    assert (wide.cycles, wide.macs) == (full.cycles, full.macs)
    assert f"at 32x32 bits the same products take {wide.cycles / ran.cycles:.2f} times the cycles" in str(cost)
    assert 1.5 * ran.cycles < wide.cycles < 16 * ran.cycles


@dataclass(frozen=True)
class Narrow:
    """An accelerator that lacks widths above 8 bits."""

    widest: int = 8

    def product(self, product: Product, *, first_layer: bool = False) -> Estimate:
        """One cycle for each multiply-accumulate, two more for a first layer."""
        if max(product.bits) > self.widest:
            raise UsageError(f"{max(product.bits)} bits are too wide")
        stores = (
            Store(name="sram", read=8, written=0, energy_nj=1.0),
            Store(name="hbm", read=4, written=4, energy_nj=2),
        )
        cycles = product.macs + 2 * first_layer
        return Estimate(
            macs=product.macs,
            compute_cycles=cycles,
            stall_cycles=0,
            memory_cycles=1,
            seconds=cycles / 1e6,
            core_nj=3.0,
            stores=stores,
        )


def test_any_accelerator_is_shown_by_its_own_stores() -> None:
    """The text and the data have the names of the class and of its stores."""
    cost = Cost(ledger(), Narrow())
    total = cost.to_dict()["hardware"]["total"]

    assert re.search(r"^Narrow +Mcycles .* core J +sram J +hbm J +J +MAC/cycle +MAC/hbm bit$", str(cost), re.MULTILINE)
    assert total["hbm_nj"] == 2 * total["sram_nj"] > 0
    assert total["energy_nj"] == total["core_nj"] + total["sram_nj"] + total["hbm_nj"]


def test_layers_that_the_hardware_refuses_are_named_not_estimated() -> None:
    """What an accelerator refuses is named with its reason and is in no total; a comparison is then not made up."""
    cost = Cost(ledger(), Narrow())

    assert cost.not_estimated() == {"32 bits are too wide": ["4"]}
    assert "not estimated: 4: 32 bits are too wide" in str(cost)
    assert "no comparison with 32x32 bits: 0: 32 bits are too wide" in str(cost)
    assert cost.to_dict()["in_full_precision"] is None


def test_nothing_that_fits_the_hardware_is_said() -> None:
    """A run that the accelerator refuses as a whole has no estimate at all, and says so."""
    model = nn.Sequential(nn.Linear(4, 2))
    text = str(Cost(plan(model, torch.zeros(3, 4), steps=1), Narrow()))

    assert "Narrow: no product has an estimate" in text


def test_the_hardware_is_told_of_the_first_layer() -> None:
    """The layer that reads the network's input is the one whose `grad_input` nothing needs."""
    cost = Cost(ledger(), Narrow())

    extra = {row.total.product.layer: row.once.cycles - row.total.product.macs for row in cost.rows if row.once}
    assert extra == {"0": 2, "2": 0}


def test_a_result_that_is_not_an_estimate_is_refused() -> None:
    """An accelerator that answers with anything else is named."""

    class Wrong:
        def product(self, product: Product, *, first_layer: bool = False) -> Any:
            return product.macs + first_layer

    with pytest.raises(UsageError, match=r"Wrong\.product\(\.\.\.\)=\d+: give an Estimate"):
        str(Cost(ledger(), Wrong()))


def test_an_accelerator_that_fails_is_named_with_the_product() -> None:
    """An error of an accelerator ends the report and says which product it was asked for, and where it failed."""

    class Broken:
        def product(self, product: Product, *, first_layer: bool = False) -> Estimate:
            raise ZeroDivisionError(f"{product.macs} / {int(first_layer)}")

    with pytest.raises(RunError, match=r"Broken\.product raises for output of 0: ZeroDivisionError: .* \(line \d+\)"):
        str(Cost(ledger(), Broken()))


@pytest.mark.parametrize(
    ("hardware", "message"), [(BitFusion, "is a class.*BitFusion()"), ("bitfusion", "Accelerator")]
)
def test_hardware_is_an_object_that_is_asked(hardware: Any, message: str) -> None:
    """A class, or a name, is refused with what to give."""
    with pytest.raises(UsageError, match=message):
        Cost(ledger(), hardware)


def test_json_is_the_dictionary() -> None:
    """JSON has just what `to_dict` has."""
    cost = Cost(scored(), BitFusion())

    assert json.loads(cost.to_json()) == json.loads(json.dumps(cost.to_dict()))


def test_json_has_null_for_an_infinite_score() -> None:
    """A run whose only score is infinite gives JSON that every reader takes."""
    run = ledger()
    run.add_evaluation(None, name="loss", score=math.inf, higher_is_better=False)

    data = json.loads(Cost(run).to_json(), parse_constant=pytest.fail)

    assert data["best"] == {"name": "loss", "score": None, "step": 4}


def test_csv_has_a_line_for_each_product_and_pair_of_widths() -> None:
    """Each line has the product's bits, and MACs add up to those of the metrics."""
    cost = Cost(ledger(), BitFusion())
    rows = list(csv.DictReader(io.StringIO(cost.to_csv())))

    assert len(rows) == len(cost.rows)
    assert sum(int(row["macs"]) for row in rows) == cost.terms()["MACs"].total
    assert {row["bits"] for row in rows if row["layer"] == "2" and row["product"] == "output"} == {"4x4", "8x8"}


def test_an_empty_ledger_is_refused() -> None:
    """A ledger without a step has no cost, and the message says why that may be."""
    with pytest.raises(UsageError, match=r"no step.*Meter\.step"):
        Cost(Ledger())


def test_all_of_resnet18_takes_seconds() -> None:
    """Every layer and product of ResNet-18 at one pair of bits has an estimate from few distinct searches."""
    from lowbit.train import models
    from lowbit.train.data import Task

    with torch.device("meta"):
        model = models.build("resnet18", Task(kind="image", shape=(3, 224, 224), classes=1000))
        x = torch.zeros(16, 3, 224, 224)
    lowbit.convert_(model, lowbit.Recipe.from_name("w8a8g8").replace(first="convert", last="convert"))
    cost = Cost(plan(model, x, steps=1), BitFusion())

    assert len(cost.rows) == 3 * 21 - 1
    assert not cost.not_estimated()
