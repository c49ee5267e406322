"""``lowbit cost`` of planned runs and of runs that ran."""

import json
import re
from pathlib import Path

import pytest
from small_run import train

from lowbit.cli import main as cli


def test_cost_of_a_planned_run(capsys: pytest.CaptureFixture[str]) -> None:
    """``cost --model`` prints the layers, the metrics and the array's cycles without training."""
    flags = ["--forward", "3-8x2", "--backward", "8", "--steps", "20", "--batch-size", "2", "--input", "1,8,8"]
    code = cli.main(["cost", "--model", "resnet20", "--recipe", "w8a8g8", *flags, "--hardware", "bitfusion"])

    printed = capsys.readouterr()
    assert code == 0
    assert printed.err == ""
    assert "resnet20: 20 steps, 40 samples" in printed.out
    assert "3..8x3..8" in printed.out
    assert "GBitOPs" in printed.out
    assert "Mcycles" in printed.out


def test_snapped_bits_cost_more_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    """``--set snap_bits=true`` moves 4 bits where 3 were, so DRAM takes more energy."""

    def dram(*flags: str) -> float:
        run = ["cost", "--model", "mlp", "--recipe", "w3a3g8", "--hardware", "bitfusion", "--format", "json"]
        cli.main([*run, *flags])
        energy: float = json.loads(capsys.readouterr().out)["hardware"]["output"]["dram_nj"]
        return energy

    assert dram("--set", "snap_bits=true") > dram()


def test_an_accelerator_of_a_users_file(capsys: pytest.CaptureFixture[str]) -> None:
    """``--hardware FILE.py:CLASS`` estimates on that class, and ``--set`` changes its fields."""
    example = Path(__file__).resolve().parents[2] / "examples" / "own_accelerator.py"
    energies = [flag for name in ("mac_nj", "buffer_nj", "dram_nj") for flag in ("--set", f"{name}=1")]

    def cycles(*flags: str) -> int:
        run = ["cost", "--model", "mlp", "--recipe", "int8", "--hardware", f"{example}:Systolic", "--format", "json"]
        assert cli.main([*run, *energies, *flags]) == 0
        total = json.loads(capsys.readouterr().out)["hardware"]["total"]
        assert {"buffer_nj", "dram_nj"} <= set(total)
        return int(total["cycles"])

    assert cycles("--set", "rows=4", "--set", "columns=4") > 2 * cycles()


def test_cost_of_a_run_that_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``cost RUN`` prints what its ledger has, with seconds and energy; in JSON the same as data."""
    train(tmp_path / "run")
    capsys.readouterr()

    codes = [cli.main(["cost", str(tmp_path / "run")])]
    text = capsys.readouterr().out
    codes.append(cli.main(["cost", str(tmp_path / "run" / "ledger.jsonl"), "--format", "json"]))
    data = json.loads(capsys.readouterr().out)
    codes.append(cli.main(["cost", str(tmp_path / "run"), "--format", "csv"]))
    rows = capsys.readouterr().out.splitlines()

    assert codes == [0, 0, 0]
    assert "mlp: 10 steps, 640 samples" in text
    assert "seconds per step:" in text
    assert "energy:" in text
    assert (data["steps"], data["samples"]) == (10, 640)
    assert len(rows) == 1 + len(data["layers"])


def test_the_plan_of_a_run_is_its_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run costs what was planned, layer by layer."""
    train(tmp_path / "run", "--engine", "reference")  # a plan is one of the reference engine
    capsys.readouterr()
    plan = ["--model", "mlp", "--input", "1,8,8", "--classes", "10", "--batch-size", "64", "--steps", "10"]

    layers = []
    for argv in (["cost", str(tmp_path / "run")], ["cost", *plan]):
        cli.main([*argv, "--format", "json"])
        layers.append(json.loads(capsys.readouterr().out)["layers"])

    assert layers[0] == layers[1]


def test_cost_of_phases_and_of_skipped_products(capsys: pytest.CaptureFixture[str]) -> None:
    """``cost`` plans 9 steps at 4 bits and 1 at 8, and half of the products of `grad_weight`."""

    def operations(recipe: str, product: str) -> int:
        run = ["cost", "--model", "mlp", "--recipe", recipe, "--steps", "10", "--input", "1,8,8", "--format", "json"]
        assert cli.main(run) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        counted = next(row for row in metrics if row["name"] == "GBitOPs")
        return round(counted["whole_run"]["as-ran"][product] * 1e9)

    assert operations("heal", "output") * 10 == operations("mxfp4", "output") * 9 + operations("mxfp8", "output")
    assert operations("sparse", "grad_weight") * 2 == operations("int8", "grad_weight")
    assert operations("sparse", "output") == operations("int8", "output")


# MACs of a product in the layers of `mlp` for 64 inputs and 10 classes. The last layer is left at 32 bits by the
# recipes below, and the first one has no `grad_input`.
FIRST, HIDDEN, LAST = 64 * 256, 2 * 256 * 256, 256 * 10
STATIC = 64 * (2 * FIRST + 3 * HIDDEN) + 1024 * 3 * LAST
FULL = 1024 * (2 * FIRST + 3 * HIDDEN + 3 * LAST)
# Four stages of 3x3 6, 4x4 6, 6x6 8 and 8x8 8 bits: b b, b g and b g bit operations in the three products.
STAGES = ((3, 6), (4, 6), (6, 8), (8, 8))
PFQ = sum((b * b + b * g) * FIRST + (b * b + 2 * b * g) * HIDDEN for b, g in STAGES) / 4 + 1024 * 3 * LAST


@pytest.mark.parametrize(("recipe", "operations"), [("w8a8g8", STATIC), ("pfq", PFQ)])
def test_what_a_plan_saves(recipe: str, operations: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Savings are against all converted products at 8 bits, and against all at 32, also where a run decides."""
    run = ["cost", "--model", "mlp", "--recipe", recipe, "--steps", "8", "--input", "1,8,8", "--format", "json"]

    assert cli.main(run) == 0

    saved = json.loads(capsys.readouterr().out)["saved_percent"]
    assert saved["static 8 bits"] == pytest.approx(100 * (1 - operations / STATIC))
    assert saved["fp32"] == pytest.approx(100 * (1 - operations / FULL))


def test_gates_of_a_model_of_ones_own_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan does not guess which blocks of a file's class have gates."""
    source = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
    source += "        super().__init__(nn.Flatten(), nn.Linear(48, 10))\n"
    (tmp_path / "net.py").write_text(source)

    code = cli.main(["cost", "--model", f"{tmp_path}/net.py:Net", "--recipe", "dfq", "--input", "3,4,4"])

    assert code == 2
    assert "give --forward" in capsys.readouterr().err


def test_gates_are_planned_at_their_target(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line of `cost` counts 3 % of full precision in the gated blocks of dfq, and a note says so."""
    assert cli.main(["cost", "--model", "resnet20", "--recipe", "dfq", "--input", "1,8,8"]) == 0

    *_, note, last = capsys.readouterr().out.splitlines()
    assert "assumed in the last line" in note
    percents = [float(number) for number in re.findall(r"([0-9.]+) % saved", last)]
    # Less than in the blocks alone, where 3 % of 1024 are 30.72 bit operations of 64.
    assert 30 < percents[0] < 100 * (1 - 30.72 / 64)
    assert 90 < percents[1] < 97
