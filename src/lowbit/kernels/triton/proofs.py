"""What the compiler makes of each variant, for any GPU and without one: instruction, registers, spills."""

import contextlib
import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.kernels.triton.variants import INTERPRETED, Variant

CAPABILITIES = (80, 86, 89, 90, 120)
"""Compute capabilities that every variant is compiled for, as 10 times the number."""

_ALIGNED = [["tt.divisibility", 16]]
_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync[\w.]*\.s8\.s8[\w.]*")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One variant, compiled for one GPU.

    Args:
        variant: which.
        capability: 10 times the compute capability.
        instruction: of the integer matrix units; empty if it has none.
        registers: of a thread.
        spilled: bytes that a thread moves to memory for lack of registers, stored and loaded.
        shared: bytes of shared memory.
    """

    variant: Variant
    capability: int
    instruction: str
    registers: int
    spilled: int
    shared: int


def compiled(variant: Variant, capability: int) -> Compiled:
    """Compile a variant for GPUs of a compute capability, as a launch would, down to machine code.

    Raises:
        RuntimeError: the compiler did not say how many registers it took, or Triton interprets.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, so that nothing is compiled: unset it")
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types.get(n, "i32") for n in names}
    pointers = {(i,): _ALIGNED for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=pointers)
    log = io.StringIO()
    with _loud(), contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    if not registers or not spills:
        raise RuntimeError(f"{variant.name} for {capability}: the compiler's log lacks registers: {log.getvalue()!r}")
    found = sorted(set(_INSTRUCTION.findall(kernel.asm["ptx"])))
    return Compiled(
        variant=variant,
        capability=capability,
        instruction=" ".join(found),
        registers=max(map(int, registers)),
        spilled=sum(map(int, spills)),
        shared=kernel.metadata.shared,
    )


@contextlib.contextmanager
def _loud() -> Iterator[None]:
    """Compile anew, and print what the assembler says."""
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder, knobs.nvidia.scope(), knobs.cache.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = folder
        yield


def faults(found: Iterable[Compiled]) -> list[str]:
    """What must not be: a spill, or a product without the integer matrix units."""
    wrong = []
    for each in found:
        where = f"{each.variant.name} for compute capability {each.capability / 10}"
        if each.spilled:
            wrong.append(f"{where} spills {each.spilled} bytes")
        if each.variant.multiplies and not each.instruction:
            wrong.append(f"{where} does not multiply on integer matrix units")
    return wrong


HEADER = ("kernel", "compute capability", "variants", "instruction", "registers", "spilled bytes", "shared memory")


def table(found: Sequence[Compiled]) -> str:
    """A row of Markdown for each kernel and capability, in the order in which they come; ranges over variants."""
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for each in found:
        groups.setdefault((each.variant.kernel.__name__, each.capability), []).append(each)
    rows = [HEADER, ["---"] * len(HEADER)]
    for (kernel, capability), group in groups.items():
        instructions = sorted({name for each in group for name in each.instruction.split()})
        rows.append(
            [
                f"`{kernel}`",
                str(capability / 10),
                str(len(group)),
                ", ".join(f"`{name}`" for name in instructions) or "none needed",
                _range(each.registers for each in group),
                _range(each.spilled for each in group),
                _range(each.shared for each in group),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _range(numbers: Iterable[int]) -> str:
    low, *_, high = sorted([*numbers] * 2)
    return str(low) if low == high else f"{low:,} to {high:,}"
