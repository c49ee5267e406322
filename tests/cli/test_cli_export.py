"""``lowbit export``, and ``lowbit cost`` for hardware designers."""

import json
from pathlib import Path

import pytest
import torch
from small_run import train

from lowbit.cli import main as cli
from lowbit.train import models
from lowbit.train.data import Task


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps in `sbm8`."""
    out = tmp_path_factory.mktemp("runs") / "a"
    assert train(out, "--recipe", "sbm8") == 0
    return out


def test_plain_parameters_load_into_the_plain_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--to plain -o FILE.pt`` writes what the plain model loads, without its conversion."""
    assert cli.main(["export", str(run), "--to", "plain", "-o", str(run / "m.pt")]) == 0
    model = models.build("mlp", Task(kind="image", shape=(1, 8, 8), classes=10))

    model.load_state_dict(torch.load(run / "m.pt", weights_only=True))

    assert f"{run / 'm.pt'}: {len(model.state_dict())} tensors" in capsys.readouterr().out


def test_an_onnx_file_says_what_was_checked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--to onnx`` writes model.onnx into the run folder and says how many codes were equal."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    assert cli.main(["export", str(run), "--to", "onnx"]) == 0

    assert (run / "model.onnx").is_file()
    assert "codes in onnxruntime equal lowbit's" in capsys.readouterr().out


def test_codes_take_a_quarter(run: Path) -> None:
    """``--to torch-int8`` writes about a quarter of the bytes of ``--to plain``."""
    for form in ("plain", "torch-int8"):
        assert cli.main(["export", str(run), "--to", form, "-o", str(run / f"{form}.pt")]) == 0

    sizes = [(run / f"{form}.pt").stat().st_size for form in ("torch-int8", "plain")]
    assert 0.2 < sizes[0] / sizes[1] < 0.35


def test_wrong_requests_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no run, a form that does not exist, a folder as the file, and one sample."""
    for argv in (
        [str(tmp_path), "--to", "plain"],
        [str(run), "--to", "x"],
        [str(run), "--to", "plain", "-o", str(tmp_path)],
        [str(run), "--to", "onnx", "--samples", "1"],
    ):
        assert cli.main(["export", *argv]) == 2
        assert capsys.readouterr().err.startswith("lowbit: error: ")


def test_a_run_is_costed_at_other_widths(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``cost RUN --at w4a4g4`` has a quarter of the bit operations of 8 bits, and says so."""

    def operations(*flags: str) -> float:
        assert cli.main(["cost", str(run), "--format", "json", *flags]) == 0
        metrics = {metric["name"]: metric for metric in json.loads(capsys.readouterr().out)["metrics"]}
        return float(metrics["GBitOPs"]["whole_run"]["as-ran"]["total"])

    assert operations("--at", "w4a4g4") == operations("--at", "w8a8g8") / 4
    assert operations("--at", "w8a8g8") < operations()
    assert cli.main(["cost", str(run), "--at", "w4a4g4"]) == 0
    assert "costed at w4a4g4, not at the widths that ran" in capsys.readouterr().out


@pytest.mark.parametrize(("form", "begins"), [("zigzag", "- id: 0\n"), ("scale-sim", "Layer, M, N, K,\n")])
def test_a_run_is_written_for_simulators(run: Path, capsys: pytest.CaptureFixture[str], form: str, begins: str) -> None:
    """``cost RUN --format zigzag`` prints the last step as a workload."""
    assert cli.main(["cost", str(run), "--format", form]) == 0

    assert capsys.readouterr().out.startswith(begins)
