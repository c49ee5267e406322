"""The metrics of the literature, against their formulas and the figures that were published."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowbit
from helpers import ORACLES
from lowbit.evidence import metrics
from lowbit.evidence.metrics import METRICS
from lowbit.evidence.plan import plan
from lowbit.evidence.records import PRODUCTS, Product, Total
from lowbit.schedules import Cyclic, Schedule, bit_operations
from lowbit.train import models
from lowbit.train.data import Task

STEPS, BATCH = 64_000, 128


def layer(w: int, a: int, g: int, *, macs: int = 1000, calls: int = 1) -> list[Total]:
    """The three products of a layer with the widths of weight, input and gradient."""
    bits = {"output": (a, w), "grad_input": (g, w), "grad_weight": (g, a)}
    shapes: dict[str, Any] = {"input": (10, 16), "weight": (8, 16), "output": (10, 8)}
    return [
        Total(Product(layer="x", product=p, kind="linear", engine="e", bits=bits[p], macs=macs, **shapes), calls)
        for p in PRODUCTS
    ]


@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 32), st.integers(1, 10**6), st.integers(1, 10**5))
def test_every_metric_is_its_formula(w: int, a: int, g: int, macs: int, calls: int) -> None:
    """For one layer each metric is the closed form of its source, in all three terms."""
    totals = layer(w, a, g, macs=macs, calls=calls)
    n = macs * calls

    assert metrics.macs(totals).total == 3 * n
    assert metrics.effective_macs(totals).total == pytest.approx(n * (w * a + w * g + a * g) / 1024)
    assert metrics.relative_cost(totals).total == pytest.approx(100 * (w * a + w * g + a * g) / (3 * 1024))
    assert metrics.gbitops(totals).total == pytest.approx(1e-9 * n * (w * a + w * g + a * g))
    assert metrics.dorefa_complexity(totals).total == pytest.approx(w * a + w * g)
    assert metrics.bops(totals).total == pytest.approx(n * (w * a + w + a + math.log2(16)))
    assert metrics.bitops(totals) == metrics.effective_macs(totals)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_terms_are_those_of_their_product(metric: metrics.Metric) -> None:
    """The term of a product is 0 where that product did not run, and the terms add up."""
    totals = layer(3, 5, 7)
    for i, name in enumerate(PRODUCTS):
        alone = metric([totals[0], totals[i]])
        others = [other for other in PRODUCTS if other not in ("output", name)]
        assert all(getattr(alone, other) == 0 for other in others)

    whole = metric(totals)
    assert whole.total == pytest.approx(sum(getattr(whole, name) for name in PRODUCTS))


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_nothing_costs_nothing(metric: metrics.Metric) -> None:
    """Every metric of an empty run is 0."""
    assert metric([]).total == 0


def test_metrics_have_names_and_units() -> None:
    """Names are unique, and each metric says where it is from and in what unit it is."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.source and metric.unit and metric.formula for metric in METRICS)


def test_full_precision_is_the_unit() -> None:
    """In 32 by 32 bits effective MACs are MACs and cp is 100 %."""
    totals = layer(32, 32, 32)

    assert metrics.effective_macs(totals) == metrics.macs(totals)
    assert metrics.relative_cost(totals).total == pytest.approx(100)


def test_operand_bytes_by_hand() -> None:
    """Both operands of each product, at their widths: 10 x 16 inputs, 8 x 16 weights, 10 x 8 gradients."""
    terms = metrics.operand_bytes(layer(4, 8, 16))

    assert terms.output == (160 * 8 + 128 * 4) / 8
    assert terms.grad_input == (80 * 16 + 128 * 4) / 8
    assert terms.grad_weight == (80 * 16 + 160 * 8) / 8


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "linear", "weight": (8, 16), "input": (10, 16)}, 16),
        ({"kind": "conv2d", "weight": (8, 4, 3, 3), "input": (1, 8, 9, 9), "groups": 2}, 36),
        ({"kind": "conv_transpose2d", "weight": (8, 4, 3, 3), "input": (1, 8, 9, 9), "transposed": True}, 72),
        ({"kind": "matmul", "weight": (2, 16, 5), "input": (2, 7, 16)}, 16),
    ],
)
def test_products_in_a_sum(change: dict[str, Any], expected: int) -> None:
    """K is the number of products that one value of the output is the sum of."""
    values = {"layer": "", "product": "output", "engine": "e", "bits": (8, 8), "macs": 1, "output": (1,)} | change

    assert metrics.summed(Product(**values)) == expected


def planned(name: str, size: int, classes: int, forward: Schedule | int, backward: int) -> lowbit.Ledger:
    """CPT's run: 64,000 steps of 128 samples, every layer in the bits of the schedule."""
    with torch.device("meta"):
        model = models.build(name, Task(kind="image", shape=(3, size, size), classes=classes))
        x = torch.zeros(BATCH, 3, size, size)
    recipe = lowbit.Recipe.from_name("w8a8g8").replace(first="convert", last="convert")
    lowbit.convert_(model, recipe)
    return plan(model, x, steps=STEPS, forward=forward, backward=backward)


def test_published_gbitops_of_resnet38() -> None:
    """CPT plots 1.32e8 GBitOPs for ResNet-38 at 8/8 bits on CIFAR: within 1 %, as the papers count."""
    totals = planned("resnet38", 32, 100, 8, 8).totals("as-charged")

    assert metrics.gbitops(totals).total == pytest.approx(1.32e8, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_published_gbitops_of_the_tables(name: str) -> None:
    """Every entry of CPT's table of ImageNet networks, static and cyclic, is met within 1 %."""
    path = ORACLES / "dynamic" / "cost_macs_gbitops.json"
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    rows = [row for row in json.loads(path.read_text())["published_vs_formula"] if row["model"] == name]
    assert len(rows) == 4
    for row in rows:
        forward, backward = row["prec"].split("/")
        low, _, high = forward.partition("-")
        schedule = Cyclic(low=int(low), high=int(high), cycles=32, total_steps=STEPS) if high else int(low)
        totals = planned(name, 224, 1000, schedule, int(backward)).totals("as-charged")
        found = metrics.gbitops(totals).total

        assert found == pytest.approx(row["published"], rel=0.01)
        assert found == pytest.approx(row["formula"], rel=1e-9)


@pytest.mark.parametrize(("name", "macs"), [("resnet38", 83_286_272), ("resnet74", 168_220_928)])
def test_gbitops_of_the_cifar_networks_are_the_authors_formula(name: str, macs: int) -> None:
    """MACs of the authors' network x samples x mean of b² + 2bg over CPT's bits, to the last digit."""
    schedule = Cyclic(low=3, high=8, cycles=32, total_steps=STEPS)
    totals = planned(name, 32, 100, schedule, 8).totals("as-charged")

    expected = macs * STEPS * BATCH * bit_operations(schedule, 8) / 1e9
    assert metrics.gbitops(totals).total == pytest.approx(expected, rel=1e-12)


def test_as_ran_is_less_than_as_charged_by_the_first_layer() -> None:
    """The two conventions differ by one product: the grad_input of the first convolution."""
    ledger = planned("resnet38", 32, 100, 8, 8)
    ran, charged = metrics.macs(ledger.totals()), metrics.macs(ledger.totals("as-charged"))

    assert charged.grad_input - ran.grad_input == 442_368 * STEPS * BATCH
    assert (charged.output, charged.grad_weight) == (ran.output, ran.grad_weight)
    assert charged.grad_input == charged.output
