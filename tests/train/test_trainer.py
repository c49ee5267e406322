"""Training runs: what they learn, what they leave behind, and that a stopped run continues bit for bit."""

import csv
import dataclasses
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from helpers import script
from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.schedules import Cyclic
from lowbit.train import TrainConfig, checkpoint, models, trainer
from lowbit.train.config import lr_factor
from lowbit.train.measured import read as read_measured
from lowbit.train.module import Module
from lowbit.train.rows import Rows
from lowbit.train.step import explain_non_finite, step_seed

STEPS = 5  # in an epoch of `config`
same = script("kills").same


def config(out: Path, **changes: Any) -> TrainConfig:
    """A run of 15 steps that takes a fraction of a second."""
    settings: dict[str, Any] = {"model": "mlp", "data": "digits", "subset": STEPS * 64, "batch_size": 64}
    settings |= {"epochs": 3, "lr": 0.05, "threads": 1, "out": out}
    return TrainConfig(**(settings | changes))


def last(out: Path) -> dict[str, Any]:
    """The last checkpoint of the run in `out`."""
    return checkpoint.load(out / "last.ckpt")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run that saved a checkpoint in the middle of each epoch."""
    out = tmp_path_factory.mktemp("run") / "complete"
    trainer.train(config(out, checkpoint_every=3))
    return out


@pytest.fixture
def stopped(complete: Path, tmp_path: Path) -> Path:
    """A copy of the complete run that lacks its result, so that resume opens the checkpoint."""
    out = tmp_path / "stopped"
    shutil.copytree(complete, out)
    (out / "result.json").unlink()
    return out


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", -1),
        ("epochs", 0),
        ("epochs", True),
        ("batch_size", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("weight_decay", math.inf),
        ("optimizer", "sdg"),
        ("schedule", "one_cycle"),
        ("amp", "fp16"),
        ("seed", -1),
        ("seed", 2**63),
        ("subset", 0),
        ("checkpoint_every", 0),
        ("threads", 0),
        ("context", -5),
        ("max_steps", 0),
        ("model", ""),
    ],
)
def test_impossible_setting_is_refused_by_name(setting: str, value: object) -> None:
    """A value out of range is a UsageError that names the setting and the value."""
    with pytest.raises(UsageError) as caught:
        config(Path("run"), **{setting: value})

    assert setting in str(caught.value)
    assert repr(value) in str(caught.value)


def test_near_miss_of_a_choice_is_suggested() -> None:
    """A misspelt choice names the nearest one."""
    with pytest.raises(UsageError, match="Did you mean 'cosine'"):
        config(Path("run"), schedule="cosin")


def test_resolved_leaves_nothing_open_that_changes_the_weights() -> None:
    """Resolving fills in rate, decay, threads and folder, each optimizer with its own."""
    sgd = TrainConfig(model="mlp", data="digits").resolved(threads=2)
    adamw = TrainConfig(model="mlp", data="text:/a/b.txt", optimizer="adamw", seed=7).resolved(threads=2)

    assert (sgd.lr, sgd.weight_decay, sgd.threads, sgd.out) == (0.1, 1e-4, 2, Path("runs/mlp-digits-sbm8-0"))
    assert (adamw.lr, adamw.weight_decay) == (1e-3, 0.01)
    assert adamw.out == Path("runs/mlp-text--a-b.txt-sbm8-7")


def test_resolved_keeps_what_was_given() -> None:
    """A setting that was given survives resolving, zero included."""
    given = config(Path("run"), lr=0.0, weight_decay=0.0, threads=3)

    assert given.resolved(threads=8) == given


def test_settings_survive_yaml(tmp_path: Path) -> None:
    """Settings written as YAML and read back are equal."""
    before = config(tmp_path, amp="bf16", checkpoint_every=7)

    after = TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(before.to_dict())), out=tmp_path)

    assert after == before


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step", "constant"])
def test_rate_stays_between_zero_and_its_peak(schedule: Any) -> None:
    """Each schedule reaches 1 somewhere and never leaves [0, 1]."""
    factors = [lr_factor(schedule, step, 40) for step in range(41)]

    assert max(factors) == 1
    assert min(factors) >= 0


def test_one_cycle_peaks_at_a_quarter_and_ends_at_zero() -> None:
    """One-cycle begins at lr/25, is at its peak after a quarter of the run, and reaches zero at its end."""
    assert lr_factor("one-cycle", 0, 40) == 1 / 25
    assert lr_factor("one-cycle", 10, 40) == 1
    assert lr_factor("one-cycle", 40, 40) == 0


def test_step_divides_by_ten_twice() -> None:
    """The step schedule falls at a half and at three quarters of the run."""
    assert [lr_factor("step", step, 4) for step in range(4)] == [1, 1, 0.1, 0.01]


def test_step_seeds_do_not_repeat_for_the_next_seed() -> None:
    """No two of 50 seeds times 50 steps share the 32 bits that torch's CPU generator uses."""
    seeds = {step_seed(seed, step) % 2**32 for seed in range(50) for step in range(50)}

    assert len(seeds) == 2500  # a collision among random 32-bit values has probability 0.0007


def test_eight_bits_learn_digits(tmp_path: Path) -> None:
    """Three epochs of sbm8 classify most digits, and not all of them."""
    result = trainer.train(config(tmp_path / "run", subset=None, recipe="sbm8"))

    assert result.test_accuracy is not None
    assert 0.8 < result.test_accuracy < 1


def test_recipe_changes_the_weights(complete: Path, tmp_path: Path) -> None:
    """The same run in fp32 ends with other weights: the recipe is not ignored."""
    trainer.train(config(tmp_path / "run", recipe="fp32"))

    assert not same(last(complete)["state_dict"], last(tmp_path / "run")["state_dict"])


def test_same_settings_give_the_same_weights(complete: Path, tmp_path: Path) -> None:
    """Two runs of the same settings end bit for bit alike, wherever their checkpoints are."""
    trainer.train(config(tmp_path / "run", checkpoint_every=None))

    for key in ("state_dict", "optimizer_states"):
        assert same(last(complete)[key], last(tmp_path / "run")[key])


def test_result_file_holds_the_result(tmp_path: Path) -> None:
    """``result.json`` has the figures that `train` returns."""
    result = trainer.train(config(tmp_path / "run"))

    stored = json.loads((tmp_path / "run" / "result.json").read_text())

    assert stored == {key: value for key, value in dataclasses.asdict(result).items() if key != "out"}
    assert stored["steps"] == 3 * STEPS


def test_every_epoch_is_tested_once(complete: Path) -> None:
    """The log has one row with a test accuracy for each epoch, at the epoch's last step."""
    with open(complete / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["test_accuracy"]]

    assert [(float(row["epoch"]), int(row["step"])) for row in rows] == [(1, STEPS), (2, 10), (3, 15)]


def test_short_run_has_no_seconds_per_step(tmp_path: Path) -> None:
    """A run whose every step is warm-up says nothing about time."""
    result = trainer.train(config(tmp_path / "run", max_steps=5))

    assert result.seconds_per_step is None


def test_text_is_scored_in_bits_per_byte(tmp_path: Path) -> None:
    """A text's result is its loss in bits, near the 8 bits that a fresh model needs."""
    (tmp_path / "text").write_text("what is a low bit? " * 200)
    data = f"text:{tmp_path / 'text'}"

    result = trainer.train(
        config(tmp_path / "run", model="gpt", data=data, context=16, batch_size=8, subset=16, epochs=1)
    )

    assert result.test_accuracy is None
    assert result.test_bits_per_byte == pytest.approx(result.test_loss / math.log(2))
    assert 3 < result.test_bits_per_byte < 9


def test_context_of_images_is_refused(tmp_path: Path) -> None:
    """A context for images is a UsageError, not ignored."""
    with pytest.raises(UsageError, match="context"):
        trainer.train(config(tmp_path / "run", context=16))


def test_model_that_does_not_fit_leaves_no_folder(tmp_path: Path) -> None:
    """A text model on images is refused before the run folder exists."""
    with pytest.raises(UsageError, match="lstm"):
        trainer.train(config(tmp_path / "run", model="lstm"))

    assert not (tmp_path / "run").exists()


def test_taken_folder_is_refused_untouched(tmp_path: Path) -> None:
    """A folder with something in it is refused, with both ways out, and stays as it was."""
    (tmp_path / "notes").write_text("mine")

    with pytest.raises(UsageError, match=r"lowbit resume.*--out"):
        trainer.train(config(tmp_path))

    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_infinite_loss_stops_with_step_and_place(tmp_path: Path) -> None:
    """A rate that blows the weights up is a RunError with the step and a parameter's name."""
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d+: .*(hidden|head)"):
        trainer.train(config(tmp_path / "run", recipe="fp32", lr=1e30, schedule="constant"))


def test_what_ran_stands_as_text_and_as_json(complete: Path) -> None:
    """Both reports of a run have the same layers in either form."""
    conversion, proof = (json.loads((complete / f"{name}.json").read_text()) for name in ("conversion", "proof"))

    layers = [row["name"] for row in conversion["rows"] if row["recipe"]]
    assert [row["layer"] for row in proof["layers"]] == layers
    assert all(f"\n{layer} " in (complete / "conversion.txt").read_text() for layer in layers)
    assert all(f"\n{layer} " in (complete / "proof.txt").read_text() for layer in layers)


def test_explanation_names_the_first_bad_layer() -> None:
    """The first layer whose output is not finite is named, not the later ones that it spoils."""

    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    model = nn.Sequential(nn.Flatten(), Log(), nn.Linear(2, 2))

    reason = explain_non_finite(model, torch.tensor([[-1.0, 1.0]]))

    assert reason == "the first layer whose output is not finite is 1"


def test_explanation_tells_what_enters_a_layer() -> None:
    """A value that is bad before the first layer is not blamed on the layer."""
    reason = explain_non_finite(nn.Sequential(nn.Identity()), torch.tensor([math.inf]))

    assert reason == "the first value that is not finite enters the layer 0"


def test_explanation_names_a_bad_parameter() -> None:
    """A parameter that an update blew up is named before any layer."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, math.inf)

    assert explain_non_finite(model, torch.zeros(1)).startswith("the parameter weight is not finite")


def test_warning_of_a_model_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer silences does not include a warning from the model."""
    build = models.build

    def noisy(*args: Any) -> nn.Module:
        model = build(*args)
        model.register_forward_hook(lambda *_: warnings.warn("look at this", stacklevel=1))
        return model

    monkeypatch.setattr(models, "build", noisy)

    with pytest.warns(UserWarning, match="look at this"):
        trainer.train(config(tmp_path / "run", max_steps=1))


# A stage ends after 5 epochs of any loss, so these 7 epochs have two.
SHORT_EPOCHS = {"subset": 128, "epochs": 7, "threshold": 9.0}
TESTED = {"recipe": "cpt", "cycles": 2, "low": "range-test", "high": 3, "epochs": 4}
GATED = {"recipe": "fractrain", "blocks": r"0\.hidden\.\d", "targets": [1.9, 3.0], "decay": 0.3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 12},
        {"optimizer": "adamw", "amp": "bf16"},
        {"recipe": "cpt", "cycles": 4},
        TESTED,
        {**TESTED, "range_test_steps": 6, "range_test_threshold": 0.02},
        {"recipe": "pfq", **SHORT_EPOCHS},
        {**GATED, **SHORT_EPOCHS},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_every_checkpoint_resumes_to_the_same_end(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint of any step, a model with dropout ends with the same checkpoint, log and result."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args: nn.Sequential(build(*args), nn.Dropout(0.2)))
    save = checkpoint.save
    kept: list[Path] = []

    def keep(path: Path, content: Any, **how: Any) -> None:
        save(path, content, **how)
        kept.append(tmp_path / f"{content['global_step']}.ckpt")
        shutil.copy(path, kept[-1])

    whole, part = tmp_path / "whole", tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", keep)
        result = trainer.train(config(whole, checkpoint_every=1, **changes))

    assert len(kept) == result.steps
    for path in kept:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(whole, part)
        (part / "result.json").unlink()
        shutil.copy(path, part / "last.ckpt")
        again = trainer.resume(part)
        assert same(last(part), last(whole)), path.name
        assert (part / "csv" / "metrics.csv").read_text() == (whole / "csv" / "metrics.csv").read_text()
        assert (part / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes(), path.name
        assert dataclasses.replace(again, seconds_per_step=result.seconds_per_step, out=whole) == result


def test_logs_show_bits_and_cost(tmp_path: Path) -> None:
    """Cpt's rows have the bits of each layer at that step and the bit operations so far."""
    result = trainer.train(config(tmp_path / "run", recipe="cpt", cycles=3))
    with open(tmp_path / "run" / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]

    assert [(row["step"], row["forward_bits"], row["bits/hidden.1.0"]) for row in rows] == [("10", "8.0", "8.0")]
    schedule = Cyclic(low=3, high=8, cycles=3, total_steps=15)
    first, others = 64 * 256, 2 * 256 * 256  # the first layer has no grad_input, the last one is left
    costs = [(first + others) * (b * b + 8 * b) + others * 8 * b for b in map(schedule, range(15))]
    macs = 2 * first + 3 * others
    assert float(rows[0]["bit_operations_per_mac"]) == pytest.approx(sum(costs[:10]) / (10 * macs))
    assert (result.bit_operations, result.macs) == (64 * sum(costs), 64 * 15 * macs)


def test_logs_show_what_the_gates_chose(tmp_path: Path) -> None:
    """Fractrain's rows have a histogram over choices for each block, the cost and its target."""
    trainer.train(config(tmp_path / "run", **{**GATED, "blocks": None, "threshold": 0.1}))
    with open(tmp_path / "run" / "csv" / "metrics.csv") as file:
        row = next(row for row in csv.DictReader(file) if row["train_loss"])

    for block in ("hidden.0", "hidden.1", "hidden.2"):
        shares = [float(value) for name, value in row.items() if name.startswith(f"gates/{block}/")]
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(1)
    assert 1.7 < float(row["cost_percent"]) < 4.7
    assert float(row["target_percent"]) == 1.9


def test_an_epoch_of_the_plateau_rule_may_be_shorter(tmp_path: Path) -> None:
    """With plateau_every=1 a stage lasts five steps."""
    trainer.train(config(tmp_path / "run", recipe="pfq", plateau_every=1, threshold=9.0, decay=1.0))
    with open(tmp_path / "run" / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]

    assert [(row["step"], row["stage"], row["forward_bits"]) for row in rows] == [("10", "1.0", "4.0")]


def test_range_test_in_the_run_leaves_its_table(tmp_path: Path) -> None:
    """A run with low="range-test" writes the test's table, and its result names the choice."""
    result = trainer.train(config(tmp_path / "run", recipe="cpt", cycles=2, low="range-test", high=3, epochs=4))

    text = (tmp_path / "run" / "range-test.txt").read_text()
    assert result.low in (2, 3)
    assert text.startswith(f"precision range test: {result.low} bits")


def test_the_range_test_in_the_run_has_its_settings(tmp_path: Path) -> None:
    """Steps and threshold of the run reach the table: 6 steps at 2 bits, and no fall of the loss is 1000 %."""
    changes = {"range_test_steps": 6, "range_test_threshold": 10.0}
    result = trainer.train(
        config(tmp_path / "run", recipe="cpt", cycles=2, low="range-test", high=3, epochs=4, **changes)
    )

    text = (tmp_path / "run" / "range-test.txt").read_text()
    assert result.low == 3
    assert "no lower width gained more than 10 and more than 3 standard errors" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "cpt", "cycles": 99}, "total_steps=15, cycles=99"),
        ({"recipe": "cpt", "cycles": 2, "low": 9}, "low=9, high=8"),
        ({"recipe": "cpt", "cycles": 2, "profile": "cosin"}, "'cosin'.*Did you mean 'cosine'"),
        ({"recipe": "cpt", "bits": [3, 8]}, "'cpt' has no setting 'bits': it has low, high"),
        ({"recipe": "sbm8", "cycles": 2}, "'sbm8' has no setting 'cycles': its bits are constant"),
        ({"recipe": "sbm8", "eval_bits": 8}, "eval_bits goes with"),
        (
            {"recipe": "cpt", "cycles": 2, "range_test_steps": 8},
            "range_test_steps=8 goes with low='range-test', and low is 3",
        ),
        ({"recipe": "sbm8", "range_test_threshold": 0.1}, "'sbm8' has no setting 'range_test_threshold'"),
        (
            {"recipe": "cpt", "cycles": 2, "low": "range-test", "high": 3, "range_test_steps": 3},
            "steps_per_bit=3.*4 steps",
        ),
        ({"recipe": "cpt", "cycles": 2, "blocks": "x"}, "blocks goes with"),
        ({"recipe": "cpt", "cycles": 2, "plateau_every": 5}, "plateau_every goes with"),
        ({"recipe": "pfq", "plateau_every": 0}, "plateau_every must be a whole number"),
        ({"recipe": "dfq", "blocks": "x"}, r"matches the name of no module of 'mlp'; those of mlp match"),
        ({"recipe": "dfq", "blocks": "x("}, "no regular expression"),
    ],
)
def test_precision_settings_that_do_not_fit_leave_no_folder(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A setting that the recipe does not have, or an impossible one, is refused before the run folder exists."""
    with pytest.raises(UsageError, match=message):
        trainer.train(config(tmp_path / "run", **changes))

    assert not (tmp_path / "run").exists()


def test_changed_schedule_on_resume_is_refused(tmp_path: Path) -> None:
    """Editing the schedule in config.yaml of a stopped run is an error, not another run from its middle."""
    out = tmp_path / "run"
    trainer.train(config(out, recipe="cpt", cycles=3, checkpoint_every=4))
    (out / "result.json").unlink()
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("cycles: 3", "cycles: 5"))

    with pytest.raises(RunError, match="it has cycles=3"):
        trainer.resume(out)


KILLED_IN_STEP = """
from lowbit.train.module import Module
training_step = Module.training_step
def step(self, batch):
    if self.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, batch)
Module.training_step = step
"""

KILLED_IN_WRITE = """
save = torch.save
def write(content, file):
    if content["global_step"] == 9:
        file.write(b"half of a")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file)
torch.save = write
"""


@pytest.mark.parametrize("moment", [KILLED_IN_STEP, KILLED_IN_WRITE], ids=["in a step", "in a write"])
def test_killed_run_resumes_bit_for_bit(moment: str, complete: Path, tmp_path: Path) -> None:
    """A process killed within an epoch, or while it writes, resumes from its last checkpoint to the same end."""
    out = tmp_path / "run"
    settings = config(out, checkpoint_every=3).to_dict()
    script = f"""
import os, signal, torch
from pathlib import Path
from lowbit.schedules import Cyclic
from lowbit.train import TrainConfig, trainer
{moment}
trainer.train(TrainConfig.from_dict({settings!r}, out=Path({str(out)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    before = last(out)["global_step"]
    trainer.resume(out)

    assert killed.returncode == -signal.SIGKILL
    assert before == 6  # of 3, 5, 6, 9, ...: checkpoints are every 3 steps and at the end of an epoch
    assert same(last(out), last(complete))
    assert (out / "ledger.jsonl").read_bytes() == (complete / "ledger.jsonl").read_bytes()
    assert not list(out.glob("*.part"))


def test_run_without_a_checkpoint_starts_again(complete: Path, stopped: Path) -> None:
    """A run killed before its first checkpoint resumes from step 0 to the same end."""
    for path in checkpoint.kept(stopped / "last.ckpt"):
        path.unlink()

    trainer.resume(stopped)

    assert same(last(stopped), last(complete))


def test_complete_run_gives_its_result_without_training(complete: Path) -> None:
    """Resuming a complete run returns the stored result and touches nothing."""
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*")}

    result = trainer.resume(complete)

    assert result.steps == 3 * STEPS
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("*")} == before


def test_moved_run_resumes(stopped: Path, tmp_path: Path) -> None:
    """A run folder may be moved: its place is no setting of the run."""
    moved = stopped.rename(tmp_path / "elsewhere")

    assert trainer.resume(moved).out == moved


def test_threads_of_the_process_are_restored(tmp_path: Path) -> None:
    """A run with its own number of threads leaves the process's number as it was."""
    before = torch.get_num_threads()

    trainer.train(config(tmp_path / "run", threads=before + 1, max_steps=1))

    assert torch.get_num_threads() == before


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves a KeyboardInterrupt with the resume command, and Ctrl-C works again afterwards."""
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Module, "on_train_batch_start", interrupted)

    with pytest.raises(KeyboardInterrupt, match="lowbit resume"):
        trainer.train(config(tmp_path / "run"))

    assert signal.getsignal(signal.SIGINT) is handler


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing reach the disk any more."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that finds the disk full is a RunError; the old file is intact, the temporary one gone."""
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"step": 1})
    fill_disk(monkeypatch)

    with pytest.raises(RunError, match=r"No space left.*the one that was there is intact.*Free some space"):
        checkpoint.save(path, {"step": 2, "weight": torch.zeros(100_000)})

    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_stops_a_run_that_then_resumes(complete: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A run stopped by a full disk resumes to the same end once there is space."""
    out = tmp_path / "run"
    save = checkpoint.save

    def fill(path: Path, content: Any, **how: Any) -> None:
        if content["global_step"] == 9:
            fill_disk(patch)
        save(path, content, **how)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fill)
        with pytest.raises(RunError, match="No space left"):
            trainer.train(config(out, checkpoint_every=3))
    trainer.resume(out)

    assert same(last(out), last(complete))


def test_log_on_a_full_disk_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written stops the run in one line with the resume command."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Rows, "save", full)

    with pytest.raises(RunError, match=r"No space left.*lowbit resume"):
        trainer.train(config(tmp_path / "run"))


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of the largest tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "one flipped bit": flip_a_bit,
    "cut in half": cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "a bare list": lambda path: torch.save([1, 2], path),
    "another program's dict": lambda path: torch.save({"state_dict": {}}, path),
    "a whole module": lambda path: torch.save(nn.Linear(1, 1), path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_checkpoint_is_named(damage: str, stopped: Path) -> None:
    """Where no other checkpoint is left, a damaged one is a RunError with its path and what was expected."""
    (stopped / "last-1.ckpt").unlink()
    DAMAGES[damage](stopped / "last.ckpt")

    with pytest.raises(RunError, match=r"last\.ckpt.*expected a checkpoint that `lowbit train` wrote"):
        trainer.resume(stopped)


CHANGES: dict[str, Any] = {
    "a step that is a text": lambda content: content["loops"]["fit_loop"]["epoch_progress"].update(current="x"),
    "a rate that is another": lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr=1.5),
    "momentum of another shape": lambda content: content["optimizer_states"][0]["state"][0].update(
        momentum_buffer=torch.zeros(3)
    ),
    "a setting that is a tensor": lambda content: content["lowbit"]["config"].update(lr=torch.zeros(3)),
    "no entry of the schedule": lambda content: content["lr_schedulers"][0].pop("lr_lambdas"),
    "a key of its own": lambda content: content.update(mine=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_that_was_changed_is_refused(change: str, stopped: Path) -> None:
    """What torch and Lightning would believe, up to a traceback or to other weights, is no checkpoint of lowbit."""
    (stopped / "last-1.ckpt").unlink()
    content = torch.load(stopped / "last.ckpt", weights_only=True)
    CHANGES[change](content)
    torch.save(content, stopped / "last.ckpt")

    with pytest.raises(RunError, match=r"was changed after it was written; expected a checkpoint"):
        trainer.resume(stopped)


def test_weights_of_a_checkpoint_may_be_changed(stopped: Path) -> None:
    """Elements of tensors are the user's: a run goes on from averaged weights."""
    content = torch.load(stopped / "last.ckpt", weights_only=True)
    content["state_dict"]["model.head.bias"] += 1
    torch.save(content, stopped / "last.ckpt")

    trainer.resume(stopped)

    biases = [found["state_dict"]["model.head.bias"].cpu() for found in (last(stopped), content)]
    assert torch.equal(*biases)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_does_not_run(write: Any, stopped: Path, tmp_path: Path) -> None:
    """A pickle with code, in torch's container or bare, is damaged, and its code does not run."""
    write({"lowbit": Payload(tmp_path / "ran")}, stopped / "last.ckpt")

    trainer.resume(stopped)

    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    """A checkpoint with another seed is refused with both values."""
    trainer.train(config(tmp_path / "other", seed=1, checkpoint_every=3))
    shutil.copy(tmp_path / "other" / "last.ckpt", stopped / "last.ckpt")

    with pytest.raises(RunError, match=r"another run: it has seed=1, and .*config\.yaml has 0"):
        trainer.resume(stopped)


def test_checkpoint_of_another_model_is_refused(stopped: Path) -> None:
    """A checkpoint whose tensors are not the model's is refused with a tensor's name."""
    content = last(stopped)
    content["state_dict"]["model.head.weight"] = torch.zeros(3, 3)
    checkpoint.save(stopped / "last.ckpt", content)

    with pytest.raises(RunError, match=r"does not fit the model mlp.*model\.head\.weight"):
        trainer.resume(stopped)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """A folder without settings is a UsageError that says how to begin."""
    with pytest.raises(UsageError, match=r"not a run folder.*lowbit train"):
        trainer.resume(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "just words", "epochs: 3", "epochs: many\nmodel: mlp", "\x00"])
def test_damaged_settings_are_named(text: str, stopped: Path) -> None:
    """Settings that cannot be read are a RunError with the file's path."""
    (stopped / "config.yaml").write_text(text)

    with pytest.raises(RunError, match=r"config\.yaml is damaged"):
        trainer.resume(stopped)


def test_a_run_leaves_its_ledger(complete: Path) -> None:
    """Every step and evaluation of a run is in its ledger, with samples and scores."""
    ledger = Ledger.load(complete / "ledger.jsonl")

    assert [step.samples for step in ledger.steps] == [64] * (3 * STEPS)
    assert [evaluation.step for evaluation in ledger.evaluations] == [STEPS, 2 * STEPS, 3 * STEPS]
    best = ledger.best()
    assert best is not None
    assert best.name == "test_accuracy"
    assert ledger.never_ran() == []
    assert ledger.notes == []


def test_a_run_leaves_its_seconds_and_joules(complete: Path) -> None:
    """What was measured is beside the ledger, one line for each start, and says where energy is not available."""
    (line,) = [json.loads(text) for text in (complete / "measured.jsonl").read_text().splitlines()]

    assert (line["from_step"], line["to_step"]) == (0, 3 * STEPS)
    assert line["seconds_per_step"] > 0
    assert line["joules"] is None or line["joules"] > 0
    assert set(read_measured(complete)) == {"seconds per step", "energy"}


def test_a_run_without_a_ledger_begins_one(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lost its ledger goes on with one that says where it begins, to the same end."""
    out, save = tmp_path / "run", checkpoint.save

    def stop(path: Path, content: Any, **how: Any) -> None:
        save(path, content, **how)
        if content["global_step"] == 6:
            raise RunError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        with pytest.raises(RunError, match="stop"):
            trainer.train(config(out, checkpoint_every=3))
    (out / "ledger.jsonl").unlink()
    trainer.resume(out)

    ledger = Ledger.load(out / "ledger.jsonl")
    assert (ledger.first_step, len(ledger.steps)) == (6, 3 * STEPS - 6)
    assert "earlier steps are not in it" in ledger.notes[0]
    assert same(last(out), last(complete))


def test_a_trained_model_comes_back(complete: Path) -> None:
    """The model of a run's checkpoint has its weights and formats."""
    model, loaded = trainer.trained(complete)

    saved = last(complete)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in model.state_dict().items())
    assert loaded.task.classes == 10
    with pytest.raises(UsageError, match="checkpoint"):
        trainer.trained(complete.parent)
