"""Runs in processes of their own: what is complete stays, what began goes on, and a kill loses neither."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import last, same_end

from lowbit.errors import RunError, Stopped, UsageError
from lowbit.train import trainer
from lowbit.train.sweep.run import run_sweep
from lowbit.train.sweep.settings import Sweep, read_sweep

TRAIN: dict[str, Any] = {"model": "mlp", "data": "digits", "subset": 320, "batch_size": 64, "epochs": 3, "threads": 1}


def sweep_of(out: Path, **changes: Any) -> Sweep:
    """Two seeds of a run that takes a moment."""
    values: dict[str, Any] = {"train": TRAIN, "grid": {"seed": [0, 1]}}
    return Sweep(**(values | {"out": out} | changes))


def test_the_runs_are_those_of_the_trainer(tmp_path: Path) -> None:
    """A run of a sweep ends with the weights and the ledger of the same run by itself."""
    lines: list[str] = []
    done = run_sweep(sweep_of(tmp_path / "sweep", jobs=2), lines.append)
    (alone,) = sweep_of(tmp_path / "alone", grid={"seed": [1]}).plan().values()
    trainer.train(alone)

    assert [folder.name for folder in done.folders] == ["seed0", "seed1"]
    assert same_end(tmp_path / "sweep" / "seed1", tmp_path / "alone" / "seed1")
    assert not same_end(tmp_path / "sweep" / "seed0", tmp_path / "alone" / "seed1")
    assert sorted(line.split()[0] for line in lines) == ["done", "done", "started", "started"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["seed0", "seed1", "sweep.yaml"]


def test_what_is_complete_is_not_done_again(tmp_path: Path) -> None:
    """The same call does nothing, and a longer list of seeds trains the new one only."""
    run_sweep(sweep_of(tmp_path), lambda _: None)
    before = (tmp_path / "seed0" / "result.json").stat().st_mtime_ns
    lines: list[str] = []

    done = run_sweep(sweep_of(tmp_path, grid={"seed": [0, 1, 2]}), lines.append)

    assert len(done.folders) == 3
    assert [line.split()[:2] for line in lines] == [["2", "of"], ["started", "seed2"], ["done", "seed2"]]
    assert (tmp_path / "seed0" / "result.json").stat().st_mtime_ns == before


def test_runs_of_other_settings_are_refused(tmp_path: Path) -> None:
    """A folder that holds another run is named with both values; where a run is executed makes it no other."""
    run_sweep(sweep_of(tmp_path), lambda _: None)

    with pytest.raises(UsageError, match=r"seed0 is a run with epochs=3, and epochs=4 is asked for.*--out"):
        run_sweep(sweep_of(tmp_path, train=TRAIN | {"epochs": 4}))
    assert (
        len(run_sweep(sweep_of(tmp_path, train=TRAIN | {"threads": 2, "logger": "csv"}), lambda _: None).folders) == 2
    )


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """The reason is kept in one line, the others are complete, and no folder is left behind."""
    lines: list[str] = []

    done = run_sweep(sweep_of(tmp_path, grid={"model": ["nonet", "mlp"]}, train=_without("model")), lines.append)

    assert [folder.name for folder in done.folders] == ["mlp"]
    ((folder, reason),) = done.failed.items()
    assert folder.name == "nonet"
    assert "unknown model 'nonet'" in reason
    assert any(line.startswith("failed   nonet: ") and line.endswith("(1 of 2)") for line in lines)
    assert not folder.exists()


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in TRAIN.items() if key != name}


def test_a_run_folder_is_no_place_for_a_sweep(tmp_path: Path) -> None:
    """A folder with a run in it is refused, and so is a file."""
    run_sweep(sweep_of(tmp_path), lambda _: None)
    (tmp_path / "file").write_text("mine")

    with pytest.raises(UsageError, match="is a run folder"):
        run_sweep(sweep_of(tmp_path / "seed0"))
    with pytest.raises(UsageError, match="is not a folder"):
        run_sweep(sweep_of(tmp_path / "file"))


def test_a_signal_saves_the_runs_and_the_same_call_goes_on(tmp_path: Path) -> None:
    """SIGTERM ends a sweep with its runs saved; going on, it reaches the weights of a run that never stopped."""
    sweep = sweep_of(tmp_path / "sweep", train=TRAIN | {"epochs": 20}, grid={"seed": [0]})

    def tell(line: str) -> None:
        if line.startswith("started"):
            _when(tmp_path / "sweep" / "seed0" / "last.ckpt", lambda: os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(Stopped, match="the same command goes on"):
        run_sweep(sweep, tell)
    stopped_at = last(tmp_path / "sweep" / "seed0")["global_step"]
    lines: list[str] = []
    run_sweep(sweep, lines.append)

    (config,) = sweep_of(tmp_path / "alone", train=sweep.train, grid={"seed": [0]}).plan().values()
    trainer.train(config)
    assert 0 < stopped_at < 100
    assert lines[0] == "resumed  seed0"
    assert same_end(tmp_path / "sweep" / "seed0", tmp_path / "alone" / "seed0")


def _when(path: Path, act: Any) -> None:
    """Do something once a file is there, from a thread."""
    import threading

    def wait() -> None:
        until = time.monotonic() + 120
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_a_sweep_survives_kill_9(tmp_path: Path) -> None:
    """Killed with its process, it goes on: the finished run is not touched, the half-finished one resumes."""
    path = tmp_path / "study.yaml"
    values = {"out": str(tmp_path / "runs"), "train": _without("epochs"), "grid": {"epochs": [1, 60]}}
    path.write_text(yaml.safe_dump(values))
    finished, half = tmp_path / "runs" / "epochs1", tmp_path / "runs" / "epochs60"
    code = "import sys; from lowbit.cli.main import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, "sweep", str(path)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (half / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.02)

    os.kill(json.loads((half / ".lock").read_text())["pid"], signal.SIGKILL)
    process.kill()
    process.wait()
    before = {file: (finished / file).stat().st_mtime_ns for file in ("result.json", "ledger.jsonl", "last.ckpt")}
    kept = last(half)["global_step"]
    lines: list[str] = []
    done = run_sweep(read_sweep(path), lines.append)

    assert len(done.folders) == 2
    assert lines[:2] == ["1 of 2 runs are complete already", "resumed  epochs60"]
    assert {file: (finished / file).stat().st_mtime_ns for file in before} == before
    (start,) = [json.loads(line) for line in (half / "measured.jsonl").read_text().splitlines()]
    assert start["from_step"] >= kept > 0
    assert start["to_step"] == 300


def test_ctrl_c_is_answered_once(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to every process; only the command says something, even while the first run begins."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "runs"), "train": TRAIN, "grid": {"seed": [0, 1]}}))
    code = "import sys; from lowbit.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "sweep", str(path)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()

    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.rstrip().endswith("lowbit: SIGINT: stopped; the same command goes on")


def test_a_process_that_dies_is_a_failed_run(tmp_path: Path) -> None:
    """A run whose process is killed by the system is reported with its code, and the same call goes on with it."""
    sweep = sweep_of(tmp_path, train=TRAIN | {"epochs": 400, "checkpoint_every": 2}, grid={"seed": [0]})
    lock = tmp_path / "seed0" / ".lock"

    def tell(line: str) -> None:
        if line.startswith("started"):
            checkpoint = tmp_path / "seed0" / "last.ckpt"
            _when(checkpoint, lambda: os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL))

    done = run_sweep(sweep, tell)

    assert "its process ended with code -9" in done.failed[tmp_path / "seed0"]


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    """A sweep whose folder another process holds is refused by name."""
    import fcntl

    (tmp_path / ".lock").write_text("{}")
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is in use by"):
            run_sweep(sweep_of(tmp_path))
