"""Accelerators by name and from files, their estimates, and the sizes that energies belong to."""

import dataclasses
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from helpers import ORACLES
from lowbit.errors import UsageError
from lowbit.evidence.records import PRODUCTS, Product
from lowbit.hardware import ACCELERATORS, Accelerator, BitFusion, Energies, Estimate, Store, accelerator, as_matrix
from lowbit.hardware.energies import BUFFERS, Bank

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_accelerator.py"
LAYER: dict[str, Any] = {
    **{"kernel": 3, "output_size": 14, "stride": 1, "in_channels": 64, "out_channels": 64, "batch": 4},
    **{"input_bits": 8, "weight_bits": 8},
}


def estimate(*stores: str, **changes: Any) -> Estimate:
    """An estimate with these stores."""
    values: dict[str, Any] = {"macs": 6, "compute_cycles": 3, "stall_cycles": 1, "memory_cycles": 2, "seconds": 0.5}
    each = tuple(Store(name=name, read=1, written=2, energy_nj=0.25) for name in stores)
    return Estimate(**values | {"core_nj": 1.5, "stores": each} | changes)


SRAM = Energies(input_read=1.0, input_write=1.0, output_read=1.0, output_write=1.0)  # stands for what a user gives

# Estimates


def test_energy_is_that_of_the_units_and_of_every_store() -> None:
    """Nothing is left out, however the stores are called."""
    assert estimate("sram", "cache", "hbm").energy_nj == 1.5 + 3 * 0.25


def test_the_last_store_is_the_memory_outside() -> None:
    """Arithmetic intensity is for each bit of the last store, and without bits there it has no end."""
    silent = Store(name="hbm", read=0, written=0, energy_nj=0)

    assert estimate("sram", "hbm").operations_per_memory_bit == 6 / 3
    assert estimate(stores=(silent,)).operations_per_memory_bit == math.inf


def test_estimates_of_different_accelerators_do_not_add_up() -> None:
    """A sum needs the same stores on both sides, and the message names them."""
    with pytest.raises(UsageError, match=r"stores sram, dram and sram, hbm.*one accelerator"):
        estimate("sram", "dram") + estimate("sram", "hbm")


def test_an_unknown_store_is_named() -> None:
    """Asking for a store that is not there names those that are."""
    with pytest.raises(UsageError, match=r"unknown store 'dran'.*'dram'.*sram"):
        estimate("sram", "dram").store("dran")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs": 0}, "macs=0"),
        ({"compute_cycles": 0}, "compute_cycles=0"),
        ({"stall_cycles": -1}, "stall_cycles=-1"),
        ({"compute_cycles": 1.5}, "compute_cycles=1.5"),
        ({"seconds": math.nan}, "seconds=nan"),
        ({"core_nj": -1.0}, "core_nj=-1.0"),
        ({"stores": ()}, "stores=.*one or more"),
        ({"stores": (Store(name="a", read=0, written=0, energy_nj=0),) * 2}, "stores=a, a: give one or more, each"),
    ],
)
def test_an_impossible_estimate_is_refused(changes: dict[str, Any], message: str) -> None:
    """An accelerator's mistake is found where it is made."""
    with pytest.raises(UsageError, match=message):
        estimate("dram", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read": -1}, "dram: read=-1"),
        ({"energy_nj": math.inf}, "dram: energy_nj=inf"),
        ({"name": "a b"}, "name='a b'"),
        ({"name": "core"}, "name='core'.*'core' and 'energy' are taken"),
    ],
)
def test_an_impossible_store_is_refused(changes: dict[str, Any], message: str) -> None:
    """Counts and energies are not negative, and a name can be a column."""
    with pytest.raises(UsageError, match=message):
        Store(**{"name": "dram", "read": 1, "written": 1, "energy_nj": 1.0} | changes)


# Matrix products


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_linear_layer_as_a_matrix_product(name: str) -> None:
    """5 rows, 8 summed, 7 columns: each product has its own order of them and of the widths."""
    shapes: dict[str, Any] = {"input": (5, 8), "weight": (7, 8), "output": (5, 7), "macs": 280}
    product = Product(layer="a", product=name, kind="linear", engine="e", bits=(3, 4), **shapes)

    found = as_matrix(product)

    expected = {"output": (5, 8, 7, 3, 4), "grad_input": (5, 7, 8, 3, 4), "grad_weight": (8, 5, 7, 4, 3)}
    assert dataclasses.astuple(found) == (*expected[name], 1)
    assert found.macs == 280


# Energies and sizes


def test_buffers_of_another_size_have_the_published_energy_of_that_size() -> None:
    """An input buffer twice as large has banks of 4096 bytes: 0.00342953 nJ to read 32 bits, 1.8 times as much."""
    costs = BitFusion(input_bytes=65536).costs

    assert costs["input_read"] == 0.00342953 / 32
    assert costs["input_read"] / BitFusion().costs["input_read"] == pytest.approx(1.802, abs=1e-3)
    assert costs["weight_read"] == BitFusion().costs["weight_read"]


def test_a_larger_buffer_costs_more_for_each_access() -> None:
    """In every row of the published table, reading and writing cost more than in a smaller bank with as many ports."""
    for name, sizes in (("input", (128, 1024, 2048, 4096, 8192, 16384)), ("output", (512, 4096))):
        each = [Bank(buffer=name, total=size, banks=1, line_bits=32).published() for size in sizes]

        assert None not in each
        assert each == sorted(each)
        assert len(set(each)) == len(sizes)


@pytest.mark.parametrize("name", BUFFERS)
def test_a_size_without_published_energy_is_refused(name: str) -> None:
    """The message has the size of the bank, the energies to give and the sizes that need none."""
    size = getattr(BitFusion(), f"{name}_bytes")

    with pytest.raises(
        UsageError, match=rf"{name}_bytes={3 * size} makes .*energies.{name}_read and .*{name}_write.*{size}"
    ):
        BitFusion(**{f"{name}_bytes": 3 * size})


def test_another_array_makes_other_banks() -> None:
    """Twice the rows halve the banks of an unchanged buffer, so its energy must be given; twice the bytes keep it."""
    with pytest.raises(UsageError, match=r"weight_bytes=65536 makes 1024 banks of 64 bytes"):
        BitFusion(rows=32)

    assert BitFusion(rows=32, weight_bytes=131072, input_bytes=65536).costs == BitFusion().costs


@pytest.mark.parametrize(
    ("rows", "columns", "power"), [(1, 1, 279960), (8, 2, 3711700), (4, 4, 3673500), (1, 16, 4049800)]
)
def test_small_arrays_have_the_power_of_their_own_synthesis(rows: int, columns: int, power: int) -> None:
    """An array of the authors' table costs in each cycle of 500 MHz what its own row says, in nW."""
    array = BitFusion(rows=rows, columns=columns, weight_bytes=128 * rows * columns, energies=SRAM)

    assert array.core_nj == pytest.approx(power / 500e6, rel=1e-12)


def test_larger_arrays_take_a_share_of_four_by_four() -> None:
    """Each unit of an array that the table lacks, e.g. of 2 x 16 units, costs what one of 4 x 4 units does."""
    array = BitFusion(rows=2, columns=16, weight_bytes=128 * 32, energies=SRAM)

    assert array.costs["core"] == BitFusion().costs["core"] == 3673500 / 16 / 500e6


@pytest.mark.parametrize(("pmax", "pmin"), [(4, 2), (16, 2), (8, 4)])
def test_other_fusion_units_need_their_energies(pmax: int, pmin: int) -> None:
    """Units of other widths have neither the published core nor the published lines of the buffers."""
    with pytest.raises(UsageError, match=r"give energies\.core.*energies\.weight_read.*energies\.input_read"):
        BitFusion(pmax=pmax, pmin=pmin)


def test_given_energies_are_taken_for_any_size() -> None:
    """Reading and writing given, a size without published figures is accepted and costs what was given."""
    given = Energies(weight_read=2.0, weight_write=3.0)
    array = BitFusion(weight_bytes=131072, energies=given)

    buffer = array.estimate(**LAYER).store("weight_buffer")
    assert buffer.energy_nj == buffer.read * 2.0 + buffer.written * 3.0
    with pytest.raises(UsageError, match=r"energies\.weight_write"):
        BitFusion(weight_bytes=131072, energies=dataclasses.replace(given, weight_write=None))


def test_the_default_sizes_have_the_energies_that_the_simulator_prints() -> None:
    """Looking figures up by the size of a bank gives, bit for bit, what the authors' simulator prints."""
    path = ORACLES / "dynamic" / "bitfusion_config.json"
    if not path.exists():
        pytest.skip(f"the reference vectors {path} are not here")
    printed = json.loads(path.read_text())["energy_nJ"]

    assert list(BitFusion().costs.values())[1:] == list(printed.values())[1:]


# Names and files


def test_names_are_accelerators() -> None:
    """Every name of the table gives an accelerator with its defaults."""
    assert accelerator("bitfusion") == BitFusion()
    assert all(isinstance(accelerator(name), Accelerator) for name in ACCELERATORS)


def test_settings_are_the_fields() -> None:
    """Each field is a setting, those of the energies too, without a list of them anywhere."""
    given = ["rows=32", "weight_bytes=131072", "input_bytes=65536", "frequency=1e9", "energies.dram=0.006"]

    assert accelerator("bitfusion", [*given, "snap_bits=true"]) == BitFusion(
        rows=32,
        weight_bytes=131072,
        input_bytes=65536,
        frequency=1e9,
        energies=Energies(dram=0.006),
        snap_bits=True,
    )


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from lowbit.errors import UsageError

@dataclass(frozen=True)
class Mine:
    rows: int = 4
    def product(self, product, *, first_layer=False):
        return self.rows

class NoProduct:
    pass

class OtherProduct:
    def product(self, matrix):
        return 0

class Raises:
    def __init__(self):
        raise ValueError("out of order")
    def product(self, product, *, first_layer=False):
        return 0

class Exits(Raises):
    def __init__(self):
        raise SystemExit(3)

class Refuses(Raises):
    def __init__(self):
        raise UsageError("rows must be even")

@dataclass
class Needs:
    rows: int
    def product(self, product, *, first_layer=False):
        return 0
"""


def test_a_class_of_a_file(tmp_path: Path) -> None:
    """``FILE.py:CLASS`` makes an object of that class, with the settings given."""
    (tmp_path / "mine.py").write_text(FILE)

    made: Any = accelerator(f"{tmp_path / 'mine.py'}:Mine", ["rows=16"])

    assert type(made).__name__ == "Mine"
    assert made.rows == 16


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("Mime", [], r"unknown class of .*mine\.py 'Mime'.*'Mine'\?.*NoProduct"),
        ("NoProduct", [], r"NoProduct is not an accelerator.*lacks a method product\(self, product"),
        ("OtherProduct", [], r"product of .*OtherProduct cannot be called.*first_layer.*write product\(self"),
        ("Raises", [], r"constructor of .*:Raises raises ValueError: out of order \(line 21\)"),
        ("Exits", [], r"constructor of .*:Exits raises SystemExit: 3 \(line 27\)"),
        ("Refuses", [], r"^rows must be even$"),
        ("Raises", ["rows=3"], r"Raises has no settings: make it a dataclass"),
        ("Needs", [], r"Needs needs rows: give each as NAME=VALUE"),
        ("Mine", ["columns=3"], r"unknown setting of Mine 'columns'.*Known: rows"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(tmp_path: Path, name: str, given: list[str], message: str) -> None:
    """Each mistake in a file has its own message."""
    (tmp_path / "mine.py").write_text(FILE)

    with pytest.raises(UsageError, match=message):
        accelerator(f"{tmp_path / 'mine.py'}:{name}", given)


@pytest.mark.parametrize(("name", "message"), [("tpu", r"unknown hardware 'tpu'.*bitfusion.*FILE\.py:CLASS")])
def test_an_unknown_name_is_refused(name: str, message: str) -> None:
    """A name of no table names those there are, and the form of a file's class."""
    with pytest.raises(UsageError, match=message):
        accelerator(name)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The example prints the costs of its own stores, with energies that BitFusion's authors published."""
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    assert re.search(r"^Systolic .* buffer J +dram J", capsys.readouterr().out, re.MULTILINE)


def test_the_example_has_no_energies_of_its_own() -> None:
    """Energies are the user's to give, and the message names them."""
    with pytest.raises(UsageError, match=r"Systolic needs mac_nj, buffer_nj, dram_nj: give each as NAME=VALUE"):
        accelerator(f"{EXAMPLE}:Systolic", ["rows=64"])
