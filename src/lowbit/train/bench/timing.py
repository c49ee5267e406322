"""Training steps of works in several variants, timed in paired rounds."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

import lowbit
from lowbit.errors import UsageError, unknown
from lowbit.machine import here, paired, ratio
from lowbit.products.watch import ProductCall, counted_by
from lowbit.tables import text_table
from lowbit.train.bench.variants import BASES, variant
from lowbit.train.bench.works import WORKS

Step = Callable[[], object]

DEVICES = ("cpu", "cuda")


def stepper(work: str, name: str, device: str = "cpu") -> tuple[Step, str]:
    """One training step with SGD and momentum 0.9 on a fixed batch of a fresh model, and what a reader must know of it.

    A step on a GPU ends when the GPU has finished it.

    Args:
        work: one of `WORKS`.
        name: see `variant`.
        device: one of `DEVICES`, where the model goes after it was converted on the CPU.
    """
    torch.manual_seed(0)
    model, x, y = WORKS[work]()
    how = variant(name)
    note = how.prepare(model)
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=how.autocast):
            logits = model(x)
        F.cross_entropy(logits.flatten(0, -2).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, note


def _on_gpu(step: Step) -> str:
    """Run one step: how many of its products each engine ran, which may not be the one chosen on the CPU."""
    calls: list[ProductCall] = []
    with counted_by(calls.append):
        step()
    engines = Counter(call.engine for call in calls)
    return ", ".join(f"{count} of {len(calls)} products on {engine}" for engine, count in engines.items())


def _ready(work: str, names: Iterable[str], device: str = "cpu") -> tuple[dict[str, Step], list[str]]:
    """A step of each variant that runs here, and a note for each that does not or is not what it seems."""
    steps: dict[str, Step] = {}
    notes, left = [], []
    for name in names:
        try:
            step, note = stepper(work, name, device)
            if variant(name).foreign:
                step()  # what is compiled fails in its first step
            elif device == "cuda":
                note = _on_gpu(step)
        except UsageError as error:
            if not variant(name).otherwise:
                raise
            reason, _, _ = str(error).partition(". Leave")
            notes.append(f"{work}, {name}: left out: {reason}. Give {variant(name).otherwise} to time it")
            left.append(error)
            continue
        except Exception as error:
            if not variant(name).foreign:
                raise
            reason = str(error).strip().partition("\n")[0] or "no reason given"
            notes.append(f"{work}, {name}: left out, {type(error).__name__}: {reason}")
            continue
        steps[name] = step
        if note:
            notes.append(f"{work}, {name}: {note}")
    if left and not steps:
        raise left[0]
    return steps, notes


HEADER = ("work", "variant", "median ms", "min", "max", "speed to fp32", "to bf16")


def rows(work: str, seconds: Mapping[str, Sequence[float]], digits: int = 1) -> list[list[str]]:
    """Lines of one work in the table of `HEADER`, milliseconds with so many digits after the point.

    A speed is the median over rounds of how many times as fast as the base a variant was in the same round.
    """
    lines = []
    for name, taken in seconds.items():
        ms = [f"{1e3 * s:.{digits}f}" for s in (statistics.median(taken), min(taken), max(taken))]
        speeds = [f"{ratio(seconds[base], taken):.2f}" if base in seconds else "-" for base in ("fp32", "bf16")]
        lines.append([work, name, *ms, *speeds])
    return lines


def steps(works: Sequence[str], variants: Sequence[str], rounds: int, device: str = "cpu") -> Iterator[str]:
    """Time every variant of every work; gives lines of text as they are ready, the table last.

    Args:
        works: names of `WORKS`.
        variants: names for `variant`.
        rounds: rounds that count.
        device: one of `DEVICES`.

    Raises:
        UsageError: an unknown name, no round, no such device here, or a layer that the engine asked for cannot run.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device='cuda', and torch finds no GPU here. Leave --device out to time the CPU.")
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}.")
    for work in works:
        if work not in WORKS:
            raise unknown("work", work, WORKS)
    for name in variants:
        variant(name)
    if device == "cuda":
        yield f"{here()}, {torch.cuda.get_device_name()}, {_fp32_on_gpu()}"
    else:
        yield str(here())
        yield from without_gain(works, variants)
    digits = 2 if device == "cuda" else 1
    table: list[list[str]] = []
    notes: list[str] = []
    for work in works:
        ready, said = _ready(work, variants, device)
        seconds = paired(ready, rounds)
        table += rows(work, seconds, digits)
        notes += said
        medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
        yield f"{work}: {', '.join(f'{name} {ms:.{digits - 1}f} ms' for name, ms in medians.items())}"
    yield f"\nsteps of forward, backward and update, {rounds} rounds; all but fp32 inside bf16 autocast\n"
    yield "\n".join([text_table(HEADER, table), *("note: " + note for note in notes)])


def _fp32_on_gpu() -> str:
    """How torch multiplies float32 there, which its own settings decide."""
    matrices = "float32" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    convolutions = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    return f"fp32: matrices in {matrices}, convolutions in {convolutions}"


def without_gain(works: Sequence[str], variants: Sequence[str]) -> Iterator[str]:
    """A line for each work and recipe with layers that no engine makes faster than fp32 here, as was measured."""
    for work in works:
        for recipe in dict.fromkeys(name.partition(":")[0] for name in variants if name not in BASES):
            torch.manual_seed(0)
            report = lowbit.convert_(WORKS[work]().model, recipe)
            if report.without_gain:
                layers = ", ".join(report.without_gain)
                yield f"{work}, {recipe}: measured alone as no faster than fp32 on any engine: {layers}"
