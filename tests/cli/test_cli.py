"""The command line: what it prints, what it refuses, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lowbit.cli import main as cli
from lowbit.cli import recipes as recipes_command
from lowbit.errors import RunError, UsageError
from lowbit.methods.recipe import recipes


def train(out: Path, *flags: str) -> int:
    """Train a small model for ten steps."""
    run = ["--model", "mlp", "--data", "digits", "--batch-size", "64", "--max-steps", "10", "--threads", "1"]
    return cli.main(["train", *run, "--out", str(out), *flags])


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


def test_recipes_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """``recipes`` has a row for each name of the library."""
    code = cli.main(["recipes"])

    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}

    assert code == 0
    assert set(recipes()) <= first_words


def test_recipe_shows_the_format_of_each_operand(capsys: pytest.CaptureFixture[str]) -> None:
    """``recipes NAME`` prints a row for each product, with the bifurcated gradient in two formats."""
    code = cli.main(["recipes", "sbm8"])

    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}

    assert code == 0
    assert {"output", "grad_input", "grad_weight"} <= rows.keys()
    assert "8-bit" in rows["grad_input"]
    assert "bf16" in rows["grad_weight"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["subcommand"]),
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
        (["inspect", "--model", "mlp", "--shape", "3,x"], ["--shape", "3,x"]),
        (["inspect", "--model", "mlp", "--data", "digits", "--classes", "3"], ["--classes", "--data"]),
        (["inspect", "--model", "mlp", "--classes", "0"], ["--classes", "0"]),
        (["inspect"], ["--model"]),
        (["inspect", "--probe", "--model", "mlp"], ["--probe", "--run", "--data"]),
        (["inspect", "--probe", "--run", "x", "--model", "mlp"], ["--probe", "--run"]),
        (["inspect", "--probe", "--run", "x", "--batch-size", "3"], ["--batch-size"]),
        (["inspect", "--probe", "--run", "x"], ["x", "last.ckpt"]),
        (["inspect", "--probe", "--model", "mlp", "--data", "digits", "--bits", "2,x"], ["--bits", "2,x"]),
        (["inspect", "--probe", "--model", "mlp", "--data", "digits", "--batches", "0"], ["--batches", "0"]),
        (["inspect", "--probe", "--model", "mlp", "--data", "digits", "--shape", "3,8,8"], ["--shape"]),
        (["cost"], ["--model"]),
        (["cost", "/no/such/run"], ["/no/such/run", "ledger"]),
        (["cost", "x", "--model", "mlp"], ["--model", "x"]),
        (["cost", "--model", "resnet21"], ["resnet21", "'resnet20'?"]),
        (["cost", "--model", "mlp", "--input", "3,x"], ["--input", "3,x"]),
        (["cost", "--model", "mlp", "--steps", "0"], ["--steps", "0"]),
        (["cost", "--model", "mlp", "--schedule", "8-3"], ["low=8", "high=3"]),
        (["cost", "--model", "mlp", "--recipe", "fp32", "--schedule", "4"], ["nothing in this model has bits"]),
        (["cost", "--model", "mlp", "--set", "rows=8"], ["--set", "--hardware"]),
        (["cost", "--model", "mlp", "--recipe", "pfq", "--steps", "9"], ["pfq", "--schedule"]),
        (["cost", "--model", "resnet20", "--recipe", "dfq", "--steps", "9"], ["dfq", "--schedule"]),
        (["cost", "--model", "mobilenetv2", "--recipe", "cpt", "--steps", "64"], ["depthwise", "--schedule"]),
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


def test_train_prints_the_result_and_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training succeeds, and ends with accuracy, time, recipe and paths, and nothing else."""
    out = tmp_path / "run"

    code = train(out, "--recipe", "sbm8")

    printed = capsys.readouterr()
    words = " ".join(printed.out.split())
    assert code == 0
    assert words.startswith("result ")
    assert all(part in words for part in ("test accuracy", "test loss", "seconds per step", "recipe sbm8"))
    assert printed.err == ""


def test_range_test_prints_its_choice(capsys: pytest.CaptureFixture[str]) -> None:
    """``range-test`` succeeds with a table, a plot and the choice, and writes nothing."""
    code = cli.main(
        [
            "range-test",
            "--model",
            "mlp",
            "--data",
            "digits",
            "--steps-per-bit",
            "6",
            "--threads",
            "1",
            "--every",
            "true",
        ]
    )

    printed = capsys.readouterr().out
    assert code == 0
    assert printed.startswith("precision range test: ")
    assert [line.split()[0] for line in printed.splitlines()[4:11]] == [str(bits) for bits in range(2, 9)]
    assert "chosen" in printed
    assert "█" in printed


def test_cpt_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags override the recipe's schedule, are kept in config.yaml, and the result shows bit operations."""
    code = train(tmp_path / "run", "--recipe", "cpt", "--cycles", "5", "--low", "4", "--eval-bits", "current")

    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert code == 0
    assert (settings["cycles"], settings["low"], settings["eval_bits"]) == (5, 4, "current")
    assert "a MAC)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpt", "fractrain"])
def test_recipes_show_what_changes_over_the_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``recipes NAME`` shows schedule or gates, and the bits of depthwise convolutions."""
    cli.main(["recipes", name])

    printed = " ".join(capsys.readouterr().out.split())
    assert {"cpt": "low=3, high=8, cycles=32", "fractrain": "3/6, 4/6, 4/8, 6/8, 6/12"}[name] in printed
    assert "depthwise convolutions: forward 8 bits, backward 16 bits" in printed


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again exits with 2 and names `lowbit resume`."""
    train(tmp_path / "run")
    capsys.readouterr()

    code = train(tmp_path / "run")

    assert code == 2
    assert "lowbit resume" in capsys.readouterr().err


def test_resume_continues_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without its result resumes to the same checkpoint and prints a result."""
    train(tmp_path / "run")
    before = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    (tmp_path / "run" / "last.ckpt").unlink()
    (tmp_path / "run" / "result.json").unlink()
    capsys.readouterr()

    code = cli.main(["resume", str(tmp_path / "run")])

    after = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert code == 0
    assert "test accuracy" in capsys.readouterr().out
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    """A YAML file gives settings; a flag after it replaces one of them."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("model: mlp\ndata: digits\nmax_steps: 3\nthreads: 1\nseed: 5\n")

    code = cli.main(["train", "--config", str(settings), "--seed", "6", "--out", str(tmp_path / "run")])

    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert code == 0
    assert (used["max_steps"], used["seed"]) == (3, 6)


def test_settings_of_a_run_start_another(tmp_path: Path) -> None:
    """The ``config.yaml`` of a run folder serves as ``--config``."""
    train(tmp_path / "run")

    code = cli.main(["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")])

    assert code == 0
    assert (tmp_path / "again" / "config.yaml").read_text() == (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "part"),
    [("model: mlp\ndata: digits\nepoch: 3\n", "epoch"), ("a: [", "pars"), ("epochs: many\n", "epochs")],
)
def test_wrong_file_is_named(text: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A YAML file with an unknown key, a wrong value or no YAML exits with 2 in one line."""
    (tmp_path / "settings.yaml").write_text(text)

    code = cli.main(["train", "--config", str(tmp_path / "settings.yaml")])

    err = capsys.readouterr().err
    assert code == 2
    assert part in err
    assert err.count("\n") == 1


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


def test_inspect_reports_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``inspect`` prints the conversion's report and writes nothing."""
    monkeypatch.chdir(tmp_path)

    code = cli.main(["inspect", "--model", "resnet20", "--recipe", "sbm8", "--shape", "1,8,8"])

    assert code == 0
    assert "stem.0" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [["--model", "gpt", "--shape", "64"], ["--model", "mlp", "--data", "digits"], ["--model", "resnet20"]],
)
def test_inspect_takes_a_shape_a_data_set_or_neither(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The input of the model comes from a shape, from a data set, or is a small colour image."""
    code = cli.main(["inspect", *flags])

    assert code == 0
    assert "head" in capsys.readouterr().out


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
    monkeypatch.setattr(recipes_command, "run", failing(error))

    with pytest.raises(type(error), match="bad"):
        cli.main(["recipes"])


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C is no error: a line that says how to go on, and the shell's code for an interrupt."""
    monkeypatch.setattr(recipes_command, "run", failing(KeyboardInterrupt("interrupted at step 3; continue with …")))

    code = cli.main(["recipes"])

    assert code == 130
    assert capsys.readouterr().err == "\nlowbit: interrupted at step 3; continue with …\n"


def test_bug_is_not_disguised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is none of the two errors keeps its traceback."""
    monkeypatch.setattr(recipes_command, "run", failing(ZeroDivisionError()))

    with pytest.raises(ZeroDivisionError):
        cli.main(["recipes"])


def test_a_setting_that_is_no_number_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A word where a number belongs is one short line with the flag's name."""
    assert cli.main(["train", "--model", "mlp", "--data", "digits", "--lr", "abc"]) == 2

    assert capsys.readouterr().err == "lowbit: error: --lr: expected float, got abc\n"


def test_cost_of_a_planned_run(capsys: pytest.CaptureFixture[str]) -> None:
    """``cost --model`` prints the layers, the metrics and the array's cycles without training."""
    flags = ["--schedule", "3-8x2", "--backward", "8", "--steps", "20", "--batch-size", "2", "--input", "1,8,8"]
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


def test_probe_of_a_run_suggests_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``inspect --probe`` prints errors, sensitivities and, with a budget, bits for each layer."""
    train(tmp_path / "run")
    capsys.readouterr()

    code = cli.main(["inspect", "--probe", "--run", str(tmp_path / "run"), "--bits", "2,4", "--budget", "0.6"])

    printed = capsys.readouterr().out
    assert code == 0
    assert all(part in printed for part in ("SQNR dB", "underflow %", "b=2", "of the present bit operations"))


def test_probe_of_fresh_weights_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run the weights are fresh, which the first line says."""
    flags = ["--batches", "1", "--batch-size", "8", "--bits", "4"]
    code = cli.main(["inspect", "--probe", "--model", "mlp", "--data", "digits", *flags])

    assert code == 0
    assert "fresh weights" in capsys.readouterr().out.splitlines()[0]
