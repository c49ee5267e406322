"""The command line: what it refuses, in which words, and its exit codes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import train

from lowbit.cli import main as cli
from lowbit.cli import recipes
from lowbit.errors import RunError, UsageError


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    """``--version`` prints the installed version and succeeds."""
    code = cli.main(["--version"])

    assert code == 0
    assert capsys.readouterr().out == "lowbit 0.1.0\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` succeeds and names every command."""
    code = cli.main(["--help"])

    printed = capsys.readouterr().out

    assert code == 0
    assert all(command in printed for command in ("train", "resume", "inspect", "cost", "bench", "recipes"))


def test_light_commands_do_not_import_lightning() -> None:
    """Help, the recipes and the flags of training come without the seconds that Lightning takes."""
    script = """
import sys
from lowbit.cli.main import main
codes = [main(["--help"]), main(["recipes"]), main(["train", "--help"])]
print(codes, "lightning" in sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[0, 0, 0] False"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["trian", "train", "resume"]),
        (["train"], ["--model", "--data"]),
        (["train", "--model", "mlp", "--data", "digits", "--epochs", "x"], ["--epochs", "int", "x"]),
        (["train", "--model", "mlp", "--data", "digits", "--epochs=-1"], ["epochs", "at least 1", "-1"]),
        (["train", "--model", "mlp", "--data", "digits", "--schedule", "x"], ["--schedule", "one-cycle"]),
        (["train", "--model", "mlp", "--data", "digits", "--profile", "x"], ["--profile", "'cosine'", "'rex'"]),
        (["train", "--model", "mlp", "--data", "digits", "--low", "x"], ["--low", "int", "range-test", "got x"]),
        (
            ["train", "--model", "mlp", "--data", "digits", "--recipe", "pfq", "--cycles", "3"],
            ["'cycles'", "grad_bits"],
        ),
        (["range-test", "--model", "mlp", "--data", "digits", "--low", "9"], ["low=9", "high=8"]),
        (["range-test", "--model", "mlp", "--data", "digits", "--measure", "x"], ["--measure", "accuracy"]),
        (["train", "--model", "mlp", "--data", "digits", "--epoch", "3"], ["--epoch"]),
        (["train", "--model", "resnet21", "--data", "digits"], ["resnet21", "'resnet20'?", "mobilenetv2"]),
        (["train", "--model", "mlp", "--data", "digit"], ["'digit'", "'digits'?", "cifar10"]),
        (["train", "--model", "mlp", "--data", "digits", "--recipe", "smb8"], ["smb8", "'sbm8'?", "bf16"]),
        (["train", "--model", "lstm", "--data", "digits"], ["lstm", "image"]),
        (["resume"], ["run"]),
        (["resume", "/no/such/run"], ["/no/such/run", "lowbit train"]),
        (["recipes", "smb8"], ["smb8", "'sbm8'?"]),
        (["inspect", "--model", "mlp", "--input", "3,x"], ["--input", "3,x"]),
        (["inspect", "--model", "mlp", "--data", "digits", "--classes", "3"], ["--classes", "--data"]),
        (["inspect", "--model", "mlp", "--classes", "0"], ["--classes", "0"]),
        (["inspect"], ["--model"]),
        (["inspect", "--probe", "--model", "mlp"], ["--probe", "--run", "--data"]),
        (["inspect", "--probe", "--run", "x", "--model", "mlp"], ["--probe", "--run"]),
        (["inspect", "--probe", "--run", "x", "--batch-size", "3"], ["--batch-size"]),
        (["inspect", "--probe", "--run", "x"], ["x", "last.ckpt"]),
        (["inspect", "--probe", "--model", "mlp", "--data", "digits", "--widths", "2,x"], ["--widths", "2,x"]),
        (["inspect", "--probe", "--model", "mlp", "--data", "digits", "--batches", "0"], ["--batches", "0"]),
        (["inspect", "--probe", "--model", "mlp", "--data", "digits", "--input", "3,8,8"], ["--input"]),
        (["cost"], ["--model"]),
        (["cost", "/no/such/run"], ["/no/such/run", "ledger"]),
        (["cost", "x", "--model", "mlp"], ["--model", "x"]),
        (["cost", "--model", "resnet21"], ["resnet21", "'resnet20'?"]),
        (["cost", "--model", "mlp", "--input", "3,x"], ["--input", "3,x"]),
        (["cost", "--model", "mlp", "--steps", "0"], ["--steps", "0"]),
        (["cost", "--model", "mlp", "--forward", "8-3"], ["low=8", "high=3"]),
        (["cost", "--model", "mlp", "--recipe", "fp32", "--forward", "4"], ["nothing in this model has bits"]),
        (["cost", "--model", "mlp", "--set", "rows=8"], ["--set", "--hardware"]),
        (["cost", "--model", "mlp", "--recipe", "pfq", "--steps", "3"], ["--steps 3", "4 stages"]),
        (["cost", "--model", "mlp", "--recipe", "sqrt3", "--steps", "9"], ["sqrt3", "--forward"]),
        (["cost", "--model", "mlp", "--schedule", "8"], ["--schedule", "--forward"]),
        (["inspect", "--model", "mlp", "--shape", "64"], ["--shape", "--input"]),
        (["inspect", "--model", "mlp", "--bits", "4"], ["--bits", "--widths"]),
        (["cost", "--model", "mobilenetv2", "--recipe", "dfq"], ["depthwise", "--forward"]),
        (["cost", "--model", "mobilenetv2", "--recipe", "cpt", "--steps", "64"], ["depthwise", "--forward"]),
        (["cost", "--model", "mlp", "--recipe", "cpt"], ["total_steps=1, cycles=32"]),
        (["cost", "--model", "mlp", "--hardware", "tpu"], ["'tpu'", "bitfusion", "FILE.py:CLASS"]),
        (["cost", "--model", "mlp", "--hardware", "no.py:Mine"], ["no.py", "FILE.py:CLASS"]),
        (
            ["cost", "--model", "mlp", "--hardware", "bitfusion", "--set", "row=8"],
            ["'row'", "'rows'?", "energies.dram", "weight_bytes"],
        ),
        (
            ["cost", "--model", "mlp", "--hardware", "bitfusion", "--set", "weight_bytes=131072"],
            ["weight_bytes=131072", "256 bytes", "65536", "energies.weight_read", "energies.weight_write"],
        ),
    ],
)
def test_wrong_request_is_one_line_and_exit_code_2(
    argv: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong request exits with 2 and one line that says what was wrong and what is allowed, and no folder."""
    monkeypatch.chdir(tmp_path)

    code = cli.main(argv)

    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("lowbit: error: ")
    assert printed.err.count("\n") == 1
    assert all(part in printed.err for part in parts)
    assert not list(tmp_path.iterdir())


def test_failed_run_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that is not finite exits with 1 and one line."""
    code = train(tmp_path / "run", "--recipe", "fp32", "--lr", "1e30", "--schedule", "constant")

    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("lowbit: error: the loss is ")
    assert err.count("\n") == 1


def test_environment_changes_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that looks like a setting is not read."""
    monkeypatch.setenv("LOWBIT_TRAIN__SEED", "9")
    monkeypatch.setenv("SEED", "9")

    train(tmp_path / "run")

    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0


def test_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Lightning, training exits with 1 and the command that installs it."""
    for name in ("callbacks", "fitting", "module", "trainer"):
        monkeypatch.delitem(sys.modules, f"lowbit.train.{name}", raising=False)
    monkeypatch.delattr("lowbit.train.trainer", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)

    code = train(tmp_path / "run")

    err = capsys.readouterr().err
    assert code == 1
    assert "pip install 'lowbit[train]'" in err
    assert err.count("\n") == 1


def failing(error: BaseException) -> Any:
    """A command that raises `error`."""

    def command(**_: object) -> None:
        raise error

    return command


@pytest.mark.parametrize("error", [UsageError("bad"), RunError("bad")])
def test_traceback_on_demand(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``LOWBIT_TRACEBACK=1`` an error is raised, so that Python shows where."""
    monkeypatch.setenv("LOWBIT_TRACEBACK", "1")
    monkeypatch.setattr(recipes, "run", failing(error))

    with pytest.raises(type(error), match="bad"):
        cli.main(["recipes"])


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is no error: a line that says how to go on, and the shell's code for an interrupt."""
    monkeypatch.setattr(recipes, "run", failing(KeyboardInterrupt("interrupted at step 3; continue with …")))

    code = cli.main(["recipes"])

    assert code == 130
    assert capsys.readouterr().err == "\nlowbit: interrupted at step 3; continue with …\n"


def test_bug_is_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is none of the two errors keeps its traceback."""
    monkeypatch.setattr(recipes, "run", failing(ZeroDivisionError()))

    with pytest.raises(ZeroDivisionError):
        cli.main(["recipes"])


def test_a_setting_that_is_no_number_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A word where a number belongs is one short line with the flag's name."""
    assert cli.main(["train", "--model", "mlp", "--data", "digits", "--lr", "abc"]) == 2

    assert capsys.readouterr().err == "lowbit: error: --lr: expected float, got abc\n"


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`lowbit` alone lists the commands, and is no failure."""
    assert cli.main([]) == 0

    out = capsys.readouterr().out
    assert "train" in out
    assert "compare" in out


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """`lowbit cost ... | head -1` ends with the exit code of a closed pipe and writes nothing to stderr."""
    command = [sys.executable, "-m", "lowbit", "cost", "--model", "mlp", "--recipe", "int8", "--steps", "9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        err = run.stderr.read()
        code = run.wait(timeout=60)

    assert (code, err) == (141, b"")


def test_ctrl_c_while_the_process_ends_is_not_answered() -> None:
    """Once the command has ended, as a script's last act, another SIGINT prints no traceback and changes no code."""
    code = (
        "import os, signal, sys; from lowbit.cli.main import main; sys.argv = ['lowbit', 'recipes', 'nothing']\n"
        "code = main(); os.kill(os.getpid(), signal.SIGINT); sys.exit(code)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_main_with_arguments_leaves_ctrl_c_alone() -> None:
    """A program that calls the command line still hears of Ctrl-C afterwards."""
    before = signal.getsignal(signal.SIGINT)

    cli.main(["recipes"])

    assert signal.getsignal(signal.SIGINT) is before
