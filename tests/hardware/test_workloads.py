import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lowbit
from lowbit import Ledger, UsageError
from lowbit.hardware import scale_sim, zigzag


def network() -> nn.Module:
    """A strided and a grouped convolution, and a linear layer, all converted."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
    )
    lowbit.convert_(model, "int8", engine="reference")
    return model


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """A step of the network on two images of 8 x 8."""
    return lowbit.plan(network(), torch.zeros(2, 3, 8, 8), steps=1)


def macs(ledger: Ledger) -> int:
    """Multiply-accumulates of the last step."""
    return sum(total.macs for total in ledger.last_step())


def test_zigzag_has_every_multiplication(ledger: Ledger) -> None:
    """The loops of all layers together are the multiply-accumulates of the step."""
    layers = yaml.safe_load(zigzag(ledger))

    assert sum(math.prod(layer["loop_sizes"]) for layer in layers) == macs(ledger)
    assert [layer["operator_type"] for layer in layers].count("Conv") == 2


def test_zigzag_keeps_the_loops_of_a_convolution(ledger: Ledger) -> None:
    """Stride and padding of a convolution, its groups, and its widths are those of the layer."""
    strided, grouped = [layer for layer in yaml.safe_load(zigzag(ledger)) if layer["operator_type"] == "Conv"]

    assert strided["name"] == "0.output"
    assert strided["dimension_relations"] == ["iy=2*oy+1*fy", "ix=2*ox+1*fx"]
    assert dict(zip(strided["loop_dims"], strided["loop_sizes"], strict=True)) == {
        **{"B": 2, "K": 8, "C": 3, "OY": 4, "OX": 4, "FY": 3, "FX": 3}
    }
    assert strided["padding"] == [[0, 1], [0, 1]]
    assert grouped["padding"] == [[1, 1], [1, 1]]
    assert grouped["loop_sizes"][:4] == [4, 2, 2, 2]
    assert grouped["operand_precision"] == {"I": 8, "W": 8, "O": 16, "O_final": 16}


def test_other_widths_are_those_of_the_workload(ledger: Ledger) -> None:
    """`Ledger.at` changes the widths of operands and nothing else."""
    wide, narrow = (yaml.safe_load(zigzag(led, sum_bits=24)) for led in (ledger, ledger.at("w4a3g6")))

    for old, new in zip(wide, narrow, strict=True):
        left, right = {"output": (3, 4), "grad_input": (6, 4), "grad_weight": (3, 6)}[new["name"].rpartition(".")[2]]
        assert new["operand_precision"] == {"I": left, "W": right, "O": 24, "O_final": 24}
        assert {**old, "operand_precision": {}} == {**new, "operand_precision": {}}


def test_scale_sim_has_every_multiplication(ledger: Ledger) -> None:
    """Rows, columns and sums of all lines, times what a name ends in, are the multiply-accumulates of the step."""
    header, *lines = scale_sim(ledger).splitlines()
    found = 0
    for line in lines:
        name, *sizes = line.removesuffix(",").split(", ")
        found += math.prod(map(int, sizes)) * int(name.partition("_x")[2] or 1)

    assert header == "Layer, M, N, K,"
    assert any("_x4," in line for line in lines)
    assert found == macs(ledger)


def test_a_layer_that_runs_twice_is_there_twice() -> None:
    """A layer that two places of the model share has two of each product."""
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    lowbit.convert_(model, "int8", engine="reference")
    once = lowbit.plan(model, torch.zeros(4, 16), steps=3)

    layers = yaml.safe_load(zigzag(once))

    assert [layer["name"] for layer in layers].count("0.output") == 2
    assert [layer["id"] for layer in layers] == list(range(len(layers)))


@pytest.mark.parametrize("write", [zigzag, scale_sim])
def test_a_ledger_without_steps_is_refused(write: Any) -> None:
    """There is no last step to write."""
    with pytest.raises(UsageError, match="no step"):
        write(Ledger())


def test_a_comma_in_a_name_ends_no_field() -> None:
    """SCALE-Sim splits lines at commas."""
    model = nn.Sequential(OrderedDict({"a,b": nn.Linear(4, 4)}))
    lowbit.convert_(model, "int8", engine="reference")
    text = scale_sim(lowbit.plan(model, torch.zeros(2, 4), steps=1))

    assert "a_b.output, 2, 4, 4," in text


def test_zigzag_itself_reads_it(ledger: Ledger) -> None:
    """ZigZag's validator takes the workload, and its layers count the same multiply-accumulates."""
    validator = pytest.importorskip("zigzag.parser.workload_validator", reason="zigzag-dse is not installed")
    from zigzag.parser.workload_factory import LayerNodeFactory

    checked = validator.WorkloadValidator(yaml.safe_load(zigzag(ledger)))
    assert checked.validate()
    mapping = [{"name": "default", "spatial_mapping": None, "memory_operand_links": {"O": "O", "W": "I2", "I": "I1"}}]
    mapping[0] |= {"spatial_mapping_hint": None, "temporal_ordering": None}

    nodes = [LayerNodeFactory(layer, mapping).create() for layer in checked.normalized_data]

    assert sum(node.total_mac_count for node in nodes) == macs(ledger)
    assert sum(node.type == "Conv" for node in nodes) == 2


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # theirs
def test_scale_sim_itself_reads_it(ledger: Ledger, tmp_path: Path) -> None:
    """SCALE-Sim's parser takes the topology, and counts the same multiply-accumulates in each line."""
    utilities = pytest.importorskip("scalesim.topology_utils", reason="scalesim is not installed")
    (tmp_path / "step.csv").write_text(scale_sim(ledger))
    topology = utilities.topologies()

    topology.load_arrays(str(tmp_path / "step.csv"), mnk_inputs=True)
    topology.topo_calc_hyperparams()

    lines = scale_sim(ledger).splitlines()[1:]
    expected = [math.prod(map(int, line.removesuffix(",").split(", ")[1:])) for line in lines]
    assert [layer[2] for layer in topology.layers_calculated_hyperparams] == expected
