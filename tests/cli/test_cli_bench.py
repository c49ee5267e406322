"""``lowbit bench``: its flags, and what it prints."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.cli import main as cli
from lowbit.cli.bench import threads_of_torch
from lowbit.conversion import calibration
from lowbit.conversion.calibration import Shape
from lowbit.engines import int8
from lowbit.train import bench
from lowbit.train.bench import timing

needs_units = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")), reason="this machine has no choice of engines"
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A work that takes a moment."""
    for module in (bench, timing):
        monkeypatch.setattr(
            module, "WORKS", {"tiny": lambda: bench.Work(nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,)))}
        )


def test_threads_hold_for_the_command_only() -> None:
    """Figures are of the asked number of threads, and the process has its own again afterwards."""
    before = torch.get_num_threads()

    with threads_of_torch(before + 1):
        inside = torch.get_num_threads()

    assert (inside, torch.get_num_threads()) == (before + 1, before)


@pytest.mark.usefixtures("tiny")
def test_steps_are_printed_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """The first line has the versions and the threads, the table the work."""
    code = cli.main(["bench", "--works", "tiny", "--variants", "fp32", "--rounds", "1", "--threads", "1"])

    printed = capsys.readouterr().out.splitlines()
    assert code == 0
    assert printed[0].startswith("lowbit 0.1.0, torch ")
    assert printed[0].endswith(", 1 thread")
    assert printed[-1].startswith("tiny  fp32")


def test_compile_adds_its_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--compile`` times the compiled forms beside those that were asked for, and without it none."""
    asked: list[list[str]] = []
    monkeypatch.setattr(bench, "steps", lambda *given: asked.append(given[1]) or [])

    assert cli.main(["bench", "--variants", "fp32", "--compile"]) == 0
    assert cli.main(["bench"]) == 0

    assert asked == [["fp32", *bench.COMPILED], list(bench.VARIANTS)]


def test_kernels_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``--kernels`` prints the table of passes."""
    monkeypatch.setattr(bench.kernels, "__defaults__", (64,))
    monkeypatch.setitem(sys.modules, "qtorch.quant", None)  # it builds itself at import

    code = cli.main(["bench", "--kernels", "--rounds", "1"])

    assert code == 0
    assert "torch.clone" in capsys.readouterr().out


@needs_units
def test_calibrate_keeps_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """``--calibrate`` prints the table and where it is; `auto` goes by it."""
    grid = tuple((Shape(kind=kind, inputs=4, outputs=4), 2) for kind in ("linear", "conv"))
    monkeypatch.setattr(calibration.measure, "__defaults__", (grid, 1))

    code = cli.main(["bench", "--calibrate", "--rounds", "1"])

    printed = capsys.readouterr().out
    assert code == 0
    assert "linear 4 to 4" in printed
    assert f"kept in {calibration.path()}" in printed
    assert calibration.path().is_relative_to(tmp_path)
    assert "times of this machine" in str(lowbit.convert_(nn.Linear(4, 4), "int8"))


def test_calibrate_without_a_choice_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one engine has nothing to measure: exit code 1, no file."""
    monkeypatch.setattr(int8, "missing", lambda unit: f"no {unit} units")

    code = cli.main(["bench", "--calibrate"])

    assert code == 1
    assert "no int8 units" in capsys.readouterr().err
    assert not calibration.path().exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernels", "--calibrate"], "give either"),
        (
            ["--kernels", "--device", "cuda"],
            "--device choose what training steps to time",
        ),
        (["--kernels", "--works", "tiny"], "--works choose what training steps to time, and --kernels times none"),
        (["--calibrate", "--variants", "fp32", "--compile"], "--variants, --compile choose"),
        (["--threads", "0"], "--threads must be 1 to 1024, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--kernels", "--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No flag is ignored: one that has no meaning with another is an error with exit code 2."""
    code = cli.main(["bench", *flags])

    assert code == 2
    assert message in capsys.readouterr().err


class TestModel:
    """``lowbit bench --model``: advice for one model."""

    def test_a_model_of_ones_own_is_timed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A class of a file gets random images, and the advice is printed."""
        source = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        source += "        super().__init__(nn.Flatten(), nn.Linear(48, 10))\n"
        (tmp_path / "net.py").write_text(source)

        code = cli.main(
            [
                "bench",
                "--model",
                f"{tmp_path}/net.py:Net",
                "--input",
                "3,4,4",
                "--batch-size",
                "2",
                "--recipes",
                "int8",
                "--threads",
                "1",
            ]
        )

        assert code == 0
        out = capsys.readouterr().out
        assert "fastest here:" in out
        assert "int8 in bf16 autocast" in out
        assert "sbm8" not in out

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--model", "mlp"], "--model needs --input"),
            (["--model", "mlp", "--input", "x,3,4"], "--input must be C,H,W"),
            (["--model", "mlp", "--input", "8,3,4,4"], "give --input 3,4,4 --batch-size 8"),
            (["--input", "3,4,4"], "--input describe a model of your own: give --model"),
            (["--model", "mlp", "--input", "3,4,4", "--rounds", "3"], "--rounds belong to others"),
            (["--model", "mlp", "--input", "3,4,4", "--kernels"], "--kernels belong to others"),
        ],
    )
    def test_flags_that_do_not_fit_are_refused(
        self, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Each message names the flag and what to give."""
        assert cli.main(["bench", *flags]) == 2
        assert words in capsys.readouterr().err
