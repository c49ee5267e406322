"""``lowbit train``, ``resume`` and ``range-test``."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_run import train

from lowbit.cli import main as cli


def test_train_prints_the_result_and_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training ends with accuracy, time, recipe and paths on stdout; stderr has the scores of the epoch alone."""
    out = tmp_path / "run"

    code = train(out, "--recipe", "sbm8")

    printed = capsys.readouterr()
    words = " ".join(printed.out.split())
    assert code == 0
    assert words.startswith("result ")
    assert all(part in words for part in ("test accuracy", "seconds per step", "recipe sbm8", "memory of a step"))
    assert [line.split("  ")[0] for line in printed.err.splitlines()] == ["epoch 1/1"]


def test_progress_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--progress none`` leaves stderr empty, and the three switches together leave out proof and test."""
    code = train(tmp_path / "run", "--progress", "none", "--proof", "false", "--evaluate", "never")

    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert "--evaluate never" in printed.out
    assert "proof.txt" not in printed.out


def test_a_piped_run_tells_its_progress_on_stderr(tmp_path: Path) -> None:
    """In a pipe there are lines without colour or cursor movement, and stdout has the result alone."""
    command = [sys.executable, "-m", "lowbit", "train", "--model", "mlp", "--data", "digits", "--epochs", "2"]
    command += ["--threads", "1", "--out", str(tmp_path / "run")]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.startswith("result\n")
    assert [line[:9] for line in done.stderr.splitlines() if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert "\x1b" not in done.stderr


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


def test_printed_settings_have_every_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--print-config`` with ``--seeds`` prints a document for each run, and trains none."""
    code = train(tmp_path / "run", "--seeds", "3,5", "--print-config")

    assert code == 0
    assert [each["seed"] for each in yaml.safe_load_all(capsys.readouterr().out)] == [3, 5]
    assert not list(tmp_path.iterdir())


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
