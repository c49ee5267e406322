"""The files of a run folder: written whole, read up to a limit, links not followed."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, last

from lowbit.cli import main as cli
from lowbit.errors import RunError, UsageError
from lowbit.inputs import files
from lowbit.train import checkpoint, folder, trainer


def test_taken_folder_is_refused_untouched(tmp_path: Path) -> None:
    """A folder with something in it is refused, with both ways out, and stays as it was."""
    (tmp_path / "notes").write_text("mine")

    with pytest.raises(UsageError, match=r"lowbit resume.*--out"):
        trainer.train(config(tmp_path))

    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize("text", ["a: [", "just words", "epochs: 3", "epochs: many\nmodel: mlp", "\x00"])
def test_damaged_settings_are_named(text: str, stopped: Path) -> None:
    """Settings that cannot be read are a RunError with the file's path."""
    (stopped / "config.yaml").write_text(text)

    with pytest.raises(RunError, match=r"config\.yaml is damaged"):
        trainer.resume(stopped)


@pytest.mark.parametrize("name", ["last.ckpt", "result.json", "config.yaml"])
def test_a_link_is_replaced_not_followed(name: str, tmp_path: Path) -> None:
    """What a link in the folder leads to keeps its content."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine")

    files.write_text(tmp_path / name, "new")

    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / name).read_text() == "new"
    assert not (tmp_path / name).is_symlink()


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


def test_a_result_says_what_ran(complete: Path) -> None:
    """Model, data, seed, engines, versions and the memory of a step are in result.json, and are read back."""
    values = json.loads((complete / "result.json").read_text())
    result = folder.read_result(complete)

    assert (values["model"], values["data"], values["seed"]) == ("mlp", "digits", 0)
    assert sum(values["engines"].values()) == 3 * values["converted"]
    assert values["versions"]["torch"] == torch.__version__
    assert result.memory is not None
    assert result.memory.states == result.memory.gradients  # SGD keeps one momentum for each weight
    assert result.memory.activations > 0
    assert result.memory.update > 0


def test_a_resumed_run_measures_its_memory_too(halfway: Path, complete: Path) -> None:
    """The memory of a step is that of a run that was never stopped."""
    assert trainer.resume(halfway).memory == folder.read_result(complete).memory


def test_a_result_of_an_earlier_version_is_read(complete: Path, tmp_path: Path) -> None:
    """A file without the later fields and with a bare NaN gives a result with these left open."""
    values = json.loads((complete / "result.json").read_text())
    for name in ("model", "data", "seed", "engines", "versions", "memory"):
        del values[name]
    (tmp_path / "result.json").write_text(json.dumps(values | {"test_loss": math.nan}))

    result = folder.read_result(tmp_path)
    assert math.isnan(result.test_loss)
    assert (result.model, result.seed, result.engines, result.memory) == ("", None, {}, None)


def test_a_loss_that_is_no_number_is_written_as_null(complete: Path, tmp_path: Path) -> None:
    """The file is JSON for any reader, and the result comes back with nan."""
    folder.write_result(replace(folder.read_result(complete), test_loss=math.nan, out=tmp_path))

    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert read["test_loss"] is None
    assert math.isnan(folder.read_result(tmp_path).test_loss)
