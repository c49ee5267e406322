"""Ledgers: what a run computed, as typed records in append-only JSON lines.

A product (its layer, shapes and bits) is written once, and so is a program: which products one step ran, and how
often each. A step is then one short line that names its program. So a ledger has the bits of every step, and stays
small. Nothing in it depends on the clock or the machine: the same run writes the same bytes. Each line ends with its
checksum (``crc``, the CRC-32 of what stands before it); ledgers of older versions, without, are read as they are.

Notation: a step is one update of the weights, counted from 0; one multiply-accumulate (MAC) is one operation.
"""

import dataclasses
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self, TypeVar

from lowbit import files
from lowbit.checks import check_fields, check_type, check_whole, checked
from lowbit.errors import RunError, UsageError, check_choice, shown

_T = TypeVar("_T")
Convention = Literal["as-ran", "as-charged"]
PRODUCTS = ("output", "grad_input", "grad_weight")
# The two operands of each product, in the order of `Product.bits`.
OPERANDS = {
    "output": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("grad_output", "input"),
}
PLAIN = "plain"  # the engine of what ran outside converted layers

_VERSION = 1
_DROPPED = "damaged lines dropped: "
_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n?')


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product of one layer at one shape and one pair of widths.

    Args:
        layer: the layer's name; for a product outside any layer that of the innermost module, ``""`` the model.
        product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
        kind: what was computed, e.g. ``"conv2d"``.
        engine: how it was executed; ``"plain"`` outside converted layers.
        bits: widths of its two operands in bits, in the order of `OPERANDS`.
        macs: multiply-accumulates of one call.
        input: shape of the layer's input (of the first factor, for a product of two activations).
        weight: shape of its weight (of the second factor).
        output: shape of its output.
        stride: of a convolution, one number per spatial axis; else empty.
        groups: of a convolution.
        transposed: whether it is a transposed convolution.
        grad_input_bits: of a `grad_weight` whose `grad_input` did not run, since nothing asked for the gradient of
            the layer's input: the widths that it would have had.
    """

    layer: str
    product: str
    kind: str
    engine: str
    bits: tuple[int, int]
    macs: int
    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    grad_input_bits: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.product not in PRODUCTS:
            raise UsageError(f"product {self.product!r}: one of {', '.join(PRODUCTS)}")
        if min(*self.input, *self.weight, *self.output, *self.stride, 0) < 0:
            raise UsageError(f"{self.layer}: shapes {self.input}, {self.weight}, {self.output}: sizes are 0 or more")
        if min(*self.bits, *(self.grad_input_bits or (1,)), self.groups) < 1 or self.macs < 0:
            raise UsageError(f"{self.layer}: bits={self.bits}, macs={self.macs}: two widths from 1, and a count from 0")

    @property
    def bit_operations(self) -> int:
        """Of one call: multiply-accumulates times the widths of both operands."""
        return self.macs * self.bits[0] * self.bits[1]

    def charged(self) -> "Product | None":
        """The `grad_input` that papers charge this layer with although it did not run; None where it did."""
        if self.grad_input_bits is None:
            return None
        return dataclasses.replace(self, product="grad_input", bits=self.grad_input_bits, grad_input_bits=None)


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one step or one evaluation ran.

    Args:
        calls: pairs (index of a product, how often it ran), in order of the index.
        uncounted: pairs (operator, how often it ran in forward passes) of what was not counted, outside converted
            layers; views and the creation of tensors left out.
        held_bytes: bytes that one forward pass left to its backward, at most; None where none was looked at. See
            `lowbit.meter` for what is in it.
    """

    calls: tuple[tuple[int, int], ...]
    uncounted: tuple[tuple[str, int], ...] = ()
    held_bytes: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if min([n for _, n in (*self.calls, *self.uncounted)] + [self.held_bytes or 0], default=0) < 0:
            raise UsageError(f"{shown(vars(self))}: counts are 0 or more")


class Step(NamedTuple):
    """One update of the weights: its number from 0, the index of its program, and its samples."""

    step: int
    program: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ran in evaluation mode between two steps, and the score it gave.

    Args:
        step: steps done before it.
        program: index of its program; None where only a score is known.
        samples: samples.
        name: of the score, e.g. ``"test_accuracy"``; None without a score.
        score: its value.
        higher_is_better: its direction.
    """

    step: int
    program: int | None
    samples: int
    name: str | None = None
    score: float | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.step, self.samples) < 0:
            raise UsageError(f"an evaluation of {self.samples} samples after {self.step} steps: both are 0 or more")


class Total(NamedTuple):
    """A product, and how often it ran."""

    product: Product
    calls: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls."""
        return self.product.macs * self.calls

    @property
    def bit_operations(self) -> int:
        """Bit operations of all calls."""
        return self.product.bit_operations * self.calls


class Ledger:
    """What a run computed: products, programs, steps and evaluations, in memory and, where it has one, in a file.

    `create` and `resume` give a ledger that writes each record as it comes; `load` reads one. `lowbit.Meter` fills
    it; `lowbit.metrics` and `lowbit.cost` read it.

    Args:
        model: the model's name, for reports.
        layers: names of the layers that are expected to run, to name those that never did.
        first_step: number of the first step, where earlier ones are not in this ledger.
    """

    @checked
    def __init__(self, *, model: str = "", layers: Iterable[str] = (), first_step: int = 0) -> None:
        check_whole("first_step", first_step, 0)
        self.model = model
        self.layers = tuple(layers)
        check_type("layers", self.layers, tuple[str, ...])
        self.first_step = first_step
        self.products: list[Product] = []
        self.programs: list[Program] = []
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.notes: list[str] = []
        self._product_index: dict[Product, int] = {}
        self._program_index: dict[Program, int] = {}
        self._next = first_step  # number of the next step
        self._lost: set[tuple[str, int]] | None = None  # definitions in lines that were dropped; None: none may be
        self._file: BinaryIO | None = None

    # Reading and writing files.

    @classmethod
    def create(cls, path: Path | str, *, model: str = "", layers: Iterable[str] = (), first_step: int = 0) -> Self:
        """An empty ledger that writes to a new file; one that is there is replaced.

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
            drop_damaged: leave out damaged lines and what cannot be understood without them, and count them in a note.

        Raises:
            UsageError: there is no such file.
            RunError: a line is damaged, or it is not a ledger.
        """
        ledger, _ = cls._read(Path(path), until=None, drop_damaged=drop_damaged)
        return ledger

    @classmethod
    def resume(cls, path: Path | str, *, steps: int, drop_damaged: bool = False) -> Self:
        """Go on in the file of a run that continues after `steps` steps: later records are removed from it.

        Args:
            path: the file.
            steps: steps done.
            drop_damaged: go on although lines are damaged; they stay in the file, and a note counts them.

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
        ledger.notes.clear()  # of lines that are removed now
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

    # Adding records.

    def intern(self, product: Product) -> int:
        """The index of a product, which is added where it is new."""
        index = self._product_index.get(product)
        if index is None:
            self._write("product", {"index": len(self.products), **_fields(product)})
            index = self._product_index[product] = len(self.products)
            self.products.append(product)
        return index

    def intern_program(self, program: Program) -> int:
        """The index of a program, which is added where it is new."""
        index = self._program_index.get(program)
        if index is None:
            for product, calls in program.calls:
                if not 0 <= product < len(self.products) or calls < 1:
                    raise UsageError(f"a program calls product {product} {calls} times: no such product or count")
            self._write("program", {"index": len(self.programs), **_fields(program)})
            index = self._program_index[program] = len(self.programs)
            self.programs.append(program)
        return index

    def add_step(self, program: Program | int, *, samples: int) -> None:
        """Add the next step, with its program or the index of one that is there."""
        index = program if isinstance(program, int) else self.intern_program(program)
        if not 0 <= index < len(self.programs):
            raise UsageError(f"program {index}: this ledger has {len(self.programs)}")
        step = Step(self._next, index, samples)
        self._write("step", step._asdict())
        self.steps.append(step)
        self._next += 1

    @checked
    def add_evaluation(
        self,
        program: Program | None,
        *,
        samples: int = 0,
        name: str | None = None,
        score: float | None = None,
        higher_is_better: bool = True,
    ) -> None:
        """Add an evaluation after the steps so far."""
        evaluation = Evaluation(
            step=self._next,
            program=None if program is None else self.intern_program(program),
            samples=samples,
            name=name,
            score=score,
            higher_is_better=higher_is_better,
        )
        self._write("evaluation", _fields(evaluation))
        self.evaluations.append(evaluation)

    @checked
    def add_note(self, note: str) -> None:
        """Add a sentence that every report shows."""
        self.notes.append(note)
        self._write("note", {"text": note})

    # Asking.

    @property
    def samples(self) -> int:
        """Samples of all steps."""
        return sum(step.samples for step in self.steps)

    @property
    def held_bytes(self) -> int | None:
        """The most that one forward pass of a step left to its backward; see `Program`."""
        known = [self.programs[number].held_bytes for number in set(self._program_numbers(False))]
        return max((held for held in known if held is not None), default=None)

    @checked
    def totals(self, convention: Convention = "as-ran", *, evaluations: bool = False) -> list[Total]:
        """Each product with its number of calls over all steps, in the order of first appearance.

        Args:
            convention: ``"as-ran"``; or ``"as-charged"``: as the papers count, each layer whose weight was trained
                also has a `grad_input`, though nothing needs the one of the first layer.
            evaluations: of the evaluations instead of the steps.
        """
        check_choice("convention", convention, Convention)
        calls: Counter[Product] = Counter()
        for index, times in Counter(self._program_numbers(evaluations)).items():
            for product_index, n in self.programs[index].calls:
                product = self.products[product_index]
                for counted in (product, product.charged() if convention == "as-charged" else None):
                    if counted is not None:
                        calls[counted] += times * n
        order = {layer: i for i, layer in enumerate(dict.fromkeys(p.layer for p in self.products))}
        ordered = sorted(calls.items(), key=lambda item: (order[item[0].layer], PRODUCTS.index(item[0].product)))
        return [Total(product, n) for product, n in ordered]

    def last_step(self) -> list[Total]:
        """Each product of the last step with its number of calls in it; empty before the first."""
        calls = self.programs[self.steps[-1].program].calls if self.steps else ()
        return [Total(self.products[product], n) for product, n in calls]

    def uncounted(self, *, evaluations: bool = False) -> dict[str, int]:
        """Operators that were not counted, with their calls over all steps, or over all evaluations."""
        total: Counter[str] = Counter()
        for index, times in Counter(self._program_numbers(evaluations)).items():
            total.update({op: calls * times for op, calls in self.programs[index].uncounted})
        return dict(total.most_common())

    def _program_numbers(self, evaluations: bool) -> list[int]:
        """The program of each step, or of each evaluation that has one."""
        if evaluations:
            return [e.program for e in self.evaluations if e.program is not None]
        return [step.program for step in self.steps]

    def never_ran(self) -> list[str]:
        """Expected layers of which no product ran in any step."""
        used = {self.programs[number] for number in self._program_numbers(False)}
        ran = {self.products[product].layer for program in used for product, _ in program.calls}
        return [layer for layer in self.layers if not any(r == layer or r.startswith(layer + ".") for r in ran)]

    def best(self) -> Evaluation | None:
        """The first evaluation with the best score; None where there is no score.

        Raises:
            UsageError: scores of several names or directions.
        """
        scored = [e for e in self.evaluations if e.score is not None]
        kinds = {(e.name, e.higher_is_better) for e in scored}
        if len(kinds) > 1:
            raise UsageError(f"scores of {sorted(str(name) for name, _ in kinds)}: the best of one kind only")
        sign = 1 if scored and scored[0].higher_is_better else -1
        return max(scored, key=lambda e: (sign * (e.score or 0.0), -e.step), default=None)

    @checked
    def until(self, step: int) -> Self:
        """The same ledger, in memory, as it was after `step` steps: the whole run up to a checkpoint."""
        part = type(self)(model=self.model, layers=self.layers, first_step=self.first_step)
        part._append(self, until=step)
        return part

    @classmethod
    def merged(cls, ledgers: Sequence["Ledger"]) -> Self:
        """The ledgers of the ranks of one run as one: calls and samples of each step add up.

        Raises:
            UsageError: there is none, or they do not cover the same steps.
        """
        if any(led._next - led.first_step != len(led.steps) for led in ledgers):
            raise UsageError("a ledger that lacks steps in its middle cannot be merged")
        ranges = {(led.first_step, len(led.steps)) for led in ledgers}
        if len(ranges) != 1:
            covered = "; ".join(f"{first} to {first + n - 1}" for first, n in sorted(ranges))
            raise UsageError(
                f"{len(ledgers)} ledgers with steps {covered or '(none)'}: give one or more that cover the same steps, "
                "e.g. each cut with until()"
            )
        whole = cls(model=ledgers[0].model, layers=ledgers[0].layers, first_step=ledgers[0].first_step)
        for note in dict.fromkeys(note for led in ledgers for note in led.notes):
            whole.add_note(note)
        cache: dict[tuple[int, ...], int] = {}
        evaluated = {evaluation.step for led in ledgers for evaluation in led.evaluations}
        for i in range(len(ledgers[0].steps) + 1):
            if whole.first_step + i in evaluated:
                whole._merge_evaluations(ledgers, whole.first_step + i)
            if i < len(ledgers[0].steps):
                key = tuple(led.steps[i].program for led in ledgers)
                if key not in cache:
                    programs = [(led, led.programs[p]) for led, p in zip(ledgers, key, strict=True)]
                    cache[key] = whole.intern_program(whole._sum(programs))
                whole.add_step(cache[key], samples=sum(led.steps[i].samples for led in ledgers))
        return whole

    def _merge_evaluations(self, ledgers: Sequence["Ledger"], step: int) -> None:
        """Add up the n-th evaluation of each ledger after the same step; the score is the first ledger's."""
        queues = [[e for e in led.evaluations if e.step == step] for led in ledgers]
        for n in range(max(map(len, queues))):
            found = [(led, queue[n]) for led, queue in zip(ledgers, queues, strict=True) if n < len(queue)]
            programs = [(led, led.programs[e.program]) for led, e in found if e.program is not None]
            scored = next((e for _, e in found if e.score is not None), found[0][1])
            self.add_evaluation(
                self._sum(programs) if programs else None,
                samples=sum(e.samples for _, e in found),
                name=scored.name,
                score=scored.score,
                higher_is_better=scored.higher_is_better,
            )

    def _sum(self, programs: Sequence[tuple["Ledger", Program]]) -> Program:
        """One program that runs all of these; its products are added to this ledger."""
        calls: Counter[int] = Counter()
        uncounted: Counter[str] = Counter()
        for source, program in programs:
            for product, n in program.calls:
                calls[self.intern(source.products[product])] += n
            uncounted.update(dict(program.uncounted))
        held = [program.held_bytes for _, program in programs if program.held_bytes is not None]
        return Program(
            calls=tuple(sorted(calls.items())),
            uncounted=tuple(sorted(uncounted.items())),
            held_bytes=sum(held) if held else None,
        )

    def _append(self, other: "Ledger", until: int | None = None) -> None:
        """Take over the records of another ledger, in the order they were made, up to a number of steps."""
        products = [self.intern(product) for product in other.products]
        programs = [
            self.intern_program(dataclasses.replace(program, calls=tuple((products[i], n) for i, n in program.calls)))
            for program in other.programs
        ]
        events = sorted(
            [(s.step, 1, s) for s in other.steps] + [(e.step, 0, e) for e in other.evaluations],
            key=lambda event: event[:2],
        )
        for step, is_step, event in events:
            if until is not None and step + is_step > until:
                break
            self._next = step
            if isinstance(event, Step):
                self.add_step(programs[event.program], samples=event.samples)
            else:
                used = None if event.program is None else self.programs[programs[event.program]]
                rest = {k: v for k, v in _fields(event).items() if k not in ("step", "program")}
                self.add_evaluation(used, **rest)
        for note in other.notes:
            self.add_note(note)

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
        """One record as one line, handed to the system at once so that a killed process loses at most this line."""
        if self._file is not None and self._file.closed:
            raise UsageError(f"the ledger's file {self._file.name} is closed: go on with Ledger.resume")
        if self._file is not None:
            content = json.dumps({"record": record, **values}, separators=(",", ":")).encode()[:-1]
            self._file.write(b'%b,"crc":"%08x"}\n' % (content, zlib.crc32(content)))
            self._file.flush()

    @classmethod
    def _read(cls, path: Path, *, until: int | None, drop_damaged: bool) -> tuple[Self, int]:
        """The ledger in a file up to the end of step `until`, and the offset in bytes where that ends."""
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
        """Whether a definition is there: read, and not in a line that was dropped."""
        known = len(self.products if kind == "product" else self.programs)
        return 0 <= index < known and (kind, index) not in (self._lost or ())

    def _define(self, kind: str, known: list[_T], index_of: dict[_T, int], index: int, definition: _T) -> None:
        """Enter a definition; where lines before it were dropped, it stands in for theirs, which nothing may use."""
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
        raise RunError(f"{path} is empty or no ledger: its first line is not complete")
    return content


def _parse(line: bytes, *, checked: bool) -> dict[str, Any]:
    """The record in a line, whose checksum must be right where it has one, and must be there where `checked`."""
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


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass; those that have their default are left out where they follow the others."""
    return {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.default is dataclasses.MISSING or getattr(record, field.name) != field.default
    }


def per_layer(totals: Iterable[Total]) -> Iterator[tuple[str, list[Total]]]:
    """The totals of each layer, in their order."""
    grouped: dict[str, list[Total]] = {}
    for total in totals:
        grouped.setdefault(total.product.layer, []).append(total)
    yield from grouped.items()
