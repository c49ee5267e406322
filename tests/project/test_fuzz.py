"""Files of a run folder and command lines that are wrong: small, deterministic versions of benchmarks/fuzz_*.py."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lowbit
from helpers import script
from lowbit import Ledger, RunError, UsageError
from lowbit.inputs import checks
from lowbit.inputs.checks import fits
from lowbit.train import folder, measured
from lowbit.train.config import Result, TrainConfig, may_lack

VALUES: list[Any] = [None, True, -5, 1.5, math.nan, 2**70, "x", [], {}, [None], {"x": 1}, [[1]]]


def bent(record: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """A record with each of its fields changed, and with one more and one fewer."""
    for name in record:
        for value in VALUES:
            yield name, value, {**record, name: value}
        yield name, "absent", {key: value for key, value in record.items() if key != name}
    yield "extra", "there", {**record, "extra": 1}


def accepted(read: Callable[[], object]) -> bool:
    """Whether a file is read; an error of one line is the other thing that may happen."""
    try:
        read()
    except (RunError, UsageError) as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said
    assert len(said) < 1000
    return False


def test_a_setting_of_another_type_is_a_damaged_file(tmp_path: Path) -> None:
    """Each setting of a run with each wrong value is one line; the only ones read are legal settings."""
    good = TrainConfig(model="mlp", data="digits", out=tmp_path).resolved(threads=1, amp="none").to_dict()
    read = []

    for name, value, values in bent(good):
        if accepted(partial(TrainConfig.from_dict, values, out=tmp_path)):
            read.append((name, value))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**good, "keep": True}))

    hints = checks._hints_of(TrainConfig)
    # A run that is older than a setting lacks it: it is left open.
    left_open = {(name, "absent") for name in may_lack()}
    assert left_open <= {(name, value) for name, value in read if isinstance(value, str)}
    others = [(name, value) for name, value in read if not (value == "absent" and name in may_lack())]
    assert [(name, value) for name, value in others if name not in hints or not fits(value, hints[name])] == []
    assert ("batch_size", True) not in read
    assert ("lr", math.nan) not in read
    assert 0 < len(others) < len(good) * len(VALUES) / 5
    with pytest.raises(RunError, match=r"config.yaml is damaged: keep must be"):
        folder.read_settings(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\xff", b"[1]", b"x", b"model: [", b"- " * 1500, b"a: &a [*a]", b"{" * 1500]
)
@pytest.mark.parametrize("name", ["config.yaml", "result.json"])
def test_a_file_of_something_else_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    """Empty, binary, foreign and deeply nested files are a RunError that names the file."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(RunError, match=name):
        (folder.read_settings if name == "config.yaml" else folder.read_result)(tmp_path)


def test_a_result_of_another_type_is_a_damaged_file(tmp_path: Path) -> None:
    """Each field of result.json with each wrong value is one line, or is what the field may be."""
    good = Result(
        test_loss=1.0, test_accuracy=0.5, test_bits_per_byte=None, seconds_per_step=None, steps=3, recipe="sbm8",
        converted=1, layers=1, out=tmp_path, macs=5, bit_operations=9, low=None, model="mlp", data="digits", seed=0,
        engines={"int8": 3}, versions={"torch": "2"},
    )  # fmt: skip
    record = {name: value for name, value in vars(good).items() if name != "out"}
    hints, wrong, number = checks._hints_of(Result), [], 0

    for name, value, values in bent(record):
        (tmp_path / "result.json").write_text(json.dumps(values))
        number += 1
        if accepted(partial(folder.read_result, tmp_path)) and not fits(value, hints[name]):
            wrong.append((name, value))

    later = ("seed", "engines", "versions", "memory", "processes")  # results of earlier versions lack them
    assert wrong == [("test_loss", None), *((name, "absent") for name in later)]  # null: a loss that is not a number
    assert number > 100


def ledger_lines(path: Path) -> list[dict[str, Any]]:
    """A ledger of two steps and an evaluation as records without checksums."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    lowbit.convert_(model, "sbm8")
    with lowbit.Meter(model, Ledger.create(path, model="m", layers=["0", "2"])) as meter:
        for _ in range(2):
            model(torch.ones(2, 1, 4, 4)).sum().backward()
            meter.step()
        meter.evaluated("accuracy", 0.5)
        meter.ledger.add_note("a note")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "crc"} for record in records]


def test_a_record_of_another_type_is_a_damaged_ledger(tmp_path: Path) -> None:
    """Each field of each kind of record with each wrong value is one line, or a cost can be shown of what was read."""
    path = tmp_path / "ledger.jsonl"
    records = ledger_lines(path)
    kinds = {record["record"]: number for number, record in enumerate(records)}
    assert set(kinds) == {"ledger", "product", "program", "step", "evaluation", "note"}
    number = 0

    for index in kinds.values():
        for _, _, changed in bent(records[index]):
            lines = [*records[:index], changed, *records[index + 1 :]]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            number += 1
            if accepted(lambda: Ledger.load(path)):
                cost = lowbit.Cost(Ledger.load(path), lowbit.hardware.BitFusion())
                assert str(cost)
                assert json.loads(cost.to_json())
                assert cost.to_csv()

    assert number > 300


def test_a_measured_line_of_another_type_is_named(tmp_path: Path) -> None:
    """Each field of measured.jsonl with each wrong value is one line, or is shown."""
    good = {"from_step": 0, "to_step": 3, "seconds_per_step": 0.1, "joules": 5.0, "reason": "RAPL"}
    read = 0

    for _, _, changed in bent(good):
        (tmp_path / "measured.jsonl").write_text(json.dumps(changed) + "\n")
        read += accepted(lambda: measured.read(tmp_path))

    assert read < 20
    (tmp_path / "measured.jsonl").write_bytes(b"\xff\0")
    assert not accepted(lambda: measured.read(tmp_path))


def test_command_lines_end_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random command lines and damaged folders of benchmarks/fuzz_cli.py end with 0, 1 or 2 and a few lines."""
    monkeypatch.chdir(tmp_path)
    fuzz = script("fuzz_cli")

    counts, wrong = fuzz.fuzz(50, 25, seed=1, alarm=False, say=lambda _: None)

    assert wrong == []
    assert sum(counts.values()) == 75
    assert copy.copy(counts)["train"] > 0


def test_random_calls_leave_a_model_that_trains_and_restores() -> None:
    """Random calls of benchmarks/fuzz_api.py work or are refused, and parameters are what they were."""
    counts, wrong = script("fuzz_api").fuzz(500, seed=1, say=lambda _: None)

    assert wrong == []
    assert 100 < counts["(refused)"] < 400
