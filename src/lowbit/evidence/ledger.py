"""Ledgers: what a run computed, as typed records in append-only JSON lines.

A product (its layer, shapes and bits) is written once, and so is a program: which products one step ran, and how
often each. A step is then one short line that names its program. So a ledger has the bits of every step, and stays
small. Nothing in it depends on the clock or the machine: the same run writes the same bytes. Each line ends with its
checksum (``crc``, the CRC-32 of what stands before it). Ledgers of older versions lack checksums and are still read.
"""

import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from lowbit.errors import RunError, UsageError
from lowbit.evidence.history import History
from lowbit.evidence.records import Evaluation, Product, Program, Step
from lowbit.inputs import files
from lowbit.inputs.checks import check_type, check_whole
from lowbit.tables import json_line

_T = TypeVar("_T")
_VERSION = 1
_DROPPED = "damaged lines dropped: "
_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n?')


class Ledger(History):
    """What a run computed: products, programs, steps and evaluations, in memory and, if it has one, in a file.

    `create` and `resume` give a ledger that writes each record as it comes; `load` reads one. `lowbit.Meter` fills
    it; `lowbit.metrics` and `lowbit.Cost` read it.

    Args:
        model: the model's name, for reports.
        layers: names of the layers that are expected to run, to name those that never did.
        first_step: number of the first step, if earlier ones are not in this ledger.
    """

    _lost: set[tuple[str, int]] | None = None  # definitions in lines that were dropped; None: no line may be dropped
    _file: BinaryIO | None = None

    # Reading and writing files.

    @classmethod
    def create(cls, path: Path | str, *, model: str = "", layers: Iterable[str] = (), first_step: int = 0) -> Self:
        """An empty ledger that writes to a new file, which replaces an old one.

        Raises:
            RunError: the file cannot be written.
        """
        ledger = cls(model=model, layers=layers, first_step=first_step)
        Path(path).unlink(missing_ok=True)  # a link is replaced, not followed
        ledger._open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        ledger._write("ledger", ledger._header())
        return ledger

    @classmethod
    def load(cls, path: Path | str, *, drop_damaged: bool = False) -> Self:
        """Read a ledger. A last line that a killed process left incomplete is dropped, and a note says so.

        Args:
            path: the file.
            drop_damaged: whether to leave out damaged lines and what cannot be understood without them; a note counts
                them.

        Raises:
            UsageError: there is no such file.
            RunError: a line is damaged, or it is not a ledger.
        """
        ledger, _ = cls._read(Path(path), until=None, drop_damaged=drop_damaged)
        return ledger

    @classmethod
    def resume(cls, path: Path | str, *, steps: int, drop_damaged: bool = False) -> Self:
        """Continue the file of a run that goes on after `steps` steps: later records are removed from it.

        Args:
            path: the file.
            steps: steps done.
            drop_damaged: whether to go on although lines are damaged; they stay in the file, and a note counts them.

        Raises:
            UsageError: there is no such file, or `steps` is negative.
            RunError: the file is damaged, or begins or ends before that step, so that steps would be missing.
        """
        if steps < 0:
            raise UsageError(f"steps={steps}: the number of steps done, from 0")
        path = Path(path)
        ledger, end = cls._read(path, until=steps, drop_damaged=drop_damaged)
        if ledger._next != steps and not (drop_damaged and ledger.first_step <= steps):
            raise RunError(
                f"{path} has steps {ledger.first_step} to {ledger._next - 1} and the run continues at step {steps}: "
                "steps are missing. Move the file away to begin a new ledger at this step"
            )
        ledger._next = steps
        dropped = [note for note in ledger.notes if note.startswith(_DROPPED)]
        ledger.notes.clear()  # they speak of lines that are removed now
        ledger._open(path, os.O_WRONLY | os.O_APPEND)
        assert ledger._file is not None
        ledger._file.truncate(end)
        for note in dropped:
            ledger.add_note(f"resumed at step {steps}: {note}")
        return ledger

    def save(self, path: Path | str) -> None:
        """Write the whole ledger to a new file, as if it had been there from the start."""
        copied = type(self).create(path, model=self.model, layers=self.layers, first_step=self.first_step)
        copied._append(self)
        copied.close()

    def sync(self) -> None:
        """Make sure that what was written reached the disk, as before a checkpoint."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, if there is one; the ledger stays readable and takes no more records."""
        if self._file is not None:
            self._file.close()

    # The file.

    def _header(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "model": self.model,
            "layers": self.layers,
            "first_step": self.first_step,
        }

    def _open(self, path: Path, flags: int) -> None:
        try:
            number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            self._file = open(number, "ab" if flags & os.O_APPEND else "wb")  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise RunError(f"cannot write the ledger {path}: {error.strerror or error}") from error

    def _write(self, record: str, values: dict[str, Any]) -> None:
        """Write one record as one line, at once, so that a killed process loses at most this line."""
        if self._file is not None and self._file.closed:
            raise UsageError(f"the ledger's file {self._file.name} is closed: go on with Ledger.resume")
        if self._file is not None:
            content = json_line({"record": record, **values}).encode()[:-1]
            self._file.write(b'%b,"crc":"%08x"}\n' % (content, zlib.crc32(content)))
            self._file.flush()

    @classmethod
    def _read(cls, path: Path, *, until: int | None, drop_damaged: bool) -> tuple[Self, int]:
        """The ledger in a file up to the end of step `until`, and the offset in bytes of that end."""
        content = _content(path)
        whole = content.rfind(b"\n") + 1
        ledger: Self | None = None
        end = offset = 0
        defined = (0, 0)
        damaged: dict[int, str] = {}
        checked = _CRC.search(content[:whole].partition(b"\n")[0]) is not None
        for number, line in enumerate(io.BytesIO(content[:whole]), start=1):
            try:
                record = _parse(line, checked=checked)
                kind = record.pop("record")
                if ledger is None:
                    ledger = cls._from_header(kind, record)
                    ledger._lost = set() if drop_damaged else None
                elif until is not None and ledger._is_after(kind, record, until):
                    break
                else:
                    ledger._take(kind, record)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
                if not drop_damaged or ledger is None:
                    raise RunError(
                        f"line {number} of {path} is damaged or not a record of a ledger ({error})"
                        f"{'; the lines before it are intact. With --drop-damaged it is left out' if ledger else ''}"
                    ) from error
                damaged[number] = str(error)
                offset += len(line)
                continue
            offset += len(line)
            # Definitions count only with the step that uses them.
            if kind not in ("product", "program"):
                end, defined = offset, (len(ledger.products), len(ledger.programs))
        assert ledger is not None
        if whole < len(content):
            ledger.notes.append(
                f"the last line was incomplete ({len(content) - whole} bytes, left by a process that was killed) and "
                "is dropped"
            )
        if damaged:
            reasons = "; ".join(f"line {number}: {reason}" for number, reason in list(damaged.items())[:5])
            ledger.notes.append(f"{_DROPPED}{len(damaged)} of {number}, so figures lack what was in them ({reasons})")
        if until is not None:
            ledger._forget_after(*defined)
        return ledger, end

    def _forget_after(self, products: int, programs: int) -> None:
        """Forget definitions of steps that were dropped: the run that continues writes them again."""
        lost = self._lost or set()
        self.products, self.programs = self.products[:products], self.programs[:programs]
        self._product_index = {p: i for i, p in enumerate(self.products) if ("product", i) not in lost}
        self._program_index = {p: i for i, p in enumerate(self.programs) if ("program", i) not in lost}

    @classmethod
    def _from_header(cls, kind: str, record: dict[str, Any]) -> Self:
        if kind != "ledger" or record.get("version") != _VERSION or record["version"] is True:
            raise ValueError(f"it begins with {kind!r} of version {record.get('version')}, not a ledger of {_VERSION}")
        if record.keys() != {"version", "model", "layers", "first_step"}:
            raise ValueError(f"its header has {', '.join(record)}")
        return cls(model=record["model"], layers=record["layers"], first_step=record["first_step"])

    def _has(self, kind: str, index: int) -> bool:
        """Whether a definition was read and its line was not dropped."""
        known = len(self.products if kind == "product" else self.programs)
        return 0 <= index < known and (kind, index) not in (self._lost or ())

    def _define(self, kind: str, known: list[_T], index_of: dict[_T, int], index: int, definition: _T) -> None:
        """Enter a definition; if lines before it were dropped, it also takes their places, which nothing may use."""
        if index != len(known) and (self._lost is None or index < len(known)):
            raise ValueError(f"{kind} {index} where {kind} {len(known)} belongs")
        while len(known) < index:
            assert self._lost is not None
            self._lost.add((kind, len(known)))
            known.append(definition)
        index_of[definition] = len(known)
        known.append(definition)

    @staticmethod
    def _is_after(kind: str, record: dict[str, Any], steps: int) -> bool:
        """Whether a record was made after so many steps."""
        return (kind == "step" and record["step"] >= steps) or (kind == "evaluation" and record["step"] > steps)

    def _take(self, kind: str, record: dict[str, Any]) -> None:
        """Enter one record of a file."""
        match kind:
            case "step":
                step = Step(**record)
                for name, value in step._asdict().items():
                    check_whole(name, value, 0)
                follows = step.step == self._next or (self._lost is not None and step.step > self._next)
                if not follows or not self._has("program", step.program):
                    raise ValueError(f"step {step.step} of program {step.program} where step {self._next} belongs")
                self.steps.append(step)
                self._next = step.step + 1
            case "product":
                index = record.pop("index", len(self.products))
                values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
                self._define(kind, self.products, self._product_index, index, Product(**values))
            case "program":
                index = record.pop("index", len(self.programs))
                for name in ("calls", "uncounted"):
                    record[name] = tuple(map(tuple, record.get(name, ())))
                program = Program(**record)
                if missing := [product for product, _ in program.calls if not self._has("product", product)]:
                    raise ValueError(f"a program of product {missing[0]}, which is not there")
                self._define(kind, self.programs, self._program_index, index, program)
            case "evaluation":
                evaluation = Evaluation(**record)
                if evaluation.program is not None and not self._has("program", evaluation.program):
                    raise ValueError(f"evaluation of program {evaluation.program}, which is not there")
                self.evaluations.append(evaluation)
            case "note":
                check_type("text", record["text"], str)
                self.notes.append(record["text"])
            case _:
                raise ValueError(f"a record of the unknown kind {kind!r}")


def _content(path: Path) -> bytes:
    if not path.exists():
        raise UsageError(f"there is no ledger {path}")
    content = bytes(files.read_whole(path))
    if b"\n" not in content:
        raise RunError(f"{path} is empty or not a ledger: its first line is not complete")
    return content


def _parse(line: bytes, *, checked: bool) -> dict[str, Any]:
    """The record in a line. A checksum must be right, and if `checked` there must be one."""
    match = _CRC.search(line)
    if match is None or match.end() != len(line):
        if checked:
            raise ValueError("it does not end with its checksum")
        content = line
    else:
        content = line[: match.start()]
        if zlib.crc32(content) != int(match[1], 16):
            raise ValueError(f"its checksum is {zlib.crc32(content):08x} and should be {match[1].decode()}")
        content += b"}"
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}")
    return record
