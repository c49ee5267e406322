"""Ledgers: what they keep, and that a file survives what can happen to it."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import RunError, UsageError
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.records import Product, Program, Total


def product(layer: str = "a", name: str = "output", **changes: Any) -> Product:
    """A product of a linear layer of 4 rows, 3 inputs and 2 outputs."""
    values: dict[str, Any] = {
        "layer": layer,
        "product": name,
        "kind": "linear",
        "engine": "reference",
        "bits": (8, 8),
        "macs": 24,
        "input": (4, 3),
        "weight": (2, 3),
        "output": (4, 2),
    }
    return Product(**(values | changes))


def filled(ledger: Ledger, steps: int = 4) -> Ledger:
    """The ledger with steps that alternate between two programs, and an evaluation after every second step."""
    programs = []
    for i, bits in enumerate(((8, 8), (4, 8))):
        index = ledger.intern(product(bits=bits))
        last = ledger.intern(product(name="grad_weight", grad_input_bits=(6, 8)))
        programs.append(Program(calls=((index, 1 + i), (last, 1)), uncounted=(("aten.relu", 2),), held_bytes=100 + i))
    for step in range(ledger.first_step, ledger.first_step + steps):
        ledger.add_step(programs[step % 2], samples=4)
        if step % 2:
            ledger.add_evaluation(programs[0], samples=7, name="accuracy", score=step / 10)
    return ledger


def content(ledger: Ledger) -> tuple[Any, ...]:
    """All that a ledger says."""
    return (
        ledger.model,
        ledger.layers,
        ledger.first_step,
        ledger.products,
        ledger.programs,
        ledger.steps,
        ledger.evaluations,
        ledger.notes,
    )


def test_a_file_gives_the_ledger_back(tmp_path: Path) -> None:
    """What was written is what is read."""
    path = tmp_path / "ledger.jsonl"
    written = filled(Ledger.create(path, model="m", layers=["a", "b"]))
    written.add_note("a note")
    written.close()

    assert content(Ledger.load(path)) == content(written)


def test_saving_writes_the_same_bytes(tmp_path: Path) -> None:
    """A ledger in memory that is saved differs from one written on the way only in where definitions stand."""
    filled(Ledger.create(tmp_path / "a", model="m")).close()
    filled(Ledger(model="m")).save(tmp_path / "b")

    lines = [sorted((tmp_path / name).read_text().splitlines()) for name in "ab"]
    assert lines[0] == lines[1]


def test_steps_of_one_program_take_one_short_line_each(tmp_path: Path) -> None:
    """A thousand steps of a program add a thousand lines of less than 80 bytes and no definition."""
    path = tmp_path / "ledger.jsonl"
    ledger = filled(Ledger.create(path))
    before = path.stat().st_size
    for _ in range(1000):
        ledger.add_step(ledger.programs[0], samples=4)

    added = path.read_bytes()[before:]
    ledger.close()
    assert added.count(b"\n") == 1000
    assert len(added) < 80_000


def test_every_record_is_on_the_disk_at_once(tmp_path: Path) -> None:
    """A process that is killed, and never closes its ledger, has written each step."""
    path = tmp_path / "ledger.jsonl"
    ledger = filled(Ledger.create(path))

    assert len(Ledger.load(path).steps) == 4
    ledger.close()


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 3000))
def test_a_killed_write_loses_the_last_line_only(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file that ends anywhere gives the records of all complete lines, and a note iff a line was incomplete."""
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    filled(Ledger.create(path)).close()
    whole = path.read_bytes()
    part = whole[: max(len(whole.splitlines(keepends=True)[0]), len(whole) - cut)]
    path.write_bytes(part)

    ledger = Ledger.load(path)

    assert len(ledger.steps) == part.count(b'"record":"step"') - (not part.endswith(b"\n") and b'"step"' in last(part))
    assert len(ledger.notes) == (not part.endswith(b"\n"))


def last(text: bytes) -> bytes:
    """The incomplete last line."""
    return text[text.rfind(b"\n") + 1 :][:16]


@pytest.mark.parametrize("text", [b"", b'{"record":"ledger"', b"\n", b"hello\n", b'{"record":"step","step":0}\n'])
def test_what_is_no_ledger_is_refused(text: bytes, tmp_path: Path) -> None:
    """An empty or foreign file is a RunError that names it."""
    (tmp_path / "x").write_bytes(text)

    with pytest.raises(RunError, match="x"):
        Ledger.load(tmp_path / "x")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        '{"record":"what"}',
        '{"record":"step","step":9,"program":0,"samples":4}',
        '{"record":"step","step":2,"program":99,"samples":4}',
        '{"record":"program","calls":[[99,1]]}',
        '{"record":"product","layer":"a"}',
        '{"record":"evaluation","step":2,"program":99,"samples":1}',
    ],
)
def test_a_damaged_line_in_the_middle_is_named(line: str, tmp_path: Path) -> None:
    """A line that is no record, or refers to what is not there, is a RunError with its number."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path)).close()
    lines = path.read_text().splitlines()
    at = next(i for i, text in enumerate(lines) if '"step":2' in text)
    path.write_text("\n".join([*lines[:at], line, *lines[at:]]) + "\n")

    with pytest.raises(RunError, match=f"line {at + 1} of"):
        Ledger.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """No file is a UsageError."""
    with pytest.raises(UsageError, match="there is no ledger"):
        Ledger.load(tmp_path / "none")


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_a_resumed_file_is_that_of_a_run_that_never_stopped(steps: int, tmp_path: Path) -> None:
    """Records after the checkpoint are dropped, and the rest of the run writes the same bytes again."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path), steps=6).close()
    uninterrupted = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"record":"st')  # killed while it wrote

    ledger = Ledger.resume(path, steps=steps)
    assert len(ledger.steps) == steps
    whole = filled(Ledger(), steps=6)
    for step in whole.steps[steps:]:
        program = whole.programs[step.program]
        calls = tuple((ledger.intern(whole.products[index]), n) for index, n in program.calls)
        assert calls == program.calls
        ledger.add_step(program, samples=step.samples)
        if step.step % 2:
            ledger.add_evaluation(whole.programs[0], samples=7, name="accuracy", score=step.step / 10)
    ledger.close()

    again = Ledger.load(path)
    assert content(again)[3:7] == content(whole)[3:7]
    assert sorted(path.read_bytes().splitlines()) == sorted(uninterrupted.splitlines())


def test_resuming_beyond_the_end_is_refused(tmp_path: Path) -> None:
    """A ledger that lacks steps before the checkpoint says so and is not touched."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path)).close()
    before = path.read_bytes()

    with pytest.raises(RunError, match="steps are missing"):
        Ledger.resume(path, steps=5)
    assert path.read_bytes() == before


def test_bits_of_each_step_are_summed_not_their_mean() -> None:
    """Calls add up by pair of widths."""
    totals = filled(Ledger()).totals()

    assert [(t.product.bits, t.calls) for t in totals if t.product.product == "output"] == [((8, 8), 2), ((4, 8), 4)]


def test_bit_operations_are_macs_times_both_widths() -> None:
    """Of a call, and of all calls."""
    total = Total(product(bits=(3, 8), macs=24), 5)

    assert (total.product.bit_operations, total.bit_operations) == (24 * 3 * 8, 5 * 24 * 3 * 8)


@pytest.mark.parametrize(("steps", "widths"), [(1, 8), (2, 4)])
def test_the_last_step_has_its_own_calls(steps: int, widths: int) -> None:
    """The calls of the step before are not in it, nor are those of an evaluation after it."""
    last = filled(Ledger(), steps).last_step()

    assert [(total.product.bits[0], total.calls) for total in last] == [(widths, steps), (8, 1)]
    assert Ledger().last_step() == []


def test_the_papers_convention_charges_the_grad_input_that_did_not_run() -> None:
    """As charged, a layer without grad_input has one for each grad_weight, at the widths it would have had."""
    ran = filled(Ledger()).totals()
    charged = filled(Ledger()).totals("as-charged")

    assert not [t for t in ran if t.product.product == "grad_input"]
    (extra,) = [t for t in charged if t.product.product == "grad_input"]
    assert (extra.product.bits, extra.calls, extra.product.macs) == ((6, 8), 4, 24)


def test_evaluations_are_apart() -> None:
    """Totals of steps have nothing of evaluations, and the other way round."""
    ledger = filled(Ledger())

    assert sum(t.calls for t in ledger.totals()) == 2 * 2 + 2 * 3
    assert sum(t.calls for t in ledger.totals(evaluations=True)) == 2 * 2


@pytest.mark.parametrize(("higher", "step"), [(True, 4), (False, 2)])
def test_the_best_evaluation_has_a_direction(higher: bool, step: int) -> None:
    """The best score is the highest or the lowest, and of equals the first."""
    ledger = filled(Ledger(), steps=0)
    for score in (0.1, 0.1, 0.3, 0.3):
        ledger.add_step(ledger.programs[0] if ledger.programs else Program(calls=()), samples=1)
        ledger.add_step(Program(calls=()), samples=1)
        ledger.add_evaluation(None, name="x", score=score, higher_is_better=higher)

    best = ledger.best()
    assert best is not None
    assert best.step == (6 if higher else step)


@pytest.mark.parametrize("higher", [True, False])
def test_a_score_that_is_no_number_is_not_the_best(higher: bool) -> None:
    """The nan of an evaluation that diverged is passed over, also where it came first; alone it is no best."""
    ledger = Ledger()
    ledger.add_evaluation(None, name="x", score=math.nan, higher_is_better=higher)
    without = ledger.best()
    ledger.add_evaluation(None, name="x", score=0.2, higher_is_better=higher)

    best = ledger.best()
    assert without is None
    assert best is not None
    assert best.score == 0.2


def test_a_score_that_is_no_number_is_written_as_null(tmp_path: Path) -> None:
    """Any JSON reader takes the file; a ledger of an earlier version, with NaN in it, is read too."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.create(path)
    ledger.add_evaluation(None, name="x", score=math.nan, higher_is_better=True)
    ledger.close()
    line = path.read_text().splitlines()[-1]
    old = tmp_path / "old.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    old.write_text("".join(f"{json.dumps({k: v for k, v in r.items() if k != 'crc'})}\n" for r in records))
    old.write_text(old.read_text().replace('"score": null', '"score": NaN'))

    assert json.loads(line, parse_constant=pytest.fail)["score"] is None
    assert Ledger.load(path).evaluations[0].score is None
    assert math.isnan(Ledger.load(old).evaluations[0].score or 0.0)


def test_scores_of_two_kinds_have_no_best() -> None:
    """Scores of different names cannot be compared."""
    ledger = Ledger()
    ledger.add_evaluation(None, name="accuracy", score=0.1)
    ledger.add_evaluation(None, name="loss", score=0.1, higher_is_better=False)

    with pytest.raises(UsageError, match="accuracy"):
        ledger.best()


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_part_of_a_run_ends_with_its_step(steps: int) -> None:
    """Up to step n are n steps, and the evaluations that followed them."""
    part = filled(Ledger()).until(steps)

    assert len(part.steps) == steps
    assert len(part.evaluations) == steps // 2


def test_ranks_add_up() -> None:
    """Two ranks have twice the calls, samples and bytes of one, at every step."""
    one, both = filled(Ledger()), Ledger.merged([filled(Ledger()), filled(Ledger())])

    assert {t.product: t.calls for t in both.totals()} == {t.product: 2 * t.calls for t in one.totals()}
    assert [s.samples for s in both.steps] == [8] * 4
    assert [e.samples for e in both.evaluations] == [14] * 2
    assert (both.held_bytes, one.held_bytes) == (202, 101)


def test_merging_one_ledger_changes_nothing() -> None:
    """The merge of a single rank has its totals."""
    one = filled(Ledger())

    assert Ledger.merged([one]).totals("as-charged") == one.totals("as-charged")


def test_ranks_of_other_steps_are_refused() -> None:
    """Ranks that do not cover the same steps are named."""
    with pytest.raises(UsageError, match=r"0 to 1; 0 to 3"):
        Ledger.merged([filled(Ledger()), filled(Ledger(), steps=2)])
    with pytest.raises(UsageError, match="none"):
        Ledger.merged([])


def test_layers_that_never_ran_are_named() -> None:
    """A layer with no product in any step never ran; a part of a layer stands for it."""
    ledger = Ledger(layers=["a", "b", "lstm", "l"])
    filled(ledger)
    index = ledger.intern(product("lstm.weight_hh_l0"))
    ledger.add_step(Program(calls=((index, 1),)), samples=1)

    assert ledger.never_ran() == ["b", "l"]


@pytest.mark.parametrize("changes", [{"product": "grad"}, {"bits": (0, 8)}, {"bits": (8,)}, {"macs": -1}])
def test_an_impossible_product_is_refused(changes: dict[str, Any]) -> None:
    """A product has one of three names, two widths and a count."""
    with pytest.raises(UsageError):
        product(**changes)


def test_a_closed_ledger_takes_no_record(tmp_path: Path) -> None:
    """What cannot be written any more is an error, not a record in memory only."""
    ledger = filled(Ledger.create(tmp_path / "x"))
    ledger.close()

    with pytest.raises(UsageError, match="closed"):
        ledger.add_step(ledger.programs[0], samples=1)
    assert ledger.totals()


def test_lines_are_plain_json(tmp_path: Path) -> None:
    """Any program reads a ledger: each line is a JSON object with its kind."""
    filled(Ledger.create(tmp_path / "x")).close()

    kinds = [json.loads(line)["record"] for line in (tmp_path / "x").read_text().splitlines()]
    assert kinds[0] == "ledger"
    assert set(kinds) == {"ledger", "product", "program", "step", "evaluation"}


@pytest.mark.parametrize("index", [-1, 2])
def test_a_step_of_an_unknown_program_is_refused(index: int) -> None:
    """A step names a program that is there."""
    with pytest.raises(UsageError, match="this ledger has 2"):
        filled(Ledger()).add_step(index, samples=1)


def flipped(line: bytes, at: int) -> bytes:
    """The line with one bit changed."""
    return line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]


@pytest.mark.parametrize("number", range(1, 13))
def test_any_changed_bit_is_noticed(number: int, tmp_path: Path) -> None:
    """Whatever bit of whatever line changes, the line is named."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path, model="m")).close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    for at in range(len(lines[number - 1]) - 1):
        path.write_bytes(b"".join([*lines[: number - 1], flipped(lines[number - 1], at), *lines[number:]]))
        with pytest.raises(RunError, match=f"line {number} of "):
            Ledger.load(path)


def test_the_checksum_is_the_crc_of_what_stands_before_it(tmp_path: Path) -> None:
    """Anybody can check a line: CRC-32 (zlib) of its bytes up to the comma before ``"crc"``."""
    filled(Ledger.create(tmp_path / "x")).close()

    for line in (tmp_path / "x").read_bytes().splitlines():
        content, _, checksum = line.rpartition(b',"crc":')
        assert zlib.crc32(content) == int(json.loads(checksum[:-1]), 16)


def test_a_ledger_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Lines without checksums and numbers of definitions say the same."""
    path = tmp_path / "ledger.jsonl"
    written = filled(Ledger.create(path, model="m"))
    written.close()
    old = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        old.append(json.dumps({key: value for key, value in record.items() if key not in ("crc", "index")}))
    path.write_text("\n".join(old) + "\n")

    assert content(Ledger.load(path)) == content(written)


def test_a_line_without_checksum_among_others_is_damaged(tmp_path: Path) -> None:
    """A line that somebody added or changed by hand is named."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path)).close()
    with open(path, "a") as file:
        file.write('{"record":"step","step":4,"program":0,"samples":4}\n')

    with pytest.raises(RunError, match=r"line 13 of .*does not end with its checksum"):
        Ledger.load(path)


@pytest.mark.parametrize(
    ("damaged", "lost_steps"),
    [
        ('"record":"step","step":1', [1]),
        ('"record":"step","step":3', [3]),
        ('"record":"evaluation","step":2', []),
        ('"record":"product","index":0', [0, 2]),  # what program 0 ran
        ('"record":"product","index":1', [0, 1, 2, 3]),
        ('"record":"program","index":1', [1, 3]),
    ],
)
def test_damaged_lines_are_dropped_with_a_count(damaged: str, lost_steps: list[int], tmp_path: Path) -> None:
    """What is left is what the other lines say: no step counts the products of another one."""
    path = tmp_path / "ledger.jsonl"
    whole = filled(Ledger.create(path))
    whole.close()
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if damaged.encode() in line)
    path.write_bytes(b"".join([*lines[:at], flipped(lines[at], 20), *lines[at + 1 :]]))

    ledger = Ledger.load(path, drop_damaged=True)

    assert [step.step for step in ledger.steps] == [i for i in range(4) if i not in lost_steps]
    for step in ledger.steps:
        calls = {ledger.products[i]: n for i, n in ledger.programs[step.program].calls}
        assert calls == {whole.products[i]: n for i, n in whole.programs[step.step % 2].calls}
    (note,) = ledger.notes
    assert f"of {len(lines)}, so figures lack" in note
    assert f"line {at + 1}: its checksum" in note


def test_a_run_goes_on_with_a_damaged_ledger(tmp_path: Path) -> None:
    """The step after the checkpoint has its own number, the damage stays in the file, and a note tells of it."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path)).close()
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"step","step":2' in line)
    path.write_bytes(b"".join([*lines[:at], flipped(lines[at], 20), *lines[at + 1 :]]))

    with pytest.raises(RunError, match=f"line {at + 1} of .*--drop-damaged"):
        Ledger.resume(path, steps=4)
    ledger = Ledger.resume(path, steps=4, drop_damaged=True)
    ledger.add_step(0, samples=4)
    ledger.close()

    again = Ledger.load(path, drop_damaged=True)
    assert [step.step for step in again.steps] == [0, 1, 3, 4]
    assert "resumed at step 4: damaged lines dropped: 1 of 12" in again.notes[0]
    with pytest.raises(RunError, match=f"line {at + 1}"):
        Ledger.load(path)
    with pytest.raises(UsageError, match="lacks steps"):
        Ledger.merged([again])


def test_a_damaged_header_cannot_be_dropped(tmp_path: Path) -> None:
    """Without its first line a ledger cannot be read at all."""
    path = tmp_path / "ledger.jsonl"
    filled(Ledger.create(path)).close()
    content = path.read_bytes()
    path.write_bytes(flipped(content, 20))

    with pytest.raises(RunError, match="line 1 of"):
        Ledger.load(path, drop_damaged=True)


def test_a_link_in_the_ledgers_place_is_not_followed(tmp_path: Path) -> None:
    """A new ledger replaces a link, and a resumed one refuses it."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "ledger").symlink_to(tmp_path / "mine")

    filled(Ledger.create(tmp_path / "ledger")).close()
    (tmp_path / "link").symlink_to(tmp_path / "ledger")

    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(RunError, match="cannot write the ledger"):
        Ledger.resume(tmp_path / "link", steps=4)


def test_other_widths_change_bits_and_nothing_else() -> None:
    """`at` gives each operand its width, keeps steps, calls and scores, and leaves what is plain as it is."""
    ledger = filled(Ledger(model="m", layers=["a"]))
    plain = ledger.intern(product("b", engine="plain", bits=(32, 32)))
    ledger.add_step(Program(calls=((plain, 3),)), samples=4)

    other = ledger.at("w4a3g6")

    calls = [(total.product.layer, total.product.product, total.product.bits, total.calls) for total in other.totals()]
    assert calls == [("a", "output", (3, 4), 6), ("a", "grad_weight", (6, 3), 4), ("b", "output", (32, 32), 3)]
    charged = [total for total in other.totals("as-charged") if total.product.product == "grad_input"]
    assert [total.product.bits for total in charged] == [(6, 4)]
    assert sum(total.macs for total in other.totals()) == sum(total.macs for total in ledger.totals())
    assert [(step.step, step.samples) for step in other.steps] == [(step.step, step.samples) for step in ledger.steps]
    assert other.evaluations == ledger.evaluations
    assert other.held_bytes == ledger.held_bytes
    assert other.notes == ["costed at w4a3g6, not at the widths that ran"]
    assert [total.product.bits for total in ledger.totals()][:2] == [(8, 8), (4, 8)]


@pytest.mark.parametrize("widths", ["w0a4g8", "sbm8:w4a4g8", "4", "w4a4", "w4a4g8 "])
def test_widths_of_another_form_are_refused(widths: str) -> None:
    """Widths are wXaYgZ with whole numbers from 1."""
    with pytest.raises(UsageError, match="write wXaYgZ"):
        filled(Ledger()).at(widths)
