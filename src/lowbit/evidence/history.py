"""What a run computed, in memory: records are added, and sums are asked for."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from lowbit.errors import UsageError, check_choice, shown
from lowbit.evidence.records import PRODUCTS, Convention, Evaluation, Product, Program, Step, Total, fields_of
from lowbit.inputs.checks import check_type, check_whole, checked
from lowbit.methods.names import widths_of


class History(ABC):
    """Products, programs, steps and evaluations of a run.

    Args:
        model: the model's name, for reports.
        layers: names of the layers that are expected to run, to name those that never did.
        first_step: number of the first step, if earlier ones are not in it.
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

    @abstractmethod
    def _write(self, record: str, values: dict[str, Any]) -> None:
        """Take note of a record that is about to be added."""

    # Adding records.

    def intern(self, product: Product) -> int:
        """The index of a product, which is added if it is new."""
        index = self._product_index.get(product)
        if index is None:
            self._write("product", {"index": len(self.products), **fields_of(product)})
            index = self._product_index[product] = len(self.products)
            self.products.append(product)
        return index

    def intern_program(self, program: Program) -> int:
        """The index of a program, which is added if it is new."""
        index = self._program_index.get(program)
        if index is None:
            for product, calls in program.calls:
                if not 0 <= product < len(self.products) or calls < 1:
                    raise UsageError(f"a program calls product {product} {calls} times: no such product or count")
            self._write("program", {"index": len(self.programs), **fields_of(program)})
            index = self._program_index[program] = len(self.programs)
            self.programs.append(program)
        return index

    def add_step(self, program: Program | int, *, samples: int) -> None:
        """Add the next step, with its program or the index of a known one."""
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
        self._write("evaluation", fields_of(evaluation))
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
        """The most bytes that one forward pass of a step kept for its backward; see `Program`."""
        known = [self.programs[number].held_bytes for number in set(self._program_numbers(False))]
        return max((held for held in known if held is not None), default=None)

    @property
    def sent_bytes(self) -> int:
        """The bytes that this process sent for its gradients in all steps; see `Program`."""
        return sum(self.programs[step.program].sent_bytes for step in self.steps)

    @checked
    def totals(self, convention: Convention = "as-ran", *, evaluations: bool = False) -> list[Total]:
        """Each product with its number of calls over all steps, in the order of first appearance.

        Args:
            convention: ``"as-ran"``, or ``"as-charged"``, as the papers count: each layer whose weight was trained also
                has a `grad_input`, although nothing needs that of the first layer.
            evaluations: whether to count the evaluations instead of the steps.
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
        """The first evaluation with the best score; None if no score is a number.

        Raises:
            UsageError: the scores have several names or directions.
        """
        scored = [e for e in self.evaluations if e.score is not None and not math.isnan(e.score)]
        kinds = {(e.name, e.higher_is_better) for e in scored}
        if len(kinds) > 1:
            raise UsageError(
                f"scores of {sorted(str(name) for name, _ in kinds)}: give only one kind to ask for the best"
            )
        sign = 1 if scored and scored[0].higher_is_better else -1
        return max(scored, key=lambda e: (sign * (e.score or 0.0), -e.step), default=None)

    @checked
    def until(self, step: int) -> Self:
        """The same ledger, in memory, as it was after `step` steps: the whole run up to a checkpoint."""
        part = type(self)(model=self.model, layers=self.layers, first_step=self.first_step)
        part._append(self, until=step)
        return part

    @checked
    def at(self, widths: str) -> Self:
        """The same ledger, in memory, as if every converted layer had had these widths all the time.

        Nothing runs again: shapes, calls, samples and scores stay. What ran outside converted layers keeps its widths.

        Args:
            widths: of `weight`, `input` and `grad_output` in bits, e.g. ``"w4a4g8"``; ``"w32a32g32"`` is full
                precision.

        Raises:
            UsageError: these are no widths, or one is 0.
        """
        bits = _widths(widths)
        other = type(self)(model=self.model, layers=self.layers, first_step=self.first_step)
        other._append(self, change=lambda product: product.at(bits))
        other.add_note(f"costed at {widths}, not at the widths that ran")
        return other

    @classmethod
    def merged(cls, ledgers: Sequence["History"]) -> Self:
        """The ledgers of the ranks of one run as one ledger: calls and samples of each step add up.

        Raises:
            UsageError: no ledger is given, or they do not cover the same steps.
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
                    cache[key] = whole.intern_program(whole.sum_of(programs))
                whole.add_step(cache[key], samples=sum(led.steps[i].samples for led in ledgers))
        return whole

    def _merge_evaluations(self, ledgers: Sequence["History"], step: int) -> None:
        """Add up the n-th evaluation of each ledger after the same step; the score is the first ledger's."""
        queues = [[e for e in led.evaluations if e.step == step] for led in ledgers]
        for n in range(max(map(len, queues))):
            found = [(led, queue[n]) for led, queue in zip(ledgers, queues, strict=True) if n < len(queue)]
            programs = [(led, led.programs[e.program]) for led, e in found if e.program is not None]
            scored = next((e for _, e in found if e.score is not None), found[0][1])
            self.add_evaluation(
                self.sum_of(programs) if programs else None,
                samples=sum(e.samples for _, e in found),
                name=scored.name,
                score=scored.score,
                higher_is_better=scored.higher_is_better,
            )

    def sum_of(self, programs: Sequence[tuple["History", Program]]) -> Program:
        """One program that runs all of these; its products are added to this ledger."""
        calls: Counter[int] = Counter()
        uncounted: Counter[str] = Counter()
        for source, program in programs:
            for product, n in program.calls:
                calls[self.intern(source.products[product])] += n
            uncounted.update(dict(program.uncounted))
        held = [program.held_bytes for _, program in programs if program.held_bytes is not None]
        return Program(
            calls=tuple(calls.items()),
            uncounted=tuple(sorted(uncounted.items())),
            held_bytes=sum(held) if held else None,
            sent_bytes=sum(program.sent_bytes for _, program in programs),
        )

    def _append(
        self, other: "History", until: int | None = None, change: Callable[[Product], Product] | None = None
    ) -> None:
        """Take over the records of another ledger, in the order they were made, up to a number of steps.

        Args:
            other: the ledger.
            until: the number of steps; None: all.
            change: what becomes of each product; None: it stays. Products that become equal are one.
        """
        products = [self.intern(product if change is None else change(product)) for product in other.products]
        programs = []
        for program in other.programs:
            calls: Counter[int] = Counter()
            for i, n in program.calls:
                calls[products[i]] += n
            programs.append(self.intern_program(dataclasses.replace(program, calls=tuple(calls.items()))))
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
                rest = {k: v for k, v in fields_of(event).items() if k not in ("step", "program")}
                self.add_evaluation(used, **rest)
        for note in other.notes:
            self.add_note(note)


def _widths(text: str) -> Mapping[str, int]:
    """The bits of each operand in a text like ``w4a4g8``."""
    bits = widths_of(text)
    if bits is None or min(bits) < 1:
        raise UsageError(f"widths {shown(text)}: write wXaYgZ with whole numbers from 1, e.g. w4a4g8")
    return dict(zip(("weight", "input", "grad_output"), bits, strict=True))
