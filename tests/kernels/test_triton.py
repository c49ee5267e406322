"""The Triton kernels and their engine on a machine without a GPU: interpreted, and compiled for GPUs."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from helpers import script
from lowbit.engines import choice
from lowbit.engines import triton as engine
from lowbit.methods.recipe import Recipe
from lowbit.products.operators import Convolution, Linear, Op

triton = pytest.importorskip("triton", reason="Triton is not installed")

from lowbit.kernels.triton import device_codes, proofs, variants  # noqa: E402 - after the skip

FILE = Path(__file__).with_name("triton_interpreted.py")


def test_the_kernels_interpreted_equal_the_definition() -> None:
    """Every test of `triton_interpreted.py` passes in a process that interprets kernels on the CPU."""
    command = [sys.executable, "-m", "pytest", str(FILE), "-q", "--no-header", "-x"]

    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("capability", proofs.CAPABILITIES)
def test_products_compile_to_integer_matrix_instructions_without_spills(capability: int) -> None:
    """For each architecture, without a GPU; `benchmarks/triton_proofs.py` compiles all variants."""
    found = proofs.compiled(variants.int8_mm("output", torch.float32, aligned=True), capability)

    assert proofs.faults([found]) == []
    assert found.instruction.startswith("wgmma.mma_async.sync" if capability == 90 else "mma.sync.aligned.m16n8k32")
    assert found.instruction.endswith(".s32.s8.s8" if capability == 90 else ".s32.s8.s8.s32")
    assert 0 < found.registers <= 255


@pytest.mark.parametrize(
    "variant",
    [
        variants.int8_mm_blocks("grad_weight", torch.bfloat16, aligned=False),
        variants.range_codes(variants.Target(by="both", noisy=True), torch.float32, aligned=False),
        variants.block_codes((32, 32), torch.bfloat16, noisy=True, aligned=True),
    ],
    ids=lambda variant: variant.name,
)
def test_other_kernels_compile_without_spills(variant: variants.Variant) -> None:
    """Those with the most to keep in registers."""
    assert proofs.faults([proofs.compiled(variant, 80)]) == []


def test_what_must_not_be_is_found() -> None:
    """A tile too large for its warps spills, and a kernel that does not multiply lacks the instruction."""
    large = variants.int8_mm("output", torch.float32, aligned=False)
    large = dataclasses.replace(large, constants={**large.constants, "block_k": 64})
    scalar = dataclasses.replace(variants.ranges("row", torch.float32, aligned=True), multiplies=True)

    faults = proofs.faults([proofs.compiled(large, 80), proofs.compiled(scalar, 80)])

    assert len(faults) == 2
    assert re.fullmatch(r"int8_mm output fp32 ragged for compute capability 8.0 spills [1-9]\d* bytes", faults[0])
    assert faults[1] == "ranges row fp32 for compute capability 8.0 does not multiply on integer matrix units"


def test_every_variant_has_a_name_of_its_own_and_is_proven_as_it_is_launched() -> None:
    """Names are unique, and no argument's value but the compile-time ones selects another compilation."""
    every = variants.all_variants()

    assert len({variant.name for variant in every}) == len(every)
    for variant in every:
        for parameter in variant.kernel.params:
            whole = not parameter.is_constexpr and variant.types.get(parameter.name, "i32") == "i32"
            assert parameter.do_not_specialize == whole, f"{variant.name}: {parameter.name}"


def test_the_table_of_the_page_is_what_the_command_writes() -> None:
    """For one kernel and one architecture; the command compiles all of them."""
    page = script("triton_proofs").PAGE.read_text(encoding="utf-8")
    stated = re.search(r"With Triton ([\d.]+):", page)
    assert stated is not None
    if stated[1] != triton.__version__:
        pytest.skip(f"the table of docs/gpu.md is of Triton {stated[1]}, and {triton.__version__} is installed")

    found = [proofs.compiled(v, 89) for v in variants.all_variants() if v.kernel is device_codes.ranges]

    assert proofs.table(found).splitlines()[-1] in page.splitlines()
    kernels = {variant.kernel.__name__ for variant in variants.all_variants()}
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)
    assert sorted(rows) == sorted((kernel, str(c / 10)) for kernel in kernels for c in proofs.CAPABILITIES)


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        pytest.param(Linear(), "int8", "torch finds no NVIDIA GPU here", marks=needs_no_gpu),
        pytest.param(Linear(), "jetfire", "torch finds no NVIDIA GPU here", marks=needs_no_gpu),
        (Linear(), "sbm8-cpt", "a float offset is not an integer code"),
        (Linear(), "mxfp8", "is a Minifloat, which is not listed"),
        (Linear(), "bf16", "the triton engine does not take a bf16 operand"),
        (Convolution(stride=(1,), padding=(0,), dilation=(1,)), "int8", "linear layers only, not a convolution"),
    ],
)
def test_what_the_engine_does_not_run_is_said(op: Op, name: str, message: str) -> None:
    """Formats and operators first; what it takes is refused where it cannot be proven."""
    refused = choice.refusals(op, Recipe.from_name(name), device="cuda", engine="triton")

    assert refused.keys() == set(choice.PRODUCTS)
    assert all(message in why for why in refused.values())


def test_without_triton_the_engine_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's name is in the message."""
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: None)
    engine.missing.cache_clear()

    assert engine.missing() == "Triton is not installed: `pip install 'lowbit[triton]'`"
    engine.missing.cache_clear()


def test_a_layer_on_the_cpu_is_not_converted_for_it() -> None:
    """The message says where it runs."""
    with pytest.raises(lowbit.UsageError, match="it takes float32 and bfloat16 on cuda"):
        lowbit.convert_(nn.Linear(8, 8), "int8", engine="triton")


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(engine.missing()), reason="no GPU here that passes the engine's self-test"
)


@needs_gpu
@pytest.mark.parametrize("recipe", ["int8", "cpt-int8", "jetfire", "mxint8"])
def test_a_linear_layer_on_a_gpu_gives_what_the_reference_gives(recipe: str) -> None:
    """Output and gradients, to the rounding of float32 sums."""
    results = []
    for name in ("triton", "reference"):
        layer = nn.Linear(200, 136).cuda()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(136, 200, generator=torch.Generator().manual_seed(1)))
            layer.bias.zero_()
        lowbit.convert_(layer, recipe, engine=name, seed=0)
        x = torch.randn(70, 200, generator=torch.Generator().manual_seed(2)).cuda().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.weight.grad])

    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * float(two.abs().max()))
