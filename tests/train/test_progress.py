"""What a run says of its progress, and to whom."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import STEPS, config

from lowbit.errors import RunError
from lowbit.train import TrainConfig, progress, trainer
from lowbit.train.config import RangeTestConfig
from lowbit.train.range_test import range_test


class Heard(progress.Progress):
    """Keeps all that it hears, in order."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.events: list[Any] = []
        self.states: list[list[str]] = []
        self.closed = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Keep it."""
        self.parts.append(what)
        self.events.append(("begin", what, total, done))

    def move(self, done: int, state: progress.State = tuple) -> None:
        """Keep it."""
        self.events.append((self.parts[-1], done))
        if self.parts[-1] == "training":
            self.states.append(list(state()))

    def say(self, text: str) -> None:
        """Keep it."""
        self.events.append(text)

    def end(self) -> None:
        """Keep it."""
        self.events.append(("end", self.parts.pop()))

    def close(self) -> None:
        """Keep it."""
        self.closed += 1


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    """What a run of three epochs of `cpt` says."""
    heard = Heard()
    trainer.train(config(tmp_path_factory.mktemp("run") / "run", recipe="cpt", cycles=5), progress=heard)
    return heard


def test_every_step_is_told(heard: Heard) -> None:
    """Training moves step by step to the end that it announced."""
    steps = [event[1] for event in heard.events if event[0] == "training"]

    assert ("begin", "training", 3 * STEPS, 0) in heard.events
    assert steps == list(range(1, 3 * STEPS + 1))
    assert heard.closed == 1


def test_the_proof_and_each_evaluation_are_told(heard: Heard) -> None:
    """Both announce how long they are; of the products that are announced, the first layer needs no `grad_input`."""
    began = [event[1:] for event in heard.events if event[0] == "begin"]
    proven = [event[1] for event in heard.events if event[0] == "proof of the first step"]
    tested = [event[1] for event in heard.events if event[0] == "evaluation"]

    (_, products, _) = began[0]
    assert began[0][0] == "proof of the first step"
    assert proven == list(range(1, products))
    batches = began[2][1]
    assert [each for each in began if each[0] == "evaluation"] == [("evaluation", batches, 0)] * 3
    assert tested == list(range(1, batches + 1)) * 3


def test_a_step_says_where_it_is_and_what_is_saved(heard: Heard) -> None:
    """Epoch, loss, accuracy, bits of both directions, and the saving against both standards."""
    text = "  ".join(heard.states[7])

    assert re.fullmatch(
        r"epoch 2/3  loss \d+\.\d{3}  acc \d+\.\d %  bits \d/8  saved \d+ % of 8 bits, 9\d % of fp32", text
    )


def test_savings_are_those_of_the_bill(tmp_path: Path) -> None:
    """What the last step says is saved is what the cost of the ledger says."""
    from lowbit.evidence.ledger import Ledger
    from lowbit.report.cost import Cost

    heard = Heard()
    trainer.train(config(tmp_path / "run", recipe="cpt", cycles=5), progress=heard)

    bill = Cost(Ledger.load(tmp_path / "run" / "ledger.jsonl")).saved()
    assert heard.states[-1][-1] == f"saved {bill['static 8 bits']:.0f} % of 8 bits, {bill['fp32']:.0f} % of fp32"


def test_a_resumed_run_begins_where_it_was(halfway: Path) -> None:
    """Its first step is number 8 of 15."""
    heard = Heard()

    trainer.resume(halfway, progress=heard)

    assert heard.events[:2] == [("begin", "training", 15, 7), ("training", 8)]


def test_progress_ends_where_a_run_fails(tmp_path: Path) -> None:
    """A bar does not stay on the terminal."""
    heard = Heard()

    with pytest.raises(RunError):
        trainer.train(config(tmp_path / "run", recipe="fp32", lr=1e30, schedule="constant"), progress=heard)
    assert heard.closed == 1


def test_progress_changes_no_weight(tmp_path: Path) -> None:
    """Who listens hears; the checkpoint is the same."""
    from runs import last, same

    for name, listener in (("silent", progress.SILENT), ("heard", Heard())):
        trainer.train(config(tmp_path / name, epochs=1), progress=listener)

    assert same(last(tmp_path / "silent")["state_dict"], last(tmp_path / "heard")["state_dict"])


def test_lines_come_every_few_seconds_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve steps of a second each, every fifth is told, with what is left at that speed."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines: list[str] = []
    shown = progress.Lines(lines.append)

    shown.begin("training", 72)
    for step in range(1, 13):
        now += 1
        shown.move(step, lambda: ["loss 1"])

    assert lines == ["training 5/72  loss 1  1:07 left", "training 10/72  loss 1  1:02 left"]


def test_the_bar_shows_parts_and_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal both parts have a bar, the text of a step is below, and a line that was said stays."""
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    bar = progress.Bar()
    bar.every = 0

    bar.begin("training", 10)
    bar.move(3, lambda: ["loss 1.5"])
    bar.begin("evaluation", 4)
    bar.move(1)
    bar.end()
    bar.say("epoch 1/1 done")
    bar.close()

    text = terminal.getvalue()
    assert all(part in text for part in ("training", "3/10", "loss 1.5", "evaluation", "1/4", "epoch 1/1 done"))


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``NO_COLOR`` the bar has no colour, and with neither it has."""
    coloured = {}
    for name in ("", "1"):
        terminal = io.StringIO()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", name)
        bar = progress.Bar()
        bar.every = 0
        bar.begin("training", 10)
        bar.move(3)
        bar.close()
        coloured[name] = re.search(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[0-9;]*m", terminal.getvalue()) is not None

    assert coloured == {"": True, "1": False}


def test_without_a_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is lines for a pipe and for a dumb terminal, and a bar for another."""
    kinds = []
    for terminal, term in ((False, "xterm"), (True, "dumb"), (True, "xterm")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("TERM", term)
        kinds.append(type(progress.progress_of("auto")))

    assert kinds == [progress.Lines, progress.Lines, progress.Bar]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (92, "1:32"), (7509, "2:05:09")]
)
def test_durations(seconds: float, text: str) -> None:
    """Seconds, minutes and hours."""
    assert progress.duration(seconds) == text


def test_a_range_test_tells_its_steps() -> None:
    """The widths that may be trained give the length, and the widths of each step are told."""
    heard = Heard()
    settings = RangeTestConfig(model="mlp", data="digits", steps_per_bit=4, high=4, every=True, threads=1, subset=256)

    range_test(settings, heard)

    assert heard.events[0] == ("begin", "range test", 12, 0)
    assert heard.events[-1] == ("range test", 12)


@pytest.mark.parametrize(("when", "rows"), [(None, [5, 10, 15]), ("end", [15]), ("never", [])])
def test_evaluations_can_be_left_out(when: Any, rows: list[int], tmp_path: Path) -> None:
    """The model is tested after each epoch, once, or not at all; the weights are the same."""
    result = trainer.train(config(tmp_path / "run", evaluate=when))

    from lowbit.evidence.ledger import Ledger

    ledger = Ledger.load(tmp_path / "run" / "ledger.jsonl")
    assert [each.step for each in ledger.evaluations] == rows
    assert (result.test_accuracy is None) == (not rows)


def test_a_run_that_ends_within_an_epoch_is_tested_at_its_end(tmp_path: Path) -> None:
    """``evaluate: end`` and `max_steps` go together."""
    result = trainer.train(config(tmp_path / "run", evaluate="end", max_steps=7))

    assert (result.steps, result.test_accuracy is None) == (7, False)


def test_an_untested_run_can_be_read_and_resumed(tmp_path: Path) -> None:
    """Its result has no score, and its loss is not a number."""
    trainer.train(config(tmp_path / "run", evaluate="never", epochs=1))

    result = trainer.resume(tmp_path / "run")

    assert result.test_accuracy is None
    assert result.test_loss != result.test_loss


def test_the_proof_can_be_left_out(tmp_path: Path) -> None:
    """``proof: false`` writes none, says so nowhere else, and gives the same weights."""
    from runs import last, same

    for name, proof in (("with", None), ("without", False)):
        trainer.train(config(tmp_path / name, proof=proof, epochs=1))

    assert (tmp_path / "with" / "proof.txt").exists()
    assert not (tmp_path / "without" / "proof.txt").exists()
    assert same(last(tmp_path / "with")["state_dict"], last(tmp_path / "without")["state_dict"])


def test_settings_of_earlier_runs_have_neither(tmp_path: Path) -> None:
    """A run folder without the two settings is read."""
    values = config(tmp_path).to_dict()
    del values["evaluate"], values["proof"]

    assert TrainConfig.from_dict(values, out=tmp_path).evaluate is None
