"""A run folder is safe: one writer, signals, damage, divergence, changed data, and changed settings."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_trainer import STEPS, config, last, same
from torch import nn

from lowbit.cli import main as cli
from lowbit.errors import RunError, Stopped, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.inputs import files
from lowbit.train import checkpoint, models, trainer
from lowbit.train.callbacks import TrainingRows
from lowbit.train.config import lr_factor
from lowbit.train.data import named
from lowbit.train.data.source import Sets
from lowbit.train.lock import LOCK, locked, refuse_held
from lowbit.train.module import Module
from lowbit.train.rows import Rows


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGHUP is heard, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of 15 steps that saved after each third."""
    out = tmp_path_factory.mktemp("run") / "whole"
    trainer.train(config(out, checkpoint_every=3))
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the complete run."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.fixture
def stopped(copied: Path) -> Path:
    """The same without its result, so that resume goes on from step 15."""
    (copied / "result.json").unlink()
    return copied


@pytest.fixture
def halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that a signal ended after step 7; its checkpoints are of steps 7 and 6."""
    with monkeypatch.context() as patch:
        signal_at(7, signal.SIGTERM, patch)
        with pytest.raises(Stopped):
            trainer.train(config(tmp_path / "run", checkpoint_every=3))
    return tmp_path / "run"


def signal_at(step: int, number: int, patch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Send this process a signal within a step."""

    def send(_: object, trainer_: Any, *__: object) -> None:
        if trainer_.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    patch.setattr(TrainingRows, "on_train_batch_end", send)


def same_end(out: Path, whole: Path) -> bool:
    """Whether two runs ended with the same weights, optimizer and ledger."""
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    ledgers = [(path / "ledger.jsonl").read_bytes() for path in (out, whole)]
    return ledgers[0] == ledgers[1] and all(same(last(out)[key], last(whole)[key]) for key in kept)


# The lock.


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    """Whoever finds the folder locked gets an error with the holder's number, machine, time and command."""
    with locked(tmp_path):
        for second in (locked(tmp_path).__enter__, lambda: refuse_held(tmp_path)):
            with pytest.raises(RunError, match=rf"in use by process {os.getpid()} on .+ since 2.+ UTC \(.+\)"):
                second()

    assert list(tmp_path.iterdir()) == []


def test_train_and_resume_refuse_a_folder_in_use(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands exit with 1 beside a running process, and change nothing."""
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with locked(stopped):
        codes = [
            cli.main(["resume", str(stopped)]),
            cli.main(["train", "--model", "mlp", "--data", "digits", "--out", str(stopped)]),
        ]

    assert codes == [1, 1]
    assert capsys.readouterr().err.count("in use by process") == 2
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    """The kernel gives the lock back: what the dead holder wrote in the file is not believed."""
    script = """
import sys, time
from pathlib import Path
from lowbit.train.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunError, match=f"process {holder.pid} "):
            refuse_held(tmp_path)
        holder.kill()

    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path)])
def test_a_lock_that_is_not_a_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    """A link, a folder or a FIFO in the lock's place is an error that names it, not a wait and not followed."""
    make(tmp_path / LOCK)

    with pytest.raises(RunError, match=r"cannot lock the run folder: .*\.lock"), locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the system says that it has no locks, the run goes on and stderr says so."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with locked(tmp_path):
        pass

    assert "has no locks (No locks available)" in capsys.readouterr().err


def test_what_a_killed_set_up_leaves_does_not_take_the_folder(tmp_path: Path) -> None:
    """A folder with a lock's file and an unfinished file only is free for a new run, which removes both."""
    (tmp_path / LOCK).write_text("stale")
    (tmp_path / ".0123456789abcdef.lowbit.part").write_text("half")

    trainer.train(config(tmp_path, max_steps=1))

    assert not (tmp_path / LOCK).exists()
    assert not list(tmp_path.glob("*.part"))


# Signals.


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_the_run_after_its_step(
    name: str, code: int, whole: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is finished and saved, the exit code is the signal's, and resume goes on from there to the same end."""
    out = tmp_path / "run"
    handler = signal.getsignal(getattr(signal, name))
    flags = ["--model", "mlp", "--data", "digits", "--subset", "320", "--batch-size", "64", "--lr", "0.05"]
    with monkeypatch.context() as patch:
        signal_at(7, getattr(signal, name), patch)
        found = cli.main(["train", *flags, "--epochs", "3", "--threads", "1", "--out", str(out)])
    said = capsys.readouterr().err
    step = last(out)["global_step"]
    trainer.resume(out)

    assert (found, step) == (code, 7)
    assert f"{name}: stopped; `lowbit resume {out}` starts from step 7" in said
    assert signal.getsignal(getattr(signal, name)) is handler
    assert same_end(out, whole)


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal of the kind does not wait: the run goes on from the checkpoint before."""
    signal_at(7, signal.SIGTERM, monkeypatch, times=2)

    with pytest.raises(Stopped, match="starts from step 6"):
        trainer.train(config(tmp_path / "run", checkpoint_every=3))

    assert last(tmp_path / "run")["global_step"] == 6


def test_a_signal_in_an_evaluation_waits_for_it(whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The epoch's evaluation and checkpoint are made, and the next epoch is not begun."""
    out, sent = tmp_path / "run", []

    def send(*_: object) -> None:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    with monkeypatch.context() as patch:
        patch.setattr(Module, "on_validation_epoch_start", send_before(send, Module))
        with pytest.raises(Stopped, match=f"starts from step {STEPS}"):
            trainer.train(config(out))
    assert last(out)["global_step"] == STEPS
    trainer.resume(out)

    assert same_end(out, whole)


def send_before(send: Callable[..., None], module: Any) -> Callable[..., None]:
    """The method with a signal before it."""
    method = module.on_validation_epoch_start

    def both(self: object) -> None:
        send()
        method(self)

    return both


@pytest.mark.parametrize("moment", ["assemble", "write_sources", "_prove", "make_trainer"])
def test_a_signal_before_the_first_step_ends_at_once(moment: str, tmp_path: Path, monkeypatch: Any) -> None:
    """During set-up there is nothing to finish; the run begins at step 0 when it is given again or resumed."""
    out, original = tmp_path / "run", getattr(trainer, moment)

    def send(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, moment, send)
        with pytest.raises(Stopped, match="give the command again" if moment == "assemble" else "from step 0"):
            trainer.train(config(out, max_steps=1))

    assert (trainer.train(config(out, max_steps=1)) if moment == "assemble" else trainer.resume(out)).steps == 1


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    """The checkpoint is whole, and the run ends with it."""
    write = torch.save

    def send(content: Any, file: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        write(content, file)

    monkeypatch.setattr(torch, "save", send)

    with pytest.raises(Stopped, match="starts from step 3"):
        trainer.train(config(tmp_path / "run", checkpoint_every=3))

    assert last(tmp_path / "run")["global_step"] == 3


def test_a_signal_at_the_last_step_leaves_a_complete_run(tmp_path: Path, monkeypatch: Any) -> None:
    """The run is complete and says so, with the signal's exit code all the same."""
    signal_at(3 * STEPS, signal.SIGTERM, monkeypatch)

    with pytest.raises(Stopped, match="the run is complete"):
        trainer.train(config(tmp_path / "run"))

    assert trainer.resume(tmp_path / "run").steps == 3 * STEPS


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under nohup the end of the session does not end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(7, signal.SIGHUP, monkeypatch)
        result = trainer.train(config(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGHUP, before)

    assert result.steps == 3 * STEPS


# Checkpoints.


def test_checkpoints_by_time_change_no_bit(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zero minutes every step is saved, without minutes the ends of epochs are, and the weights are the same."""
    save = checkpoint.save
    steps: list[int] = []

    def note(path: Path, content: Any, **how: Any) -> None:
        steps.append(content["global_step"])
        save(path, content, **how)

    monkeypatch.setattr(checkpoint, "save", note)
    trainer.train(config(tmp_path / "often", checkpoint_minutes=0.0))
    trainer.train(config(tmp_path / "never", checkpoint_minutes=None))

    assert steps == [*range(1, 3 * STEPS + 1), STEPS, 2 * STEPS, 3 * STEPS]
    assert same_end(tmp_path / "often", whole)
    assert same_end(tmp_path / "never", whole)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    """As many as asked for stay, the newest first, none else."""
    trainer.train(config(tmp_path / "run", checkpoint_every=3, keep=keep))

    kept = checkpoint.kept(tmp_path / "run" / "last.ckpt")
    assert [checkpoint.load(path)["global_step"] for path in kept] == [15, 12, 10, 9][:keep]


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A damage that puts something else in the checkpoint's place."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "fifo": replaced(os.mkfifo),
    "folder": replaced(os.mkdir),
    "link": replaced(lambda path: path.symlink_to("last-1.ckpt")),
    "dangling link": replaced(lambda path: path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("finished", [False, True], ids=["stopped", "finished"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    damage: str, finished: bool, whole: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stderr names the damaged file, which is set aside; the run goes on from step 12 to the same end."""
    if not finished:
        (copied / "result.json").unlink()
    DAMAGES[damage](copied / "last.ckpt")

    result = trainer.resume(copied)

    said = capsys.readouterr().err
    assert "last.ckpt" in said.splitlines()[0]
    assert "It is now last.ckpt.damaged" in said
    assert f"going on from {copied / 'last-1.ckpt'}, of step 12" in said
    assert result.steps == 3 * STEPS
    assert same_end(copied, whole)


def test_no_good_checkpoint_is_an_error_that_keeps_them(stopped: Path) -> None:
    """Where all are damaged each is named, none is removed, and the run does not begin again by itself."""
    for path in checkpoint.kept(stopped / "last.ckpt"):
        flip_a_bit(path)

    with pytest.raises(RunError, match=r"last\.ckpt.*last-1\.ckpt.*start again from step 0, remove"):
        trainer.resume(stopped)

    assert len(checkpoint.kept(stopped / "last.ckpt")) == 2


def test_a_finished_run_without_checkpoints_gives_its_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints that were removed to save space are not trained again, and stderr says that they are gone."""
    for path in checkpoint.kept(copied / "last.ckpt"):
        path.unlink()

    assert trainer.resume(copied).steps == 3 * STEPS
    assert "its checkpoints are gone" in capsys.readouterr().err


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that ruins a weight stops the run at its save; the error names weight, step and way on, which works."""
    out = tmp_path / "run"

    def ruin(_: object, trainer_: Any, module: Any, *__: object) -> None:
        if trainer_.global_step == 9:
            module.model.head.weight.data[0, 0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRows, "on_train_batch_end", ruin)
        with pytest.raises(RunError, match=r"after step 9 is not finite.*head\.weight.*of step 6.*resume .* --lr"):
            trainer.train(config(out, checkpoint_every=3))

    steps = [checkpoint.load(path)["global_step"] for path in checkpoint.kept(out / "last.ckpt")]
    assert steps == [6, 5]
    assert trainer.resume(out, {"lr": 0.01}).steps == 3 * STEPS


def test_an_optimizer_that_is_not_finite_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The momentum counts too."""

    def ruin(_: object, trainer_: Any, *__: object) -> None:
        if trainer_.global_step == 3:
            next(iter(trainer_.optimizers[0].state.values()))["momentum_buffer"].flatten()[0] = float("inf")

    monkeypatch.setattr(TrainingRows, "on_train_batch_end", ruin)

    with pytest.raises(RunError, match=r"after step 3 is not finite.*momentum_buffer"):
        trainer.train(config(tmp_path / "run", checkpoint_every=3))


def test_a_mask_of_infinities_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is infinite from the beginning, as of an attention mask, is no divergence."""
    build = models.build

    def masked(*args: Any) -> nn.Module:
        model = build(*args)
        model.register_buffer("mask", torch.full((2,), -torch.inf))
        return model

    monkeypatch.setattr(models, "build", masked)

    assert trainer.train(config(tmp_path / "run")).steps == 3 * STEPS


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A run that diverges in its first steps can be resumed with another rate, from step 0."""
    out = tmp_path / "run"

    with pytest.raises(RunError, match=r"the loss is .*of step 0: `lowbit resume .* --lr RATE`"):
        trainer.train(config(out, recipe="fp32", lr=1e30, schedule="constant"))

    assert trainer.resume(out, {"lr": 0.05}).steps == 3 * STEPS


# Changed settings and data.


def test_a_changed_rate_counts_from_its_step_and_is_recorded(halfway: Path) -> None:
    """From step 7 on the rate follows the schedule to the new peak; config.yaml has both values and the step."""
    trainer.resume(halfway, {"lr": 0.02, "weight_decay": 0.5})

    settings = yaml.safe_load((halfway / "config.yaml").read_text())
    group = last(halfway)["optimizer_states"][0]["param_groups"][0]
    with open(halfway / "csv" / "metrics.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["train_lr"]]
    assert settings["lr"] == 0.02
    assert settings["changes"] == [
        {"from_step": 7, "lr": {"from": 0.05, "to": 0.02}, "weight_decay": {"from": 1e-4, "to": 0.5}}
    ]
    # The row of step 10 is written after that step, when its rate was the one of 9 steps done.
    assert (row["step"], float(row["train_lr"])) == ("10", pytest.approx(0.02 * lr_factor("one-cycle", 9, 15)))
    assert (group["weight_decay"], group["initial_lr"]) == (0.5, 0.02)


def test_a_change_that_changes_nothing_changes_no_bit(halfway: Path, whole: Path) -> None:
    """The same rate again, and other checkpoints, end with the same weights."""
    trainer.resume(halfway, {"lr": 0.05, "checkpoint_every": 2, "keep": 1})

    assert same_end(halfway, whole)
    assert len(checkpoint.kept(halfway / "last.ckpt")) == 1


def test_a_changed_run_resumes_with_its_changes(halfway: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped after the change and resumed, also from the checkpoint before it, a run keeps to the new rate."""
    copied = Path(shutil.copytree(halfway, tmp_path / "copied"))
    trainer.resume(halfway, {"lr": 0.02})
    with monkeypatch.context() as patch:
        signal_at(8, signal.SIGTERM, patch)
        with pytest.raises(Stopped):
            trainer.resume(copied, {"lr": 0.02})
    trainer.resume(copied)
    assert same_end(copied, halfway)

    (copied / "result.json").unlink()
    flip_a_bit(copied / "last.ckpt")
    trainer.resume(copied)
    assert same_end(copied, halfway)


def test_a_change_moves_back_with_the_run(halfway: Path) -> None:
    """Where the run goes on from an older checkpoint than the change, the change counts from there."""
    with pytest.raises(RunError, match="stop"):
        stop_before_training(halfway, {"lr": 0.02})
    flip_a_bit(halfway / "last.ckpt")
    trainer.resume(halfway)

    assert [change["from_step"] for change in yaml.safe_load((halfway / "config.yaml").read_text())["changes"]] == [6]


def stop_before_training(out: Path, changes: dict[str, object]) -> None:
    """Resume and stop once the settings are written."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise RunError("stop")

        patch.setattr(trainer, "_run", stop)
        trainer.resume(out, changes)


def test_a_complete_run_goes_on_with_more_epochs(copied: Path) -> None:
    """Two more epochs follow the three, and ledger, log and result have all five."""
    result = trainer.resume(copied, {"epochs": 5})

    assert result.steps == 5 * STEPS
    assert len(Ledger.load(copied / "ledger.jsonl").steps) == 5 * STEPS
    assert trainer.resume(copied) == result


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": -1.0}, UsageError, "lr must be"),
        ({"epochs": 0}, UsageError, "epochs must be"),
        ({"batch_size": 3}, UsageError, r"'batch_size'.*checkpoint_every"),
        ({"epochs": 1}, RunError, "is at step 7; expected a step from 1 to 5"),
    ],
)
def test_an_impossible_change_leaves_the_run_as_it_was(
    changes: dict[str, object], error: type[Exception], message: str, halfway: Path
) -> None:
    """A change that cannot be is refused by name, and the settings stay."""
    before = (halfway / "config.yaml").read_bytes()

    with pytest.raises(error, match=message):
        trainer.resume(halfway, changes)

    assert (halfway / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("text", ["changes: 3", "changes: [3]", "changes: [{from_step: 1, lr: 3}]"])
def test_damaged_changes_are_named(text: str, stopped: Path) -> None:
    """A history of changes that cannot be read is an error with the file's name."""
    with open(stopped / "config.yaml", "a") as file:
        file.write(text + "\n")

    with pytest.raises(RunError, match=r"config\.yaml is damaged: its changes"):
        trainer.resume(stopped)


def with_one_label_changed() -> Any:
    """The digits with another label of the first image."""
    task, train, test = named._digits()
    train.labels[0] = 9 - train.labels[0]
    return Sets(task, train, test)


def test_changed_data_are_noticed(halfway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed label is an error that says what changed; with the flag the run goes on and records it."""
    monkeypatch.setitem(named.NAMED, "digits", with_one_label_changed)

    with pytest.raises(
        RunError, match=r"digits changed since step 7: train labels \(was \w+, is \w+\)\. .*--data-changed"
    ):
        trainer.resume(halfway)
    trainer.resume(halfway, data_changed=True)

    changes = yaml.safe_load((halfway / "config.yaml").read_text())["changes"]
    assert changes == [{"from_step": 7, "data": ["train labels"]}]


# Files.


@pytest.mark.parametrize("name", ["last.ckpt", "result.json", "config.yaml"])
def test_a_link_is_replaced_not_followed(name: str, tmp_path: Path) -> None:
    """What a link in the folder leads to keeps its content."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine")

    files.write_text(tmp_path / name, "new")

    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / name).read_text() == "new"
    assert not (tmp_path / name).is_symlink()


def test_a_checkpoint_moves_no_link_and_no_folder_on(tmp_path: Path) -> None:
    """Only ordinary files become the checkpoint before the last."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "mine")

    checkpoint.save(tmp_path / "last.ckpt", {"step": 1}, keep=2)

    assert (tmp_path / "mine").read_text() == "mine"
    assert checkpoint.kept(tmp_path / "last.ckpt") == [tmp_path / "last.ckpt"]


def test_a_write_makes_a_file_of_its_own(tmp_path: Path) -> None:
    """The file that is written first has a new name each time, is never one that is there, and is gone afterwards."""
    names: list[str] = []

    def write(file: Any) -> None:
        names.extend(path.name for path in tmp_path.iterdir() if files.is_part(path))
        file.write(b"x")

    for _ in range(3):
        files.write_atomically(tmp_path / "x", write)

    assert len(set(names)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder stops the run in one line, and the checkpoint of before is intact."""
    out = tmp_path / "run"
    original = os.open

    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT and last_step() >= 6:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, flags, *rest, **named)

    def last_step() -> int:
        return int(checkpoint.load(out / "last.ckpt")["global_step"]) if (out / "last.ckpt").exists() else 0  # type: ignore[call-overload]

    monkeypatch.setattr(files.os, "open", read_only)

    with pytest.raises(
        RunError, match=r"cannot write .*last\.ckpt: Read-only file system; the one that was there is intact"
    ):
        trainer.train(config(out, checkpoint_every=3))

    assert last(out)["global_step"] == 6


def test_a_torn_line_of_measurements_is_not_written(halfway: Path) -> None:
    """The file of measurements is whole after each start."""
    trainer.resume(halfway)

    lines = (halfway / "measured.jsonl").read_text().splitlines()
    assert [json.loads(line)["to_step"] for line in lines] == [7, 15]


def test_damaged_measurements_stay_and_stop_nothing(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that are not UTF-8, without an end of line, stay as they are; the run ends, and `cost` names the file."""
    path = halfway / "measured.jsonl"
    path.write_bytes(b"\xb5{")

    assert trainer.resume(halfway).steps == 15

    damaged, start = path.read_bytes().splitlines()
    assert damaged == b"\xb5{"
    assert json.loads(start)["to_step"] == 15
    assert cli.main(["cost", str(halfway)]) == 1
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["too long", "FIFO"])
@pytest.mark.parametrize("name", ["ledger.jsonl", "measured.jsonl", "csv/metrics.csv"])
def test_files_are_read_up_to_a_limit(
    name: str, damage: str, halfway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse file of 300 GiB, and a FIFO, are named at once; a FIFO for the log's table is replaced."""
    path = halfway / name
    if damage == "FIFO":
        path.unlink()
        os.mkfifo(path)
    else:
        os.truncate(path, 300 << 30)
    command = "cost" if name == "measured.jsonl" else "resume"
    replaced = damage == "FIFO" and name == "csv/metrics.csv"

    assert cli.main([command, str(halfway)]) == (0 if replaced else 1)

    said = capsys.readouterr().err
    assert (str(path) in said and damage in said) != replaced


def test_a_nul_byte_in_the_name_is_one_clear_line(tmp_path: Path) -> None:
    """A run folder that no system can have is a usage error."""
    with pytest.raises(UsageError, match="NUL byte"):
        trainer.train(config(Path(f"{tmp_path}/a\0b")))
    with pytest.raises(UsageError, match="NUL byte"):
        trainer.resume(Path("a\0b"))


def test_a_run_with_a_damaged_ledger_goes_on_when_told(
    halfway: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged line stops resume and cost by its number; with the flag both work, and the weights are the same."""
    lines = (halfway / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"step","step":2' in line)
    lines[at] = lines[at].replace(b"64", b"65")
    (halfway / "ledger.jsonl").write_bytes(b"".join(lines))

    assert cli.main(["resume", str(halfway)]) == 1
    assert f"line {at + 1} of" in capsys.readouterr().err
    assert cli.main(["resume", str(halfway), "--drop-damaged"]) == 0
    assert cli.main(["cost", str(halfway)]) == 1
    assert cli.main(["cost", str(halfway), "--drop-damaged"]) == 0
    assert "damaged lines dropped: 1 of" in capsys.readouterr().out
    assert same(last(halfway)["state_dict"], last(whole)["state_dict"])


def test_damaged_rows_of_the_log_are_left_out_with_a_word(
    halfway: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are not a table do not stop a run: its rows from before are gone, and stderr says how many."""
    path = halfway / "csv" / "metrics.csv"
    rows = path.read_bytes().splitlines(keepends=True)
    long = b'"' + 200_000 * b"1" + b"\n"  # more than the csv module takes, after a quotation mark
    path.write_bytes(b"".join([rows[0], long, *rows[1:]]) + b"\xff\0\xfe,,,\nx,y\n")

    trainer.resume(halfway)

    assert f"3 rows of {path} are damaged and left out" in capsys.readouterr().err
    assert path.read_bytes() == (whole / "csv" / "metrics.csv").read_bytes()


def test_a_table_that_gets_a_column_is_never_without_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever write a process is killed in, the rows that were saved before are in the file."""
    path = tmp_path / "csv" / "metrics.csv"
    table = Rows(path, step=0)
    table.log_metrics({"a": 0.5}, step=1)
    table.save()
    before = path.read_bytes()
    killed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(killed))
        table.log_metrics({"b": 0.25}, step=2)
        with pytest.raises(RunError, match="No space left"):
            table.save()
        with pytest.raises(RunError, match="No space left"):
            Rows(path, step=0)
    assert path.read_bytes() == before

    table.save()
    table.log_metrics({"a": 1.0}, step=3)
    table.save()
    assert path.read_bytes() == b"a,b,step\r\n0.5,,1\r\n,0.25,2\r\n1.0,,3\r\n"
    Rows(path, step=2)
    assert path.read_bytes() == b"a,b,step\r\n0.5,,1\r\n,0.25,2\r\n"


def test_bits_planned_over_the_run_refuse_other_epochs(tmp_path: Path) -> None:
    """A cyclic schedule of 3 epochs does not become one of 4 in its middle; the complete run stays complete."""
    out = tmp_path / "run"
    result = trainer.train(config(out, recipe="cpt", cycles=3))

    with pytest.raises(RunError, match=r"does not fit these settings: .*other forward"):
        trainer.resume(out, {"epochs": 4})

    assert trainer.resume(out) == result
