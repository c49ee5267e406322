"""``lowbit inspect``, without and with ``--probe``."""

from pathlib import Path

import pytest
from small_run import train

from lowbit.cli import main as cli


def test_inspect_reports_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``inspect`` prints the conversion's report and writes nothing."""
    monkeypatch.chdir(tmp_path)

    code = cli.main(["inspect", "--model", "resnet20", "--recipe", "sbm8", "--input", "1,8,8"])

    assert code == 0
    assert "stem.0" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [["--model", "gpt", "--input", "64"], ["--model", "mlp", "--data", "digits"], ["--model", "resnet20"]],
)
def test_inspect_takes_a_shape_a_data_set_or_neither(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The input of the model comes from a shape, from a data set, or is a small colour image."""
    code = cli.main(["inspect", *flags])

    assert code == 0
    assert "head" in capsys.readouterr().out


def test_probe_of_a_run_suggests_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``inspect --probe`` prints errors, sensitivities and, with a budget, bits for each layer."""
    train(tmp_path / "run")
    capsys.readouterr()

    code = cli.main(["inspect", "--probe", "--run", str(tmp_path / "run"), "--widths", "2,4", "--budget", "0.6"])

    printed = capsys.readouterr().out
    assert code == 0
    assert all(part in printed for part in ("SQNR dB", "underflow %", "b=2", "of the present bit operations"))


def test_probe_of_fresh_weights_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run the weights are fresh, which the first line says."""
    flags = ["--batches", "1", "--batch-size", "8", "--widths", "4"]
    code = cli.main(["inspect", "--probe", "--model", "mlp", "--data", "digits", *flags])

    assert code == 0
    assert "fresh weights" in capsys.readouterr().out.splitlines()[0]
