"""The BitFusion model against the counters of the authors' simulator, a plain twin of its search, and bad input."""

import csv
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ORACLES
from lowbit.errors import UsageError
from lowbit.hardware import BitFusion, Energies, Estimate, Loop, Store, TrainingEstimate, total
from lowbit.hardware.array import Layer
from lowbit.hardware.tiling import LOOPS, NAMES, ORDERS, Tiles, evaluate, fits, order_indices, tile_bits

LAYER: dict[str, Any] = {
    "kernel": 3,
    "output_size": 14,
    "stride": 1,
    "in_channels": 256,
    "out_channels": 256,
    "batch": 16,
    "input_bits": 8,
    "weight_bits": 8,
}
SMALL = LAYER | {"output_size": 32, "in_channels": 16, "out_channels": 16}  # a layer of a ResNet for CIFAR
# Names in the vectors: buffers and, in the benchmarks, loops.
BUFFERS = {"wgt": "weight", "act": "input", "out": "output", "dram": "dram"}
STORES = {"weight": "weight_buffer", "input": "input_buffer", "output": "output_buffer", "dram": "dram"}
LETTERS = {"B": "b", "OW": "w", "OH": "h", "IC": "i", "OC": "o"}
# Multiply-accumulates in millions, cycles of a batch of 16, ms and mJ of an image: as the authors' notebook has them.
NETWORKS = {
    "AlexNet": (2679, 37_666_491, 4.708, 8.25),
    "SVHN": (158, 1_317_523, 0.165, 0.264),
    "CIFAR10": (617, 3_293_704, 0.412, 0.724),
    "LeNet-5": (16, 410_352, 0.051, 0.071),
    "VGG-7": (317, 2_822_491, 0.353, 0.578),
    "RESNET-18": (4269, 49_079_982, 6.135, 10.60),
    "RNN": (17, 394_583, 0.049, 0.079),
    "LSTM": (13, 337_175, 0.042, 0.068),
}


def _ceil(x: int, y: int | Fraction) -> int:
    return math.ceil(Fraction(x) / y)


def _share(array: BitFusion, bits: int) -> Fraction:
    return Fraction(1, _ceil(bits, array.pmax)) if bits > array.pmax else Fraction(array.pmax // max(bits, array.pmin))


def _plain_tile(array: BitFusion, layer: Layer, b: int, o: int, ic: int, oc: int) -> dict[str, int]:
    """Bits of a tile in each buffer, one number at a time."""
    at_once = array.rows * _share(array, layer.input_bits) * _share(array, layer.weight_bits)
    weights = math.ceil(_ceil(layer.kernel**2 * ic, at_once) * at_once)
    side = layer.kernel + (o - 1) * layer.stride
    return {
        "weight": weights * oc * layer.weight_bits,
        "input": b * layer.input_bits * ic * ((o * layer.kernel) ** 2 if layer.first_layer else side**2),
        "output": 32 * b * o**2 * array.columns * _ceil(oc, array.columns),
    }


def _plain(array: BitFusion, layer: Layer, sizes: tuple[int, int, int, int], order: str) -> dict[str, Any] | None:
    """Counters of one tile under one order, one number at a time; None where the tile does not fit."""
    b, o, ic, oc = sizes
    a, w, area = layer.input_bits, layer.weight_bits, layer.kernel**2
    at_once = array.rows * _share(array, a) * _share(array, w)
    wholes = (layer.batch, layer.output_size, layer.output_size, layer.in_channels, layer.out_channels)
    n = {loop: _ceil(whole, tile) for loop, whole, tile in zip(LOOPS, wholes, (b, o, o, ic, oc), strict=True)}
    tile = _plain_tile(array, layer, *sizes)
    room = {"weight": 4 * array.weight_bytes, "input": 4 * array.input_bytes, "output": 4 * array.output_bytes}
    if any(tile[name] > room[name] for name in tile):
        return None

    moved, peak = {}, {}
    for name, loops in (("weight", "io"), ("input", "bwhi"), ("output", "bwho")):
        bits, most, resident = tile[name], tile[name], True
        for loop in reversed(order):
            if not resident:
                bits *= n[loop]
            elif loop in loops:
                bits *= n[loop]
                if bits > room[name]:
                    resident = False
                else:
                    most = bits
        moved[name], peak[name] = bits, most

    places, columns = b * o**2, array.columns * _ceil(oc, array.columns)
    passes = _ceil(area * ic, at_once) if layer.first_layer else area * _ceil(ic, at_once)
    if layer.first_layer:
        sums = math.ceil(_ceil(area * ic, at_once) * at_once)
    else:
        sums = area * math.ceil(_ceil(ic, at_once) * at_once)
    all_products, tiles = area * ic * oc * places, math.prod(n.values())
    ways = [  # input, output, weight held still: what is compared; bits read of weight, input, output
        (sums * places * (a + columns * (w + 32)), all_products * w, all_products // oc * a, all_products * 32),
        (columns * places * (32 + sums * (a + w)), all_products * w, all_products * a, oc * places * 32),
        (sums * columns * (w + places * (a + 32)), area * ic * oc * w, all_products * a, all_products * 32),
    ]
    _, weight, inputs, output = min(ways, key=lambda way: way[0])
    dram = sum(moved.values())
    compute = tiles * places * (columns // array.columns) * passes
    first, last = sum(peak.values()), peak["output"]
    middle = dram + moved["output"] - first - last
    width = array.dram_bits_per_cycle
    stall = max(0, _ceil(middle, width) - compute) + _ceil(first, width) + _ceil(last, width)
    out = tiles * output + moved["output"]
    result: dict[str, Any] = {
        "cycles": compute + stall,
        "stall": stall,
        "reads": {"weight": tiles * weight, "input": tiles * inputs, "output": out, "dram": dram},
        "writes": {"weight": moved["weight"], "input": moved["input"], "output": out, "dram": moved["output"]},
    }
    energy = compute * (array.costs["core"] * array.rows * array.columns)
    for name in ("weight", "input", "output", "dram"):
        for kind in ("read", "write"):
            each = array.costs["dram" if name == "dram" else f"{name}_{kind}"]
            energy += result[f"{kind}s"][name] * each
    return result | {"energy": energy}


def _vectorised(array: BitFusion, layer: Layer, sizes: tuple[int, int, int, int], order: str) -> dict[str, Any] | None:
    """The same from the functions of the search, given one tile and one order."""
    tiles = Tiles(*(torch.tensor([[size]]) for size in sizes))
    if not fits(array, layer, tiles).item():
        return None
    costs = evaluate(array, layer, tiles, order_indices([order]))
    n = {name: int(value) for name, value in costs._asdict().items()}
    return {
        "cycles": n["compute_cycles"] + n["stall_cycles"],
        "stall": n["stall_cycles"],
        "reads": {name: n[f"{name}_read"] for name in BUFFERS.values()},
        "writes": {name: n[f"{name}_write"] for name in BUFFERS.values()},
        "energy": costs.energy(array).item(),
    }


FORMS = pytest.mark.parametrize("form", [_plain, _vectorised], ids=["plain", "vectorised"])
Form = Callable[[BitFusion, Layer, tuple[int, int, int, int], str], dict[str, Any] | None]


def _vectors(name: str) -> Path:
    path = ORACLES / "dynamic" / name
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    return path


def _arguments(row: dict[str, Any]) -> dict[str, Any]:
    """A layer of the vectors in our words."""
    names = {"K": "kernel", "O": "output_size", "S": "stride", "IC": "in_channels", "OC": "out_channels", "B": "batch"}
    names |= {"iprec": "input_bits", "wprec": "weight_bits"}
    return {ours: int(row[theirs]) for theirs, ours in names.items()} | {"first_layer": str(row["im2col"]) == "True"}


@FORMS
def test_every_tile_of_the_authors_costs_the_same(form: Form) -> None:
    """All 400 evaluations of single tiles, the 256 that do not fit among them, equal the simulator's bit for bit."""
    rows = json.loads(_vectors("bitfusion_tiling_unit.json").read_text())
    expected, ours = [], []
    for row in rows:
        sizes = tuple(row["tiling"][loop][1] for loop in ("B/b", "OW/ow", "IC/ic", "OC/oc"))
        order = "".join(LETTERS[loop.split("/")[0]] for loop in row["order"])
        ours.append(form(BitFusion(), Layer(**_arguments(row)), sizes, order))
        result = row["result"]
        if result is not None:
            kinds = {kind: {BUFFERS[b]: bits for b, bits in result[kind].items()} for kind in ("reads", "writes")}
            result = kinds | {"cycles": result["cycles"], "stall": result["stall"], "energy": result["energy_nJ"]}
        expected.append(result)

    assert len(expected) == 400
    assert expected.count(None) == 256
    assert ours == expected


def _benchmarks(network: str) -> list[dict[str, str]]:
    with _vectors("bitfusion_benchmarks.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["network"] == network]
    assert rows
    return rows


def _row(estimate: Estimate) -> dict[str, str]:
    """The counters, tiles and loop order of an estimate as the benchmarks write them."""
    tiles = {loop.name: f"{loop.count}x{loop.size}" for loop in estimate.loops}
    columns: dict[str, object] = {"cycles": estimate.cycles, "stall": estimate.stall_cycles}
    for theirs, ours in BUFFERS.items():
        columns[f"rd_{theirs}"] = estimate.store(STORES[ours]).read
        columns[f"wr_{theirs}"] = estimate.store(STORES[ours]).written
    columns |= {"tB": tiles["batch"], "tO": tiles["output_row"]}
    columns |= {"tIC": tiles["in_channels"], "tOC": tiles["out_channels"]}
    theirs_of = {NAMES[letter]: theirs for theirs, letter in LETTERS.items()}
    columns["order_outer_to_inner"] = ">".join(theirs_of[loop.name] for loop in estimate.loops)
    return {name: str(value) for name, value in columns.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_count_of_every_benchmark_layer_is_the_authors(network: str) -> None:
    """Cycles, stalls, bits of every buffer, tiles and loop order of each layer equal the simulator's exactly."""
    rows = _benchmarks(network)

    ours = [_row(BitFusion().estimate(**_arguments(row))) for row in rows]

    assert ours == [{name: row[name] for name in ours[0]} for row in rows]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_energy_of_every_benchmark_layer_is_the_authors(network: str) -> None:
    """Energy of the array, of the buffers, of DRAM and in total equals the simulator's to 1e-12."""
    rows = _benchmarks(network)
    estimates = [BitFusion().estimate(**_arguments(row)) for row in rows]

    ours = [
        (e.energy_nj, e.core_nj, sum(store.energy_nj for store in e.stores[:3]), e.store("dram").energy_nj)
        for e in estimates
    ]
    theirs = [tuple(float(row[name]) for name in ("energy_nJ", "e_core", "e_sram", "e_dram")) for row in rows]

    assert all(our == pytest.approx(their, rel=1e-12) for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_whole_networks_cost_what_was_published(network: str) -> None:
    """Multiply-accumulates, cycles, ms and mJ of the eight networks are those of the authors' notebook."""
    millions, cycles, ms, millijoule = NETWORKS[network]

    whole = total(BitFusion().estimate(**_arguments(row)) for row in _benchmarks(network))

    assert whole.cycles == cycles
    assert round(whole.macs / 16e6) == millions
    assert whole.seconds * 1e3 / 16 == pytest.approx(ms, rel=0.011)
    assert whole.energy_nj * 1e-6 / 16 == pytest.approx(millijoule, rel=0.011)


def test_the_defaults_are_the_authors_configuration() -> None:
    """The default array and each default energy are those that the simulator prints for bf_e_conf.ini."""
    printed = json.loads(_vectors("bitfusion_config.json").read_text())
    config, energy = printed["config"], printed["energy_nJ"]
    array, ours = BitFusion(), BitFusion().costs

    assert [array.rows, array.columns, array.pmax, array.pmin] == [config[name] for name in ("N", "M", "pmax", "pmin")]
    assert array.weight_bytes == config["wgt_sram_bytes"]
    assert array.input_bytes == config["act_sram_bytes"]
    assert array.output_bytes == config["out_sram_bytes"]
    assert array.dram_bits_per_cycle == config["mem_if_bits_per_cycle"]
    assert array.frequency == config["frequency_hz"]
    assert ours["core"] * array.rows * array.columns == energy.pop("core_per_compute_cycle")
    assert [ours[field.name] for field in dataclasses.fields(Energies)[1:]] == list(energy.values())


def _plain_tiles(array: BitFusion, layer: Layer) -> Iterator[tuple[int, int, int, int]]:
    """Sizes of every tile of the search, output channels changing fastest."""

    def sizes(whole: int, step: int = 1) -> list[int]:
        return [min(step << i, whole) for i in range(math.ceil(math.log2(_ceil(whole, step))) + 1)]

    step = 1 if layer.first_layer else array.columns
    return itertools.product(
        sizes(layer.batch), sizes(layer.output_size), sizes(layer.in_channels), sizes(layer.out_channels, step)
    )


GIVEN = Energies(**BitFusion().costs)  # stands for energies of sizes that the authors did not publish
TINY = BitFusion(
    rows=3,
    columns=4,
    pmax=4,
    weight_bytes=192,
    input_bytes=160,
    output_bytes=128,
    dram_bits_per_cycle=24,
    energies=GIVEN,
)
SEARCHES = [
    (BitFusion(), {"input_bits": 4, "weight_bits": 4}),
    (BitFusion(), {"input_bits": 8, "weight_bits": 2, "first_layer": True}),
    (BitFusion(), {"input_bits": 16, "weight_bits": 7}),
    (TINY, {"input_bits": 4, "weight_bits": 2}),
    (TINY, {"input_bits": 2, "weight_bits": 3, "stride": 2}),
    (TINY, {"input_bits": 3, "weight_bits": 16}),
    (TINY, {"input_bits": 12, "weight_bits": 6, "kernel": 1}),
    (TINY, {"input_bits": 16, "weight_bits": 16, "kernel": 2, "first_layer": True}),
    (BitFusion(), {"input_bits": 32, "weight_bits": 32}),
    (TINY, {"input_bits": 33, "weight_bits": 64, "kernel": 1}),
]


@pytest.mark.parametrize(("array", "change"), SEARCHES)
def test_the_search_finds_the_plain_optimum(array: BitFusion, change: dict[str, Any]) -> None:
    """No tile under any of the 120 orders has fewer cycles, or as many and less energy, in the plain twin."""
    sizes = {"kernel": 3, "output_size": 5, "stride": 1, "in_channels": 11, "out_channels": 9, "batch": 3} | change
    layer = Layer(**sizes)
    orders = ["".join(order) for order in itertools.permutations(LOOPS)]
    plain = (_plain(array, layer, tile, order) for tile in _plain_tiles(array, layer) for order in orders)

    found = array.estimate(**sizes)
    best = min((result for result in plain if result), key=lambda result: (result["cycles"], result["energy"]))

    assert found.cycles == best["cycles"]
    assert found.energy_nj == pytest.approx(best["energy"], rel=1e-12)


@pytest.mark.parametrize(("array", "change"), SEARCHES)
def test_an_estimate_is_what_its_own_tiles_cost(array: BitFusion, change: dict[str, Any]) -> None:
    """The loops that an estimate reports give its counters when the plain twin runs them."""
    sizes = {"kernel": 3, "output_size": 5, "stride": 1, "in_channels": 11, "out_channels": 9, "batch": 3} | change
    found = array.estimate(**sizes)
    tile = {loop.name: loop.size for loop in found.loops}
    order = "".join(next(letter for letter in LOOPS if NAMES[letter] == loop.name) for loop in found.loops)

    plain = _plain(
        array,
        Layer(**sizes),
        (tile["batch"], tile["output_row"], tile["in_channels"], tile["out_channels"]),
        order,
    )

    assert plain is not None
    assert (found.cycles, found.stall_cycles) == (plain["cycles"], plain["stall"])
    assert {ours: found.store(name).read for ours, name in STORES.items()} == plain["reads"]
    assert {ours: found.store(name).written for ours, name in STORES.items()} == plain["writes"]


def test_the_orders_are_all_up_to_output_rows_and_columns() -> None:
    """60 orders are searched, and with output rows and columns exchanged they are all 120."""
    mirrored = {order.translate(str.maketrans("wh", "hw")) for order in ORDERS}

    assert len(ORDERS) == 60
    assert {*ORDERS, *mirrored} == {"".join(order) for order in itertools.permutations(LOOPS)}


def _resnet18() -> Iterator[dict[str, Any]]:
    """The convolutions and the linear layer of ResNet-18 for ImageNet."""

    def layer(kernel: int, size: int, stride: int, before: int, after: int, first: bool = False) -> dict[str, Any]:
        shape = {"kernel": kernel, "output_size": size, "stride": stride, "input_size": size * stride}
        return shape | {"in_channels": before, "out_channels": after, "batch": 16, "first_layer": first}

    yield layer(7, 112, 2, 3, 64, first=True)
    before, size = 64, 56
    for after in (64, 128, 256, 512):
        for block in range(2):
            stride = 2 if block == 0 and after > 64 else 1
            size //= stride
            yield layer(3, size, stride, before, after)
            yield layer(3, size, 1, after, after)
            if stride == 2:
                yield layer(1, size, 2, before, after)
            before = after
    yield layer(1, 1, 1, 512, 1000)


def test_a_whole_training_step_counts_every_layer() -> None:
    """The output products of the 21 layers of ResNet-18 have its 1.81 GMAC per image."""
    step = total(BitFusion().training(**layer, input_bits=3, weight_bits=5, grad_bits=6) for layer in _resnet18())

    assert step.output.macs == 16 * 1_814_073_344


def test_a_repeated_estimate_comes_from_the_cache() -> None:
    """The same array and arguments give the same object; equal arrays are the same array."""
    assert BitFusion().estimate(**LAYER) is BitFusion(rows=16).estimate(**LAYER)


@pytest.mark.parametrize(("bits", "as_fast_as"), [(1, 2), (3, 4), (5, 8), (6, 8), (7, 8), (9, 16), (12, 16)])
def test_widths_between_run_at_the_next_width(bits: int, as_fast_as: int) -> None:
    """Widths that the array is not made for take the compute time of the next one."""
    array = BitFusion()

    assert array.peak(input_bits=bits, weight_bits=8) == array.peak(input_bits=as_fast_as, weight_bits=8)


@pytest.mark.parametrize(
    ("input_bits", "weight_bits", "products"), [(2, 2, 16), (4, 2, 8), (4, 4, 4), (8, 2, 4), (8, 4, 2), (8, 8, 1)]
)
def test_a_fusion_unit_makes_as_many_products_as_published(input_bits: int, weight_bits: int, products: int) -> None:
    """One unit makes 16 products of 2-bit operands in a cycle, and 1 of 8-bit operands."""
    assert BitFusion().peak(input_bits=input_bits, weight_bits=weight_bits) == 512 * products


@pytest.mark.parametrize(("input_bits", "weight_bits", "products"), [(16, 8, 0.5), (16, 16, 0.25), (16, 2, 2)])
def test_wide_operands_take_several_units(input_bits: int, weight_bits: int, products: float) -> None:
    """An operand above `pmax` takes as many units as it has parts of `pmax` bits."""
    assert BitFusion().peak(input_bits=input_bits, weight_bits=weight_bits) == 512 * products


def test_sixteen_bit_gradients_take_four_times_the_compute() -> None:
    """16-bit operands on both sides of a well filled array take 4 times the compute cycles of 8-bit ones."""
    wide = BitFusion().estimate(**LAYER | {"input_bits": 16, "weight_bits": 16})

    assert wide.compute_cycles == 4 * BitFusion().estimate(**LAYER).compute_cycles


def test_full_precision_takes_sixteen_times_the_compute() -> None:
    """32 x 32 bits are 4 x 4 parts of 8 bits."""
    wide, eight = BitFusion().estimate(**LAYER | {"input_bits": 32, "weight_bits": 32}), BitFusion().estimate(**LAYER)

    assert wide.compute_cycles == 16 * eight.compute_cycles


def test_wide_words_move_at_their_width() -> None:
    """A tile of 24-bit inputs has 3 times the bits of one of 8, though each counts as 3 parts of 8; outputs keep 32."""
    tiles = Tiles(*(torch.tensor([[size]]) for size in (1, 2, 4, 32)))
    wide, eight = (tile_bits(BitFusion(), Layer(**LAYER | {"input_bits": bits}), tiles) for bits in (24, 8))

    assert int(wide.input) == 3 * int(eight.input)
    assert int(wide.output) == int(eight.output)


@pytest.mark.parametrize(("bits", "parts"), [(17, 3), (24, 3), (25, 4), (32, 4), (33, 5), (64, 8)])
def test_wide_operands_are_parts_rounded_up(bits: int, parts: int) -> None:
    """An operand of b bits takes ceil(b/8) times the units of one of 8."""
    assert BitFusion().peak(input_bits=bits, weight_bits=8) == 512 / parts


@pytest.mark.parametrize(("bits", "said"), [(16, 0), (17, 1)])
def test_the_rule_of_wide_operands_is_said(bits: int, said: int) -> None:
    """An estimate above 16 bits carries the rule as a note, once in a sum too; one of 16 bits carries none."""
    estimate = BitFusion().estimate(**LAYER | {"weight_bits": bits})

    assert len((estimate + estimate).notes) == len(estimate.notes) == said
    assert all("ceil(b/8) parts of 8 bits" in note for note in estimate.notes)


def test_seven_bits_can_cost_more_energy_than_eight() -> None:
    """The search is for cycles first, so 7 bits save a few cycles here and spend 8 % more energy than 8 bits."""
    seven = BitFusion().estimate(**LAYER | {"input_bits": 7, "weight_bits": 7})
    eight = BitFusion().estimate(**LAYER)

    assert 0.999 * eight.cycles < seven.cycles < eight.cycles
    assert seven.energy_nj == pytest.approx(1.083 * eight.energy_nj, rel=1e-3)


def test_seven_bits_can_take_more_cycles_than_eight() -> None:
    """What stays in a buffer is loaded before the first tile, so fitting more into it costs a few cycles here."""
    layer = LAYER | {"output_size": 28, "in_channels": 128, "out_channels": 128}

    seven = BitFusion().estimate(**layer | {"input_bits": 7, "weight_bits": 7})
    eight = BitFusion().estimate(**layer)

    assert seven.compute_cycles == eight.compute_cycles
    assert eight.cycles < seven.cycles < 1.001 * eight.cycles


def test_few_channels_gain_nothing_from_few_bits() -> None:
    """16 input channels fill the 16 rows at 8 bits, so that 4 and 2 bits compute no faster."""
    cycles = [BitFusion().estimate(**SMALL | {"input_bits": b, "weight_bits": b}).compute_cycles for b in (2, 4, 8)]

    assert cycles[0] == cycles[1] == cycles[2]


def test_outputs_move_32_bits_whatever_the_operands() -> None:
    """Each output is written to DRAM at 32 bits at least once, at 2-bit operands too."""
    estimate = BitFusion().estimate(**LAYER | {"input_bits": 2, "weight_bits": 2})

    assert estimate.store("dram").written >= 32 * 16 * 14**2 * 256


SNAPPED = [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (7, 8), (8, 8), (9, 16), (17, 32)]


@pytest.mark.parametrize(("bits", "snapped"), SNAPPED)
def test_snapped_bits_are_those_the_array_is_made_for(bits: int, snapped: int) -> None:
    """With `snap_bits` a layer costs, traffic included, what it costs at the next of 2, 4, 8 and 16 bits."""
    layer = SMALL | {"input_bits": bits, "weight_bits": bits}

    assert BitFusion(snap_bits=True).estimate(**layer) == BitFusion().estimate(
        **layer | {"input_bits": snapped, "weight_bits": snapped}
    )


def test_unsnapped_bits_move_less() -> None:
    """Without `snap_bits` 5-bit operands are as fast as 8-bit ones and cost less energy, as fewer bits move."""
    layer = LAYER | {"input_bits": 5, "weight_bits": 5}

    exact, snapped = BitFusion().estimate(**layer), BitFusion(snap_bits=True).estimate(**layer)

    assert exact.compute_cycles == snapped.compute_cycles
    assert exact.store("input_buffer").read * 8 == snapped.store("input_buffer").read * 5
    assert exact.energy_nj < 0.9 * snapped.energy_nj


def test_seconds_are_cycles_at_the_frequency() -> None:
    """Half the frequency doubles the seconds and leaves the cycles."""
    slow = BitFusion(frequency=250e6).estimate(**LAYER)

    assert slow.cycles == BitFusion().estimate(**LAYER).cycles
    assert slow.seconds == slow.cycles / 250e6


def test_a_linear_layer_of_a_small_batch_is_bound_by_memory() -> None:
    """4096 x 4096 weights that serve 16 samples wait for DRAM, below the ridge of the roofline."""
    layer = LAYER | {"kernel": 1, "output_size": 1, "in_channels": 4096, "out_channels": 4096}

    estimate = BitFusion().estimate(**layer)

    assert estimate.bound == "memory"
    assert estimate.operations_per_memory_bit < BitFusion().peak(input_bits=8, weight_bits=8) / 192
    assert estimate.stall_cycles > estimate.compute_cycles / 2


def test_a_large_convolution_is_bound_by_compute() -> None:
    """A 3 x 3 convolution of 256 channels in 8 bits keeps over 90 % of the Fusion Units busy."""
    estimate = BitFusion().estimate(**LAYER)

    assert estimate.bound == "compute"
    assert 0.9 * 512 < estimate.operations_per_cycle <= 512


STRIDED = LAYER | {"stride": 2, "input_bits": 4, "weight_bits": 2}
TRAINED = STRIDED | {"grad_bits": 8, "input_size": 28}


def test_the_output_of_training_is_that_of_inference() -> None:
    """`output` is the layer's own estimate."""
    assert BitFusion().training(**TRAINED).output == BitFusion().estimate(**STRIDED)


def test_grad_input_is_a_layer_back_to_the_input() -> None:
    """`grad_input` goes from output to input channels on the grid of the input, gradients as its input."""
    layer = LAYER | {"in_channels": 256, "out_channels": 64, "output_size": 28, "input_bits": 8, "weight_bits": 2}

    step = BitFusion().training(**TRAINED | {"in_channels": 64})

    assert step.grad_input == BitFusion().estimate(**layer)


def test_grad_weight_is_a_linear_layer_over_all_positions() -> None:
    """`grad_weight` sums over samples and positions, once for each of the K*K*I weights of an output channel."""
    linear = {"kernel": 1, "output_size": 1, "stride": 1, "in_channels": 16 * 14**2, "out_channels": 256}
    layer = linear | {"batch": 9 * 256, "input_bits": 4, "weight_bits": 8}

    assert BitFusion().training(**TRAINED).grad_weight == BitFusion().estimate(**layer)


def test_bifurcated_gradients_widen_grad_weight_alone() -> None:
    """`bifurcated_bits` changes the width of grad_output in grad_weight and nothing else."""
    plain, wide = BitFusion().training(**TRAINED), BitFusion().training(**TRAINED, bifurcated_bits=16)

    assert (wide.output, wide.grad_input) == (plain.output, plain.grad_input)
    assert wide.grad_weight == BitFusion().training(**TRAINED | {"grad_bits": 16}).grad_weight


def test_a_first_layer_has_no_grad_input() -> None:
    """The network's input needs no gradient, so a first layer's step is two products."""
    step = BitFusion().training(**TRAINED, first_layer=True)

    assert step.grad_input is None
    assert step.total == step.output + step.grad_weight


def test_a_step_is_the_sum_of_its_products() -> None:
    """`total` of a step has the cycles, bits and energy of the three products together."""
    step = BitFusion().training(**TRAINED)
    assert step.grad_input is not None
    products = [step.output, step.grad_input, step.grad_weight]

    assert step.total.cycles == sum(product.cycles for product in products)
    assert step.total.store("dram").read == sum(product.store("dram").read for product in products)
    assert step.total.energy_nj == pytest.approx(sum(product.energy_nj for product in products), rel=1e-12)


def _published_resnet38(batch: int) -> TrainingEstimate:
    """One training step of ResNet-38 for CIFAR in 8 bits, its shortcuts of 1 x 1 convolutions included."""
    array = BitFusion()
    train = functools.partial(array.training, batch=batch, input_bits=8, weight_bits=8, grad_bits=8)

    def conv(kernel: int, size: int, stride: int, before: int, after: int) -> TrainingEstimate:
        sides = {"output_size": size, "input_size": size * stride, "stride": stride, "first_layer": before == 3}
        return train(kernel=kernel, in_channels=before, out_channels=after, **sides)

    layers = [conv(3, 32, 1, 3, 16), *[conv(3, 32, 1, 16, 16)] * 12]
    for size, before in ((16, 16), (8, 32)):
        layers += [conv(3, size, 2, before, 2 * before), conv(1, size, 2, before, 2 * before)]
        layers += [conv(3, size, 1, 2 * before, 2 * before)] * 11
    return total([*layers, conv(1, 1, 1, 64, 10)])


@pytest.mark.parametrize(("batch", "per_cycle", "picojoule"), [(16, 320, 9.35), (1, 258, 12.2)])
def test_training_costs_what_the_mapping_gave_before(batch: int, per_cycle: float, picojoule: float) -> None:
    """ResNet-38 in 8 bits runs at the speed and energy per multiply-accumulate that this mapping was found to give."""
    step = _published_resnet38(batch)
    macs = 3 * step.output.macs

    assert macs / step.total.cycles == pytest.approx(per_cycle, rel=0.005)
    assert step.total.energy_nj * 1e3 / macs == pytest.approx(picojoule, rel=0.005)


def test_sums_add_every_count() -> None:
    """Two layers together have the sum of each count, and no single loop order."""
    one, two = BitFusion().estimate(**LAYER), BitFusion().estimate(**SMALL)

    both = one + two

    assert both.cycles == one.cycles + two.cycles
    written = [each.store("weight_buffer").written for each in (both, one, two)]
    assert written[0] == written[1] + written[2]
    assert both.macs == one.macs + two.macs
    assert both.loops == ()


def test_a_product_with_a_number_is_that_many_layers() -> None:
    """Three times an estimate counts what three such layers count."""
    one = BitFusion().estimate(**SMALL)

    thrice, summed = one * 3, total([one] * 3)

    assert thrice.cycles == summed.cycles
    assert [(s.read, s.written) for s in thrice.stores] == [(s.read, s.written) for s in summed.stores]
    assert thrice.energy_nj == pytest.approx(summed.energy_nj, rel=1e-12)


def test_a_sum_of_steps_adds_each_product() -> None:
    """Steps add product by product; a first layer adds nothing to grad_input."""
    first, second = BitFusion().training(**TRAINED, first_layer=True), BitFusion().training(**TRAINED)

    both = total([first, second])

    assert both.output == first.output + second.output
    assert both.grad_input == total([second.grad_input])
    assert both.grad_weight == first.grad_weight + second.grad_weight


def test_nothing_cannot_be_summed() -> None:
    """A sum over no estimates is an error that says so."""
    empty: list[Estimate] = []

    with pytest.raises(UsageError, match=r"no estimates were given.*at least one.*estimate a layer first"):
        total(empty)


def test_counts_are_whole_numbers() -> None:
    """Cycles and bits are ints, also in sums: nothing was rounded."""
    both = BitFusion().estimate(**LAYER) + BitFusion().estimate(**SMALL)
    counts = [both.cycles, both.stall_cycles, *(n for store in both.stores for n in (store.read, store.written))]

    assert {type(count) for count in counts} == {int}


def test_loops_cover_the_layer() -> None:
    """Each loop's tiles cover its dimension with less than one tile to spare."""
    loops = {loop.name: loop for loop in BitFusion().estimate(**LAYER).loops}
    wholes = {"batch": 16, "output_row": 14, "output_column": 14, "in_channels": 256, "out_channels": 256}

    assert all(0 <= loops[name].count * loops[name].size - n < loops[name].size for name, n in wholes.items())


def test_an_estimate_is_frozen() -> None:
    """Results are values: cached ones cannot be altered by who receives them."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        BitFusion().estimate(**LAYER).macs = 0


@pytest.mark.parametrize("bits", [0, -1, 65, True, 8.0, None, "8"])
@pytest.mark.parametrize("name", ["input_bits", "weight_bits"])
def test_widths_that_the_array_lacks_are_refused(name: str, bits: object) -> None:
    """A width outside 1 to 64, a bool or no int is an error that names the argument, the range and the way out."""
    with pytest.raises(UsageError, match=f"{name}={bits!r}: the array has widths from 1 to 64 bits; give a whole"):
        BitFusion().estimate(**LAYER | {name: bits})


@pytest.mark.parametrize("name", ["grad_bits", "bifurcated_bits"])
def test_widths_of_gradients_are_checked_by_their_own_name(name: str) -> None:
    """A bad width of gradients is reported under the name it was given by."""
    with pytest.raises(UsageError, match=f"^{name}=65: the array has widths from 1 to 64 bits"):
        BitFusion().training(**TRAINED | {name: 65})


@pytest.mark.parametrize("size", [0, -3, 2.0, True, None])
@pytest.mark.parametrize("name", ["kernel", "output_size", "stride", "in_channels", "out_channels", "batch"])
def test_sizes_that_are_not_positive_are_refused(name: str, size: object) -> None:
    """A size that is no positive int is an error that names it."""
    with pytest.raises(UsageError, match=f"{name}={size!r}: allowed are whole numbers from 1; give a positive int"):
        BitFusion().estimate(**LAYER | {name: size})


def test_the_input_size_of_training_is_checked() -> None:
    """An input of no pixels is refused by its own name."""
    with pytest.raises(UsageError, match=r"^input_size=0: allowed are whole numbers from 1"):
        BitFusion().training(**TRAINED | {"input_size": 0})


def test_first_layer_is_a_flag() -> None:
    """A number in place of the flag is refused."""
    with pytest.raises(UsageError, match="first_layer=1: give True or False"):
        BitFusion().estimate(**LAYER, first_layer=1)


def test_a_layer_that_fits_nowhere_says_what_is_missing() -> None:
    """Where no tile fits the error gives the smallest tile and the room of each buffer, and what to enlarge."""
    needs = r"fits half of each buffer.*weight 4096 of 262144, input 72 of 64, output 1024 of 65536.*larger"

    with pytest.raises(UsageError, match=needs):
        BitFusion(input_bytes=16, energies=GIVEN).estimate(**LAYER)


def test_a_layer_beyond_64_bits_is_refused() -> None:
    """Counts that may pass 64 bits are an error with the largest layer allowed, not a wrapped number."""
    layer = LAYER | {"kernel": 1, "output_size": 1, "in_channels": 10**6, "out_channels": 10**6, "batch": 10**6}

    with pytest.raises(UsageError, match=r"has 1000000000000000000 multiply-accumulates: allowed.*part of the batch"):
        BitFusion().estimate(**layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows=0: allowed are whole numbers from 1"),
        ({"columns": True}, "columns=True: allowed are whole numbers from 1"),
        ({"weight_bytes": 1.5}, "weight_bytes=1.5: allowed are whole numbers from 1"),
        ({"dram_bits_per_cycle": -1}, "dram_bits_per_cycle=-1: allowed are whole numbers from 1"),
        ({"pmax": 32}, "pmax=32: the array has widths from 1 to 16 bits"),
        ({"pmax": 6}, "pmax=6, pmin=2: both are powers of two up to 16.*choose such a pair"),
        ({"pmax": 2, "pmin": 4}, "pmax=2, pmin=4: both are powers of two.*pmin is at most pmax"),
        ({"frequency": 0}, "frequency=0: allowed are finite numbers above 0; give cycles per second"),
        ({"frequency": math.nan}, "frequency=nan: allowed are finite numbers above 0"),
        ({"frequency": "500"}, "frequency='500': allowed are finite numbers above 0"),
        ({"energies": 0.015}, "energies=0.015: allowed is an Energies; give"),
        ({"snap_bits": 1}, "snap_bits=1: give True or False"),
    ],
)
def test_an_impossible_array_is_refused(change: dict[str, Any], message: str) -> None:
    """An array checks itself and says which setting is wrong."""
    with pytest.raises(UsageError, match=message):
        BitFusion(**change)


@pytest.mark.parametrize("cost", [-1.0, math.inf, math.nan, True, "1"])
def test_an_impossible_energy_is_refused(cost: Any) -> None:
    """A cost is a finite number and not negative."""
    with pytest.raises(UsageError, match=f"energies: dram={cost!r}: allowed are finite numbers from 0; give a cost"):
        Energies(dram=cost)


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_a_part_of_an_estimate_is_refused(times: Any) -> None:
    """An estimate is multiplied by a positive whole number only, so that counts stay counts."""
    estimate = BitFusion().estimate(**LAYER)

    with pytest.raises(UsageError, match=f"times={times}: give a whole number of at least 1"):
        estimate * times


@pytest.mark.parametrize("kind", [BitFusion, Energies, Estimate, Loop, Store, TrainingEstimate])
def test_settings_and_results_are_frozen_values(kind: type) -> None:
    """Every public class is a frozen dataclass."""
    assert kind.__dataclass_params__.frozen
