"""One process writes to a run folder at a time."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import config

from lowbit.cli import main as cli
from lowbit.errors import RunError
from lowbit.train import trainer
from lowbit.train.lock import LOCK, locked, refuse_held


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
