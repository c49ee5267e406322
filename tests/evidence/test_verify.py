"""Proof of what ran: complete rows, honest figures, and failure where a product is not what was promised."""

import math
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

import lowbit
from helpers import recipe_of
from lowbit import Proof, RunError, UsageError, VerificationError, functional
from lowbit.engines import int8
from lowbit.engines.reference import Reference, Rounded
from lowbit.evidence.theory import angle_bound, bits_needed
from lowbit.evidence.verify import distinct_values
from lowbit.numerics.formats import integer
from lowbit.numerics.transforms import Hadamard
from lowbit.products import watch
from lowbit.products.operators import Linear
from lowbit.products.setting import Setting
from lowbit.products.watch import OperandRun

needs_units = pytest.mark.skipif(bool(int8.missing("int8")), reason="this machine lacks 8-bit units")
ALL = ["output", "grad_input", "grad_weight"]


def _mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    lowbit.convert_(model, "sbm8", engine="reference")
    return model


def _prove(model: nn.Module, x: Tensor) -> Proof:
    """The proof of one training step."""
    with lowbit.verify(model) as proof:
        y = model(x)
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    return proof


def _outside(proof: Proof) -> dict[tuple[str, str], tuple[int, int | None]]:
    """Calls and MACs by operator and module."""
    return {(row.op, row.module): (row.calls, row.macs) for row in proof.outside}


class TestRows:
    """A row for each product of each converted layer."""

    def test_linear_layers(self) -> None:
        """Each layer has its products in order; the first one's input needs no gradient."""
        proof = _prove(_mlp(), torch.randn(5, 6))

        rows = [(row.layer, row.product, row.calls, row.bits, row.engine) for row in proof.rows]
        assert rows == [
            ("0", "output", 1, "8x8", "reference"),
            ("0", "grad_weight", 1, "16x8", "reference"),
            ("2", "output", 1, "8x8", "reference"),
            ("2", "grad_input", 1, "8x8", "reference"),
            ("2", "grad_weight", 1, "16x8", "reference"),
        ]

    def test_a_recurrent_layer(self) -> None:
        """An LSTM has a row for each matrix and product, the recurrent ones once per time step."""
        model = nn.LSTM(3, 4, 2)
        lowbit.convert_(model, "sbm8", engine="reference")

        proof = _prove(model, torch.randn(5, 2, 3, requires_grad=True))

        calls = {(row.layer, row.product): row.calls for row in proof.rows}
        for layer in (0, 1):
            for product in ALL:
                assert calls[f"weight_ih_l{layer}", product] == 1
            assert calls[f"weight_hh_l{layer}", "output"] == calls[f"weight_hh_l{layer}", "grad_weight"] == 5
            # The first state is zeros that nobody differentiates.
            assert calls[f"weight_hh_l{layer}", "grad_input"] == 4

    def test_range_norm(self) -> None:
        """Range BN shows the quantisation of its input and of its gradient, and no MACs."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        lowbit.convert_(model, "sbm8", engine="reference")

        proof = _prove(model, torch.randn(4, 3, 6, 6))

        rows = [row for row in proof.rows if row.layer == "1"]
        assert [(row.product, list(row.operands), row.macs) for row in rows] == [
            ("output", ["input"], 0),
            ("grad_input", ["grad_output"], 0),
        ]
        assert all(15 < row.sqnr_db < 60 for row in rows)

    def test_macs_of_converted_layers_equal_a_count_by_hand(self) -> None:
        """A grouped convolution's three products have batch x positions x outputs x (inputs / groups) x window MACs."""
        model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2))
        lowbit.convert_(model, "sbm8", engine="reference")

        proof = _prove(model, torch.randn(2, 4, 8, 8, requires_grad=True))

        assert [row.macs for row in proof.rows] == [2 * 16 * 6 * 2 * 9] * 3

    def test_evaluation_has_outputs_only(self) -> None:
        """Without a backward only the outputs are due."""
        model = _mlp().eval()

        with lowbit.verify(model) as proof, torch.no_grad():
            model(torch.randn(5, 6))

        assert [(row.layer, row.product) for row in proof.rows] == [("0", "output"), ("2", "output")]

    def test_two_steps_are_summed(self) -> None:
        """Calls and MACs of two steps are twice those of one."""
        model = _mlp()
        with lowbit.verify(model) as proof:
            for _ in range(2):
                model(torch.randn(5, 6)).sum().backward()

        assert {row.calls for row in proof.rows} == {2}
        assert proof.rows[0].macs == 2 * 5 * 6 * 8

    def test_watching_changes_no_gradient(self) -> None:
        """A step under verify gives bit for bit the gradients of the step alone."""
        x, grads = torch.randn(5, 6), []
        for watched in (False, True):
            torch.manual_seed(1)
            model = _mlp()
            if watched:
                _prove(model, x)
            else:
                model(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])

        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class TestFigures:
    """Signal to noise, cosine, clipped share and the angle theory, against computations of the test's own."""

    def test_sqnr_and_cosine_of_an_output(self) -> None:
        """SQNR and cosine of a product equal those computed from plain and quantised outputs."""
        model, x = nn.Linear(6, 8, bias=False), torch.randn(5, 6)
        exact = F.linear(x, model.weight).detach().double()
        lowbit.convert_(model, "sbm8", engine="reference")

        proof = _prove(model, x)

        actual = model(x).detach().double()
        row = proof.rows[0]
        expected = 10 * math.log10(exact.square().sum() / (exact - actual).square().sum())
        assert row.sqnr_db == pytest.approx(expected, abs=1e-3)
        assert row.cosine == pytest.approx(float((exact * actual).sum() / exact.norm() / actual.norm()), abs=1e-9)
        assert 5 < row.sqnr_db < 60

    def test_sqnr_of_an_operand(self) -> None:
        """The weight's SQNR is that of its own grid."""
        model = nn.Linear(6, 8, bias=False)
        w = model.weight.detach().double()
        step = w.abs().amax(1, keepdim=True) / 127
        error = w - (w / step).round() * step
        lowbit.convert_(model, "sbm8", engine="reference")

        proof = _prove(model, torch.randn(5, 6))

        expected = 10 * math.log10(w.square().sum() / error.square().sum())
        assert proof.rows[0].operands["weight"].sqnr_db == pytest.approx(expected, abs=1e-2)

    def test_clipped_share_equals_a_count_by_hand(self) -> None:
        """Of eight inputs in [0, 1] and [0, 3], the one at 3 lies beyond the mean of extremes."""
        model = nn.Linear(4, 2)
        lowbit.convert_(model, "sbm8-hoffer", engine="reference")
        x = torch.tensor([[0.0, 0.2, 0.5, 1.0], [0.0, 1.0, 2.0, 3.0]])

        proof = _prove(model, x)

        assert proof.rows[0].operands["input"].clipped == pytest.approx(1 / 8)
        assert proof.rows[0].clipped == pytest.approx(1 / 8)
        assert proof.rows[0].operands["weight"].clipped == 0

    def test_the_fp32_recipe_has_no_error(self) -> None:
        """With fp32 operands SQNR is infinite and cosine 1, and verification passes."""
        model = nn.Linear(6, 8)
        lowbit.convert_(model, "fp32")

        proof = _prove(model, torch.randn(5, 6))

        assert all(row.sqnr_db == math.inf and row.cosine == pytest.approx(1) for row in proof.rows)
        assert all(row.angle_bound is None and row.bits_needed is None for row in proof.rows)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("engine", ["reference", "int8"])
    @pytest.mark.parametrize("recipe", ["sbm8", "int8", "fp32"])
    def test_values_that_are_not_finite_prove_nothing(self, recipe: str, engine: str, value: float) -> None:
        """A nan or inf in an operand fails the proof, with the layer, the operand and what to do."""
        model = nn.Linear(6, 8)
        lowbit.convert_(model, recipe, engine="reference" if recipe == "fp32" else engine)
        x = torch.randn(5, 6)
        x[1, 2] = value

        with pytest.raises(VerificationError, match=r"input of output has a nan or inf.*tripwire"):
            _prove(model, x)

    @pytest.mark.parametrize(("cosine", "bits"), [(0.95, 4.9), (0.98, 6.2), (0.99, 7.2), (0.995, 8.2)])
    def test_bits_needed_are_those_of_the_theory(self, cosine: float, bits: float) -> None:
        """For a million values the theory asks for 4.9 to 8.2 bits."""
        assert bits_needed(cosine, 10**6) == pytest.approx(bits, abs=0.06)

    @pytest.mark.parametrize("elements", [10, 10**3, 10**6])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_bits_needed_is_the_inverse_of_the_bound(self, bits: int, elements: int) -> None:
        """The bits needed for the cosine that M bits guarantee are M."""
        bound = 2**bits / (2**bits + math.sqrt(math.log(elements)) / math.sqrt(6))
        assert angle_bound(bits, elements) == pytest.approx(bound)
        assert bits_needed(angle_bound(bits, elements), elements) == pytest.approx(bits)

    def test_the_bound_holds_for_normal_values(self) -> None:
        """A weight of 4096 normal values keeps the cosine that the theory guarantees for 8 bits."""
        model = nn.Linear(64, 64)
        nn.init.normal_(model.weight)
        lowbit.convert_(model, "sbm8", engine="reference")

        weight = _prove(model, torch.randn(5, 64)).rows[0].operands["weight"]

        assert weight.angle_bound == angle_bound(8, 4096)
        assert weight.angle_bound < weight.cosine < 1


class TestFailures:
    """What makes the context raise."""

    def test_a_layer_that_is_not_called(self) -> None:
        """A converted layer that did not run is named."""
        model = _mlp()

        def step() -> None:
            with lowbit.verify(model):
                model[0](torch.randn(5, 6)).sum().backward()

        with pytest.raises(VerificationError, match="2: the quantisers of this converted Linear did not run"):
            step()

    @pytest.mark.parametrize("change", [lambda w: w * 1.0, lambda w: w[torch.arange(4)], lambda w: torch.cat([w, w])])
    def test_a_layer_whose_weight_is_changed_before_it_is_used(self, change: Callable[[Tensor], Tensor]) -> None:
        """Where nobody can tell who multiplied by the weight, the rule that leaves the layer is offered too."""
        model = _mlp()

        with pytest.raises(VerificationError, match=r"rules=\[\('2', None\)\]"), lowbit.verify(model):
            F.linear(model[1](model[0](torch.randn(5, 6))), change(model[2].weight)).sum().backward()

    def test_a_layer_whose_forward_was_replaced(self) -> None:
        """A layer whose instance runs another forward is named, though its result is right."""
        model = _mlp()
        layer = model[2]
        layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)

        with pytest.raises(VerificationError, match="2: the quantisers"):
            _prove(model, torch.randn(5, 6))

    @pytest.mark.parametrize("product", ["grad_input", "grad_weight"])
    def test_a_gradient_that_did_not_run(self, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A backward that skips one product of a layer is caught by name."""
        original = functional.gradients

        def skipping(g: Tensor, saved: Any, kept: Any, needs: tuple[bool, bool, bool]) -> Any:
            needs = (needs[0] and product != "grad_input", needs[1] and product != "grad_weight", needs[2])
            return original(g, saved, kept, needs)

        monkeypatch.setattr(functional, "gradients", skipping)
        model = nn.Sequential(nn.Linear(6, 4))
        lowbit.convert_(model, "sbm8", engine="reference")

        with pytest.raises(VerificationError, match=f"0: {product} was due in the backward and did not run"):
            _prove(model, torch.randn(5, 6, requires_grad=True))

    @pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight"])
    def test_a_product_of_unquantised_operands(self, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A product that equals the full-precision one although its operands were off the grid is caught."""
        exact: dict[int, Tensor] = {}
        alive: list[Tensor] = []
        encode = Reference.encode

        def remember(self: Reference, x: Tensor, *args: Any) -> Any:
            result = encode(self, x, *args)
            alive.append(result.numbers)  # so that no other tensor gets its number
            exact[id(result.numbers)] = x
            return result

        def full_precision(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda self, a, b, *rest: original(self, exact.get(id(a), a), exact.get(id(b), b), *rest)

        monkeypatch.setattr(Reference, "encode", remember)
        monkeypatch.setattr(Linear, product, full_precision(getattr(Linear, product)))
        model = nn.Sequential(nn.Linear(6, 4))
        lowbit.convert_(model, "sbm8-hoffer" if product == "output" else "sbm8", engine="reference")

        with pytest.raises(VerificationError, match=f"0: {product} equals the full-precision product"):
            _prove(model, torch.randn(5, 6, requires_grad=True))

    def test_an_unconverted_model(self) -> None:
        """Watching a plain model is a UsageError that says what to call."""
        with pytest.raises(UsageError, match=r"call lowbit\.convert_ first"), lowbit.verify(nn.Linear(3, 3)):
            pass

    def test_nothing_stays_registered_after_an_exception(self) -> None:
        """An exception in a product passes through and leaves no observer, hook or dispatch mode."""
        model = _mlp()

        with pytest.raises(RuntimeError, match="shapes"), lowbit.verify(model):
            model(torch.randn(5, 7))

        assert not watch.observers
        assert not watch.is_inside()
        assert _get_current_dispatch_mode() is None
        assert not torch_module._global_forward_hooks
        assert not torch_module._global_forward_pre_hooks


class _Two(nn.Module):
    """A converted linear layer `q` followed by a part that stays plain."""

    def __init__(self, part: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.q, self.part = nn.Linear(4, 4), part
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """The part applied to the layer's output."""
        x = self.q(x)
        y = self.part(x) if self.call is None else self.call(self.part, x)
        return y[0] if isinstance(y, tuple) else y


def _bypass(layer: nn.Module) -> None:
    """Let a layer run another forward, in full precision."""
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)


class TestOneModel:
    """Rows are those of one model's layers, whatever else has the same names or runs meanwhile."""

    def test_another_model_of_the_same_names_hides_nothing(self) -> None:
        """A bypassed layer fails although a second model's layer of that name ran in the same step."""
        model, other = _mlp(), _mlp()
        _bypass(model[2])

        def step() -> None:
            with lowbit.verify(model):
                x = torch.randn(5, 6)
                (model(x) + other(x)).sum().backward()

        with pytest.raises(VerificationError, match="2: the quantisers of this converted Linear did not run"):
            step()

    def test_another_model_adds_nothing(self) -> None:
        """Calls and MACs are those of the model alone, beside a converted and a plain model of the same names."""
        alone = _prove(_mlp(), torch.randn(5, 6))
        model, others = _mlp(), (_mlp(), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))

        with lowbit.verify(model) as proof:
            x = torch.randn(5, 6)
            (model(x) + others[0](x) + others[1](x)).sum().backward()

        assert [(r.layer, r.product, r.calls, r.macs) for r in proof.rows] == [
            (r.layer, r.product, r.calls, r.macs) for r in alone.rows
        ]
        assert proof.outside == []

    def test_a_product_of_the_caller_is_the_models(self) -> None:
        """What the step multiplies outside of any module, such as a loss of products, is listed."""
        model = _mlp()

        with lowbit.verify(model) as proof:
            y = model(torch.randn(5, 6))
            (y @ y.T).sum().backward()

        assert {(row.op, row.module) for row in proof.outside} == {("aten.mm", "")}
        assert sum(row.macs or 0 for row in proof.outside) == 3 * 5 * 4 * 5

    def test_a_function_call_is_nobodys(self) -> None:
        """A product of `lowbit.products` that no layer asked for is not a row."""
        model = _mlp()

        with lowbit.verify(model) as proof:
            model(torch.randn(5, 6)).sum().backward()
            setting = Setting(recipe=model[0].site.recipe, layer="0")
            functional.linear(torch.randn(5, 6), torch.randn(8, 6), setting=setting)

        assert {row.calls for row in proof.rows} == {1}

    def test_a_model_that_another_thread_runs_adds_nothing(self) -> None:
        """A thread that trains a model of the same names meanwhile changes neither rows nor what lies outside."""
        model, other = _mlp(), _mlp()
        going, stop = threading.Event(), threading.Event()

        def train() -> None:
            while not stop.is_set():
                other(torch.randn(5, 6)).sum().backward()
                going.set()

        thread = threading.Thread(target=train)
        with lowbit.verify(model) as proof:
            thread.start()
            going.wait(60)
            model(torch.randn(5, 6)).sum().backward()
            stop.set()
            thread.join()

        assert {row.calls for row in proof.rows} == {1}
        assert proof.outside == []

    def test_a_thread_inside_a_product_hides_nothing_of_this_one(self) -> None:
        """While another thread computes a product of a converted layer, what this one runs outside is still listed."""
        model = _Two(nn.Linear(4, 4))
        lowbit.convert_(model, "sbm8", engine="reference", rules=[("part", None)])
        entered, leave = threading.Event(), threading.Event()

        def wait() -> None:
            with watch.inside():
                entered.set()
                leave.wait(60)

        thread = threading.Thread(target=wait)
        thread.start()
        entered.wait(60)
        proof = _prove(model, torch.randn(5, 4))
        leave.set()
        thread.join()

        assert sum(row.macs or 0 for row in proof.outside) == 3 * 5 * 4 * 4

    def test_one_model_in_two_threads(self) -> None:
        """Two threads that run the model at once are both in the rows, whole."""
        model = _mlp().eval()
        start = threading.Barrier(2)

        def run() -> None:
            start.wait(60)
            for _ in range(20):
                model(torch.randn(5, 6))

        other = threading.Thread(target=run)
        with lowbit.verify(model) as proof:
            other.start()
            run()
            other.join()

        assert [(row.layer, row.calls, row.macs) for row in proof.rows] == [
            ("0", 40, 40 * 5 * 6 * 8),
            ("2", 40, 40 * 5 * 8 * 4),
        ]


@needs_units
class TestRangeNormOnCodes:
    """A Range BN that runs on codes is shown as it runs."""

    @staticmethod
    def _network() -> tuple[nn.Module, lowbit.Report]:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
        return model, lowbit.convert_(model, "sbm8", engine="int8")

    def test_its_rows_name_engine_and_kernel(self) -> None:
        """Both rows are int8, and the one before a ReLU, with which it ran in one pass, says so."""
        proof = _prove(self._network()[0], torch.randn(4, 3, 6, 6))

        rows = {(r.layer, r.product): (r.engine, r.kernel) for r in proof.rows if r.layer != "0"}
        assert rows == {
            ("1", "output"): ("int8", "lowbit::normalize_relu"),
            ("1", "grad_input"): ("int8", "lowbit::normalize_backward"),
            ("3", "output"): ("int8", "lowbit::normalize"),
            ("3", "grad_input"): ("int8", "lowbit::normalize_backward"),
        }

    def test_the_report_and_the_proof_name_the_same_engines(self) -> None:
        """What the report promised of each product is what ran."""
        model, report = self._network()

        proof = _prove(model, torch.randn(4, 3, 6, 6, requires_grad=True))

        promised = {(row.name, product): engine for row in report.rows for product, engine in row.engines.items()}
        assert {(row.layer, row.product): row.engine for row in proof.rows} == promised

    def test_its_figures_are_those_of_its_codes(self) -> None:
        """The error and the clipped share of its input are those of the grid of 256 codes."""
        model = nn.Sequential(nn.BatchNorm2d(4))
        lowbit.convert_(model, "sbm8", engine="int8")
        x = torch.randn(4, 4, 8, 8)

        row = _prove(model, x.clone().requires_grad_()).rows[0]

        lo, hi = x.flatten(1).amin(1).mean(), x.flatten(1).amax(1).mean()
        step = (hi - lo) / 255
        zero = (-lo / step).round()
        q = (x / step).round() + zero
        error = x - (q.clamp(0, 255) - zero) * step
        assert row.sqnr_db == pytest.approx(10 * math.log10(x.square().sum() / error.square().sum()), abs=1e-3)
        assert row.clipped == pytest.approx(float(((q < 0) | (q > 255)).float().mean()), abs=2 / x.numel())


class _Reads(nn.Module):
    """A block that multiplies by the weight of its layer `qkv` and does not call it, as some vision models do."""

    def __init__(self, *, also_calls: bool = False) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.also_calls = also_calls

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 6)`` to ``(B, 4)``."""
        y = F.linear(x, self.qkv.weight, self.qkv.bias)
        return self.head(self.qkv(y) if self.also_calls else y)


class TestWeightsReadByOthers:
    """A converted layer whose weight other code multiplies by is named, with the operator and the way out."""

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__)
    def test_the_error_says_who_multiplied_by_what(self, autocast: bool, mode: Callable[[], Any]) -> None:
        """The operator, its module, the parameter and the rule are in the message, also where autocast casts."""
        model = nn.Sequential(nn.Linear(6, 6), _Reads())
        lowbit.convert_(model, "sbm8", engine="reference", calls=False)

        with (
            pytest.raises(VerificationError, match=r"1\.qkv: the quantisers of this converted Linear did not run") as e,
            lowbit.verify(model),
            mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model(torch.randn(5, 6))

        assert re.search(r"aten\.(addmm|linear) in 1 by 1\.qkv\.weight", str(e.value))
        assert "rules=[('1.qkv', None)]" in str(e.value)

    def test_the_rule_that_it_offers_works(self) -> None:
        """With the layer left by that rule the proof passes and lists its product outside."""
        model = nn.Sequential(nn.Linear(6, 6), _Reads())
        lowbit.convert_(model, "sbm8", engine="reference", rules=[("1.qkv", None)])

        proof = _prove(model, torch.randn(5, 6))

        assert {row.module for row in proof.outside} == {"1"}
        assert all(row.weights == [] for row in proof.outside)

    def test_a_layer_that_ran_too_is_marked(self) -> None:
        """Where the layer also ran, the operator that read its weight is listed with the parameter's name."""
        model = _Reads(also_calls=True)
        lowbit.convert_(model, "sbm8", engine="reference", calls=False)

        proof = _prove(model, torch.randn(5, 6, requires_grad=True))

        assert {row.op: row.weights for row in proof.outside}["aten.addmm"] == ["qkv.weight"]
        assert "weight of a converted layer" in str(proof)


class TestRanges:
    """Ranges that do not fit the values."""

    def test_too_many_clipped_values_fail(self) -> None:
        """A layer whose range is a mean over samples of one value each clips nearly all, and is named with advice."""
        model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        lowbit.convert_(model, "sbm8-hoffer", engine="reference")

        with pytest.raises(VerificationError, match=r"0: \d+ % of the values of input in output lie outside") as e:
            _prove(model, torch.linspace(-3, 3, 64)[:, None])

        assert "rules=[('0', None)]" in str(e.value)

    def test_what_the_method_clips_by_design_passes(self) -> None:
        """Means of extremes over samples of 64 normal values clip some, and no layer fails for it."""
        model = nn.Sequential(nn.Linear(64, 16))
        lowbit.convert_(model, "sbm8-hoffer", engine="reference")

        proof = _prove(model, torch.randn(64, 64))

        assert 0 < proof.rows[0].clipped < 0.05

    @pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (1e-8, True)])
    def test_gradients_under_the_floor_warn(self, scale: float, warned: bool) -> None:
        """Where the floor of the authors' scale decides, a note names operand and product and what to do."""
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        lowbit.convert_(model, "sbm8-cpt", engine="reference", rules=[(nn.Linear, "sbm8-cpt")])

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with lowbit.verify(model) as proof:
                (scale * model(torch.randn(5, 8)).square().sum()).backward()

        assert any("grad_output of grad_weight is so small in 2 layers" in note for note in proof.notes) == warned
        assert len(caught) == len(proof.notes)
        assert all(note in str(proof) and "Multiply the loss" in note for note in proof.notes)

    def test_recipes_without_a_floor_keep_small_gradients(self) -> None:
        """`sbm8` takes its scale from the range, however small, and gives no note."""
        model = _mlp()

        with lowbit.verify(model) as proof:
            (1e-12 * model(torch.randn(5, 6)).square().sum()).backward()

        assert proof.notes == []


def test_inference_mode_hides_no_product() -> None:
    """An operator that arrives whole in inference mode is counted by its parts, as without gradients."""
    model = _Two(nn.Identity(), lambda _, x: torch.einsum("bi,bj->ij", x, x) @ x.T)
    lowbit.convert_(model, "sbm8", engine="reference")
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with lowbit.verify(model) as proof, mode():
            model(torch.randn(5, 4))
        found.append(sum(row.macs or 0 for row in proof.outside))

    assert found == [5 * 4 * 4 + 4 * 4 * 5] * 2


class TestOutside:
    """Products that ran outside converted layers, with MACs counted by hand."""

    @staticmethod
    def _run(part: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Proof:
        model = _Two(part, call)
        lowbit.convert_(
            model, "sbm8", engine="reference", rules=[] if isinstance(part, nn.Identity) else [("part", None)]
        )
        return _prove(model, x)

    def test_a_skipped_linear_layer(self) -> None:
        """A layer that a rule leaves is listed with three times rows x inputs x outputs."""
        proof = self._run(nn.Linear(4, 7), torch.randn(5, 4))

        assert {module for _, module in _outside(proof)} == {"part"}
        assert sum(row.macs or 0 for row in proof.outside) == 3 * 5 * 4 * 7

    @pytest.mark.parametrize(
        ("part", "forward"),
        [
            (nn.Conv1d(4, 6, 3, groups=2), 2 * 6 * 6 * 2 * 3),
            (nn.Conv1d(4, 4, 3, groups=4, stride=2), 2 * 3 * 4 * 1 * 3),
            (nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), 2 * 8 * 4 * 3 * 3),
        ],
        ids=["groups", "depthwise", "transposed"],
    )
    def test_skipped_convolutions(self, part: nn.Module, forward: int) -> None:
        """Grouped, depthwise and transposed convolutions count one forward and two such backward products."""
        proof = self._run(part, torch.randn(2, 8, 4), lambda layer, x: layer(x.transpose(1, 2)))

        assert _outside(proof) == {
            ("aten.convolution", "part"): (1, forward),
            ("aten.convolution_backward", "part"): (1, 2 * forward),
        }

    @pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs the fused LSTM of oneDNN")
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_a_skipped_lstm(self, layers: int, bidirectional: bool) -> None:
        """A plain LSTM counts time x batch x gates x (inputs + hidden) for each layer and direction, backward twice."""
        part = nn.LSTM(4, 3, layers, bidirectional=bidirectional)
        weights = sum(p.numel() for n, p in part.named_parameters() if "weight" in n)

        proof = self._run(part, torch.randn(5, 2, 4))

        forward, backward = 5 * 2 * weights, 2 * 5 * 2 * weights
        assert {op: macs for (op, _), (_, macs) in _outside(proof).items()} == {
            "aten.mkldnn_rnn_layer": forward,
            "aten.mkldnn_rnn_layer_backward": backward,
        }

    def test_attention_forward_and_backward(self) -> None:
        """Fused attention counts heads x positions squared x width twice forward and five times backward."""

        def attend(_: nn.Module, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (2, 2)).transpose(1, 2)
            return F.scaled_dot_product_attention(heads, heads, heads)

        proof = self._run(nn.Identity(), torch.randn(3, 5, 4), attend)

        one = 3 * 2 * 5 * 5 * 2
        macs = {op: macs for (op, _), (_, macs) in _outside(proof).items()}
        assert macs == {
            "aten._scaled_dot_product_flash_attention_for_cpu": 2 * one,
            "aten._scaled_dot_product_flash_attention_for_cpu_backward": 5 * one,
        }

    @pytest.mark.parametrize("way", ["matmul", "einsum", "functional"])
    def test_functional_products(self, way: str) -> None:
        """Products without a module are listed under the module that calls them."""
        w = torch.randn(4, 7)

        def call(_: nn.Module, x: Tensor) -> Tensor:
            if way == "matmul":
                return x @ w
            return torch.einsum("bi,io->bo", x, w) if way == "einsum" else F.linear(x, w.t())

        proof = self._run(nn.Identity(), torch.randn(5, 4), call)

        assert sum(row.macs or 0 for row in proof.outside) == 2 * 5 * 4 * 7
        assert {row.module for row in proof.outside} == {""}

    def test_what_has_no_formula_is_listed_without_a_count(self) -> None:
        """The fused attention of torch in evaluation is listed and said not to be counted."""
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        lowbit.convert_(layer, "sbm8", engine="reference", rules=[(nn.MultiheadAttention, None)])
        layer.eval()

        with lowbit.verify(layer) as proof, torch.no_grad():
            layer(torch.randn(2, 5, 4))

        row = next(row for row in proof.outside if row.op == "aten._native_multi_head_attention")
        assert row.macs is None
        assert row.share is None
        assert "not counted" in str(proof)

    def test_shares_are_of_all_products(self) -> None:
        """Each share is the row's part of the MACs inside and outside together."""
        proof = self._run(nn.Linear(4, 7), torch.randn(5, 4))

        inside = sum(row.macs for row in proof.rows)
        assert inside == 2 * 5 * 4 * 4
        total = inside + 3 * 5 * 4 * 7
        assert sum(row.share or 0 for row in proof.outside) == pytest.approx(1 - inside / total)
        assert all(row.share == pytest.approx((row.macs or 0) / total) for row in proof.outside)

    def test_products_of_converted_layers_are_not_outside(self) -> None:
        """A fully converted network of convolutions, LSTM and linear layers has nothing outside."""
        model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 3))
        lowbit.convert_(model, "sbm8", engine="reference")

        assert _prove(model, torch.randn(5, 4, 8)).outside == []


class TestTripwire:
    """The error at the first operand that is not finite."""

    def test_it_names_layer_and_operand(self) -> None:
        """A nan in the input of a layer raises with the layer's name, operand and product."""
        model = _mlp()
        with torch.no_grad():
            model[0].bias[0] = math.nan

        with pytest.raises(RunError, match="2: input of output has a nan or inf"), lowbit.tripwire():
            model(torch.randn(5, 6))

    def test_it_sees_gradients(self) -> None:
        """An inf that arrives in backward raises there."""
        model = _mlp()
        y = model(torch.randn(5, 6))

        with pytest.raises(RunError, match="2: grad_output of grad_input has a nan or inf"), lowbit.tripwire():
            y.backward(torch.full_like(y, math.inf))

    def test_it_watches_one_model_where_one_is_given(self) -> None:
        """A nan in another model passes; in the given one it is named as in that model."""
        model, other = _mlp(), _mlp()
        for part in (model, other):
            with torch.no_grad():
                part[0].bias[0] = math.nan

        with lowbit.tripwire(model):
            other(torch.randn(5, 6))
        with pytest.raises(RunError, match="2: input of output has a nan or inf"), lowbit.tripwire(model):
            model(torch.randn(5, 6))

    def test_it_lets_finite_values_pass(self) -> None:
        """A step without nan or inf is left alone, and nothing watches afterwards."""
        model = _mlp()

        with lowbit.tripwire():
            model(torch.randn(5, 6)).sum().backward()

        assert not watch.observers


class TestQuantisersThatDoNothing:
    """A quantiser that returns what it got is caught, whatever it says of itself."""

    def test_values_that_a_transform_mixes_after_rounding_are_not_counted(self) -> None:
        """A Hadamard transform turns 3-bit codes back into many values, which are honest ones."""
        fmt = integer(bits=3, zero="symmetric", transform=Hadamard(size=4))
        model = nn.Sequential(nn.Linear(16, 8))
        lowbit.convert_(model, recipe_of(fmt), engine="reference")

        proof = _prove(model, torch.randn(64, 16))

        assert [row.bits for row in proof.rows] == ["3x3", "3x3"]
        assert all(0.5 < row.cosine < 1 for row in proof.rows)

    def test_values_off_the_grid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More distinct values under one scale than the bits can distinguish were not quantised."""
        model = nn.Sequential(nn.Linear(64, 32))
        lowbit.convert_(model, "sbm8", engine="reference")
        monkeypatch.setattr(Reference, "encode", lambda _, x, *__: Rounded(numbers=x, grid=None))

        with pytest.raises(VerificationError, match="distinct values under one scale, more than 8 bits"):
            _prove(model, torch.randn(64, 64))

    @pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
    def test_large_operands_are_sampled(self, monkeypatch: pytest.MonkeyPatch, dims: tuple[int, ...]) -> None:
        """A sample of a large operand tells values off the grid from codes, whichever axis shares a scale."""
        monkeypatch.setitem(distinct_values.__globals__, "_MOST_COUNTED", 2**10)
        x = torch.randn(2_000, 2_000, generator=torch.Generator().manual_seed(0))
        fmt = integer(bits=4, zero="symmetric")

        counts = [
            distinct_values(OperandRun(format=fmt, bits=4, exact=x, quantized=values, view=tuple(x.shape), dims=dims))
            for values in (x, (2 * x).round().clamp(-7, 7))
        ]

        assert counts[0] > 16
        assert 4 < counts[1] <= 15


def test_layers_of_parts_converted_apart_are_told_apart() -> None:
    """Two layers that were each converted as a model of their own have rows of their own, and one cannot hide."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lowbit.convert_(model[0], "sbm8", engine="reference", seed=0)
    lowbit.convert_(model[1], "sbm8", engine="reference", seed=1)

    proof = _prove(model, torch.randn(3, 4))
    assert {row.layer for row in proof.rows} == {"0", "1"}
    with pytest.raises(VerificationError, match="1: the quantisers of this converted Linear did not run"):
        _step_of_the_first_layer(model)


def _step_of_the_first_layer(model: nn.Sequential) -> None:
    """A proof of the whole model around a step of its first layer only."""
    with lowbit.verify(model):
        model[0](torch.randn(3, 4)).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_no_failure(reentrant: bool) -> None:
    """A layer that gradient checkpointing runs twice still has all its products."""
    model = _mlp()

    with lowbit.verify(model) as proof:
        x = torch.randn(5, 6, requires_grad=True)
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()

    assert {row.product for row in proof.rows if row.layer == "0"} == set(ALL)


def test_a_forward_without_gradients_beside_a_step_is_no_failure() -> None:
    """What runs under no_grad promises no backward."""
    model = _mlp()

    with lowbit.verify(model) as proof:
        with torch.no_grad():
            model(torch.randn(5, 6))
        model(torch.randn(5, 6)).sum().backward()

    assert [row.calls for row in proof.rows if row.layer == "2"] == [2, 1, 1]


def test_vector_and_bilinear_products_are_listed() -> None:
    """A matrix times a vector is counted, and a Bilinear layer is listed without a count."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.bilinear = nn.Bilinear(4, 4, 3)
            self.matrix = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return self.matrix @ self.bilinear(y, y).sum(0)

    model = Model()
    lowbit.convert_(model, "sbm8", engine="reference", rules=[("bilinear", None)], calls=False)

    outside = _outside(_prove(model, torch.randn(5, 6)))

    assert outside["aten.mv", ""][1] is not None
    assert any(op == "aten._trilinear" and macs is None for (op, _), (_, macs) in outside.items())
