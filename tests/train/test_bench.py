"""`lowbit bench`: what it times and what it says. How long anything takes is never asserted."""

import logging
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lowbit
from lowbit.conversion import calibration
from lowbit.conversion.calibration import STANDINS, Shape, Table, Timing
from lowbit.engines import int8
from lowbit.errors import UsageError
from lowbit.kernels import native_instruction_sets, operators
from lowbit.products import watch
from lowbit.train import bench
from lowbit.train.bench import passes, timing

needs_units = pytest.mark.skipif(
    bool(int8.missing("int8") or int8.missing("bf16")), reason="this machine has no choice of engines"
)

WORKS = dict(bench.WORKS)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small work, `tiny`, in place of those that take seconds, and no qtorch, which builds itself at import."""

    def tiny() -> bench.Work:
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 3))
        return bench.Work(model, torch.randn(6, 4, 2, 2), torch.randint(3, (6,)))

    works = {"tiny": tiny}
    for module in (bench, timing):
        monkeypatch.setattr(module, "WORKS", works)
    monkeypatch.setitem(sys.modules, "qtorch.quant", None)


def cells(lines: Iterator[str], first: str) -> list[list[str]]:
    """The rows of a printed table that begin with a word."""
    text = "\n".join(lines)
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if line.startswith(f"{first} ")]


class TestSteps:
    """Training steps of a work in several variants."""

    @needs_units
    def test_the_table_has_a_row_for_each_variant(self) -> None:
        """Median, smallest and largest time in order, and speed 1 against itself."""
        rows = cells(bench.steps(["tiny"], ["fp32", "bf16", "sbm8"], 3), "tiny")

        assert [row[1] for row in rows] == ["fp32", "bf16", "sbm8"]
        assert all(float(low) <= float(median) <= float(high) for _, _, median, low, high, *_ in rows)
        assert [rows[0][5], rows[1][6]] == ["1.00", "1.00"]

    def test_speed_is_the_median_of_paired_ratios(self) -> None:
        """A round that was slow for both variants changes no speed; without a base a dash stands."""
        (_, bf16) = bench.rows("w", {"fp32": [1.0, 9.0, 2.0], "bf16": [0.5, 3.0, 1.0]})
        (alone,) = bench.rows("w", {"int8": [0.5]})

        assert bf16 == ["w", "bf16", "1000.0", "500.0", "3000.0", "2.00", "1.00"]
        assert alone[5:] == ["-", "-"]

    @pytest.mark.parametrize(
        ("name", "engines", "dtype"),
        [
            ("fp32", set(), torch.float32),
            ("bf16", set(), torch.bfloat16),
            pytest.param("int8", {"int8"}, torch.bfloat16, marks=needs_units),
            pytest.param("sbm8", {"int8", "bf16"}, torch.bfloat16, marks=needs_units),
            ("int8:reference", {"reference"}, torch.bfloat16),
        ],
    )
    def test_a_variant_trains_as_its_name_says(self, name: str, engines: set[str], dtype: torch.dtype) -> None:
        """Recipes run on the int8 engine inside autocast, or on the engine that is named; fp32 without autocast."""
        work, dtypes, called = bench.WORKS["tiny"](), [], []
        bench.WORKS["tiny"] = lambda: work
        step, _ = bench.stepper("tiny", name)
        before = work.model[3].weight.clone()
        work.model.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))

        with watch.counted_by(called.append):
            step()

        assert {call.engine for call in called} == engines
        assert dtypes == [dtype]
        assert not torch.equal(before, work.model[3].weight)

    def test_variants_begin_with_the_same_network(self) -> None:
        """Every variant of a work has the same weights, batch and labels."""
        made: list[bench.Work] = []
        build = bench.WORKS["tiny"]

        def keep() -> bench.Work:
            made.append(build())
            return made[-1]

        bench.WORKS["tiny"] = keep
        for name in ("fp32", "int8:reference"):
            bench.stepper("tiny", name)

        assert torch.equal(made[0].x, made[1].x)
        assert torch.equal(made[0].y, made[1].y)
        assert all(map(torch.equal, made[0].model.parameters(), made[1].model.parameters()))

    @pytest.mark.parametrize(
        ("works", "variants", "rounds", "message"),
        [
            (["tiny", "vgg"], ["fp32"], 1, "unknown work 'vgg'.*tiny"),
            (["tiny"], ["int9"], 1, "unknown variant 'int9'. Did you mean 'int8'"),
            (["tiny"], ["absent.toml"], 1, "recipe file absent.toml cannot be read"),
            (["tiny"], ["int8:w4a4g99:auto"], 1, "bits=99"),
            (["tiny"], ["sbm8:cuda"], 1, "unknown engine 'cuda'.*auto, int8, reference"),
            (["tiny"], ["fp32"], 0, "rounds must be at least 1, got 0"),
        ],
    )
    def test_wrong_requests_are_refused_before_anything_runs(
        self, works: list[str], variants: list[str], rounds: int, message: str
    ) -> None:
        """An unknown name or no round is an error at once, with what is allowed."""
        with pytest.raises(UsageError, match=message):
            next(bench.steps(works, variants, rounds))

    def test_a_device_that_is_not_here_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An unknown device, or a GPU where torch finds none, is an error at once."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        with pytest.raises(UsageError, match=r"unknown device 'tpu'.*cpu, cuda"):
            next(bench.steps(["tiny"], ["fp32"], 1, "tpu"))
        with pytest.raises(UsageError, match="torch finds no GPU here"):
            next(bench.steps(["tiny"], ["fp32"], 1, "cuda"))

    def test_engines_are_counted_by_product(self) -> None:
        """On a GPU a note says how many products each engine ran; plain networks have none."""
        recipe, plain = (bench.stepper("tiny", name)[0] for name in ("int8:reference", "fp32"))

        assert timing._on_gpu(recipe) == "5 of 5 products on reference"
        assert timing._on_gpu(plain) == ""

    @needs_units
    def test_a_recipe_that_int8_cannot_run_is_left_out_beside_others(self) -> None:
        """A note says why, and the name that times it; the others have their rows."""
        text = "\n".join(bench.steps(["tiny"], ["fp32", "w4a4g6"], 1))

        assert re.search(
            r"note: tiny, w4a4g6: left out: .*int8 engine cannot run.*\. Give w4a4g6:auto to time it", text
        )
        assert re.search(r"^tiny +fp32 ", text, re.MULTILINE)
        assert not re.search(r"^tiny +w4a4g6 ", text, re.MULTILINE)

    @needs_units
    def test_a_recipe_that_int8_cannot_run_is_refused(self) -> None:
        """Nothing runs quietly on another engine than the one that is timed."""
        with pytest.raises(UsageError, match="int8 engine cannot run"):
            list(bench.steps(["tiny"], ["w4a4g6"], 1))

    @needs_units
    def test_the_engine_that_auto_chose_is_said(self) -> None:
        """A note names what `auto` came to; a recipe on the engine that was asked for needs none."""
        text = "\n".join(bench.steps(["tiny"], ["sbm8:auto", "sbm8", "w9a9g9:auto", "sbm8-cpt:auto"], 1))

        assert "tiny, sbm8:auto: output on int8, grad_input on int8, grad_weight on bf16" in text
        assert "tiny, w9a9g9:auto: on reference" in text
        assert "tiny, sbm8-cpt:auto: output on int8, grad_input on reference, grad_weight on int8" in text
        assert "tiny, sbm8:" not in text.replace("tiny, sbm8:auto", "")

    @needs_units
    def test_layers_without_gain_are_named_beforehand(self) -> None:
        """After a calibration in which linear layers gain nothing, they are named before any step is timed."""
        slow, fast = (1.0, 2.0, 3.0), (1.0, 2.0, 0.5)
        kinds: Any = (("linear", slow), ("conv", fast))
        calibration.save(
            Table(
                tuple(
                    Timing(
                        shape=Shape(kind=kind, inputs=4, outputs=4),
                        recipe=recipe,
                        fp32=ms[0],
                        reference=ms[1],
                        int8=ms[2],
                    )
                    for kind, ms in kinds
                    for recipe in STANDINS.values()
                )
            )
        )

        lines = list(bench.steps(["tiny"], ["fp32", "sbm8"], 1))

        assert lines[1] == "tiny, sbm8: measured alone as no faster than fp32 on any engine: 3"


class TestForeign:
    """Variants that need what may not be here."""

    def test_torchao_is_left_out_and_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where torchao cannot be imported, the other variants are timed and a note says why it is not there."""
        monkeypatch.setitem(sys.modules, "torchao.prototype.quantized_training", None)
        monkeypatch.setitem(sys.modules, "torchao", None)

        lines = list(bench.steps(["tiny"], ["fp32", "torchao"], 1))

        assert [row[1] for row in cells(iter(lines), "tiny")] == ["fp32"]
        assert "note: tiny, torchao: left out, ModuleNotFoundError" in lines[-1]

    def test_layers_that_torchao_leaves_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its int8 training swaps linear layers for its own and leaves convolutions: the note has both numbers."""

        class Swapped(nn.Linear):
            pass

        def quantize(model: nn.Module, config: str) -> None:
            assert config == "swap"
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.__class__ = Swapped

        training = types.SimpleNamespace(
            int8_mixed_precision_training=lambda *, module_swap: "swap" if module_swap else ""
        )
        monkeypatch.setitem(sys.modules, "torchao.prototype.quantized_training", training)
        monkeypatch.setitem(sys.modules, "torchao.quantization", types.SimpleNamespace(quantize_=quantize))
        level = logging.getLogger("torchao").level
        try:
            _, note = bench.stepper("tiny", "torchao")
        finally:
            logging.getLogger("torchao").setLevel(level)

        assert note == "torchao converts 1 of 2 layers"

    def test_what_does_not_compile_is_left_out_and_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A compiler that fails in the first step costs its variant and no other, and its first line is the reason."""

        def fails(self: nn.Module) -> None:
            def forward(*_: Any) -> None:
                raise RuntimeError("no C++ compiler\nand a long story")

            self.forward = forward

        monkeypatch.setattr(nn.Module, "compile", fails)

        lines = list(bench.steps(["tiny"], ["fp32", *bench.COMPILED], 1))

        assert [row[1] for row in cells(iter(lines), "tiny")] == ["fp32"]
        for name in ("fp32-compiled", "bf16-compiled"):
            assert f"note: tiny, {name}: left out, RuntimeError: no C++ compiler" in lines[-1]
        assert "long story" not in lines[-1]

    def test_a_failure_of_our_own_is_no_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only what others build may be left out: a recipe that fails is an error."""

        def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(lowbit, "convert_", fails)

        with pytest.raises(RuntimeError, match="a defect"):
            timing._ready("tiny", ["sbm8"])


class TestKernels:
    """Passes over memory."""

    def test_every_pass_has_a_row_against_clone(self) -> None:
        """The first row is the clone itself with ratio 1; each has its times in order."""
        lines = list(bench.kernels(2, side=64))
        rows = [re.split(r"  +", line) for line in lines[1].splitlines()[2:]]

        assert rows[0][0] == "torch.clone"
        assert rows[0][4] == "1.00"
        assert [row[0] for row in rows] == list(passes.passes(torch.ones(64, 64)))
        assert all(float(low) <= float(median) <= float(high) for _, median, low, high, _ in rows)
        assert "4,096 elements" in lines[0]

    @pytest.mark.skipif(native_instruction_sets() is None, reason="no native kernels")
    def test_every_kernel_is_there(self) -> None:
        """Every native pass over memory is among what is timed: a new one must be added."""
        natives = {
            name: each
            for name, each in vars(operators).items()
            if isinstance(each, operators.Native) and name[0] != "_"
        }
        expected = {name for name in natives if not name.startswith(("multiply", "attention"))}
        called: set[str] = set()
        with pytest.MonkeyPatch.context() as patch:
            for name in expected:
                seen = lambda *a, name=name: (called.add(name), natives[name](*a))[1]  # noqa: E731 - one name each
                patch.setattr(operators, name, seen)
            for run in passes._native_passes(torch.ones(64, 64)).values():
                run()

        assert called == expected

    @pytest.mark.skipif(native_instruction_sets() is None, reason="no native kernels")
    def test_encode_is_timed_in_all_its_forms(self) -> None:
        """Unsigned and signed, per tensor and per row, nearest and stochastic: eight different results."""
        x = torch.linspace(-2, 2, 64 * 64).view(64, 64)
        found = {name: run() for name, run in passes._native_passes(x).items() if name.startswith("encode")}

        assert len(found) == 8
        assert {str(codes.dtype) for codes in found.values()} == {"torch.uint8", "torch.int8"}
        assert not torch.equal(found["encode s8 row nearest"], found["encode s8 row stochastic"])

    def test_without_native_kernels_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An install without a compiler times torch's passes and says what is missing."""
        monkeypatch.setattr(passes, "native_instruction_sets", lambda: None)

        text = "\n".join(bench.kernels(1, side=64))

        assert "torch.fake_quantize_per_tensor_affine" in text
        assert "encode" not in text
        assert "without its native kernels" in text

    def test_without_qtorch_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where qtorch cannot be imported a note says so; where it can, both roundings are timed."""
        without = "\n".join(bench.kernels(1, side=64))
        fake = types.SimpleNamespace(fixed_point_quantize=lambda x, **_: x.clone())
        monkeypatch.setitem(sys.modules, "qtorch", types.SimpleNamespace(quant=fake))
        monkeypatch.setitem(sys.modules, "qtorch.quant", fake)
        present = "\n".join(bench.kernels(1, side=64))

        assert "note: qtorch cannot be imported" in without
        assert "note: qtorch" not in present
        assert present.count("qtorch.fixed_point_quantize") == 2


def test_the_stored_works_are_built() -> None:
    """Every stored work has a network with layers to convert and a batch that fits its labels."""
    assert list(WORKS) == ["mlp", "gpt-512", "gpt-1024", "resnet18", "resnet20"]
    with torch.device("meta"):
        for build in WORKS.values():
            model, x, y = build()
            assert len(model(x).flatten(0, -2)) == len(y)
