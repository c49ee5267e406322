"""Conversion and restoration: what changes, what stays, what is refused, and lowbit's own state."""

import copy
import dataclasses
import io
import json
import re
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lowbit
from lowbit import Recipe, UsageError, functional
from lowbit.engines import int8
from lowbit.evidence.verify import VerificationError
from lowbit.nn import QuantLayer, QuantLinear
from lowbit.train.models import GPT, LSTM, MobileNetV2, ResNet

SBM8 = Recipe.from_name("sbm8")
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (lambda: ResNet(depths=(1, 1), width=4, classes=3), lambda: torch.randn(4, 3, 8, 8)),
    "mobilenetv2": (
        lambda: MobileNetV2(classes=3, strides=(1, 1, 2, 2, 2, 1, 1, 1)),
        lambda: torch.randn(2, 3, 16, 16),
    ),
    "gpt": (
        lambda: GPT(vocabulary=11, d=8, layers=2, heads=2, context=6),
        lambda: torch.randint(11, (2, 6)),
    ),
    "lstm": (lambda: LSTM(vocabulary=11, embedding=6, width=5, layers=2), lambda: torch.randint(11, (2, 6))),
}


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a conversion could leave behind: the type and the attributes of every module, hooks included."""
    return {
        name: (type(m), {k: copy.copy(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()})
        for name, m in model.named_modules()
    }


def _is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[n][0] is b[n][0]
        and a[n][1].keys() == b[n][1].keys()
        and all(v is w or v == w for v, w in zip(a[n][1].values(), b[n][1].values(), strict=True))
        for n in a
    )


class _Plain(nn.Linear):
    """A user's subclass of Linear."""


class TestModels:
    """The library's own networks, converted and back."""

    @pytest.fixture(params=list(MODELS))
    def pair(self, request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
        """A network and a batch for it."""
        make, batch = MODELS[request.param]
        return make(), batch()

    def test_state_dict_stays(self, pair: tuple[nn.Module, Tensor]) -> None:
        """Keys, order and values of state_dict, and the parameter objects, are those of the plain model."""
        model, _ = pair
        before = {k: v.clone() for k, v in model.state_dict().items()}
        parameters = dict(model.named_parameters())

        report = lowbit.convert_(model, "sbm8")

        assert any(row.converted for row in report.rows)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(type(v) is Tensor and torch.equal(v, before[k]) for k, v in after.items())
        assert all(p is parameters[k] for k, p in model.named_parameters())
        assert len(list(model.parameters())) == len(parameters)

    def test_restored_model_is_the_plain_one(self, pair: tuple[nn.Module, Tensor]) -> None:
        """restore_ undoes everything: types, attributes, hooks, and the output bit for bit."""
        model, x = pair
        model.eval()
        before, y = _snapshot(model), model(x)

        lowbit.convert_(model, "sbm8")
        quantized = model(x)
        lowbit.restore_(model)

        assert not torch.equal(quantized, y)
        assert torch.equal(model(x), y)
        assert _is_same(_snapshot(model), before)

    def test_every_product_layer_is_converted(self, pair: tuple[nn.Module, Tensor]) -> None:
        """No layer of a known type stays plain, and the report has a row for each."""
        model, _ = pair
        kinds = (nn.Linear, nn.Conv2d, nn.LSTM, nn.BatchNorm2d)
        names = [n for n, m in model.named_modules() if isinstance(m, kinds)]

        report = lowbit.convert_(model, "sbm8")

        assert [row.name for row in report.rows if row.converted] == names
        assert all(isinstance(m, QuantLayer) for m in model.modules() if isinstance(m, kinds))

    def test_a_training_step_runs_and_every_parameter_moves(self, pair: tuple[nn.Module, Tensor]) -> None:
        """An optimizer made before the conversion trains the converted model."""
        model, x = pair
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lowbit.convert_(model, "sbm8")
        before = {k: p.detach().clone() for k, p in model.named_parameters()}

        model(x).square().mean().backward()
        optimizer.step()

        touched = {k for k, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert len(touched) > len(before) / 2
        assert all(torch.equal(p, before[k]) != (k in touched) for k, p in model.named_parameters())


class TestCopies:
    """Copies, files, hooks and shared layers."""

    @staticmethod
    def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    @pytest.mark.parametrize("way", ["deepcopy", "file"])
    def test_a_copy_is_a_converted_model_of_its_own(self, way: str) -> None:
        """A deep copy and a loaded file repeat the original's steps bit for bit and do not advance it."""
        model, x = _mlp(), torch.randn(5, 6)
        lowbit.convert_(model, "sbm8")
        self._step(model, x)
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)

        copied = [self._step(twin, x) for _ in range(2)]
        original = [self._step(model, x) for _ in range(2)]

        assert all(torch.equal(a, b) for c, o in zip(copied, original, strict=True) for a, b in zip(c, o, strict=True))
        assert not torch.equal(copied[0][1], copied[1][1])
        assert lowbit.state_dict(model)["groups"][0]["step"] == 3

    def test_hooks_survive(self) -> None:
        """Forward, pre-forward and backward hooks of a layer run before, during and after the conversion."""
        model, called = _mlp(), []
        model[2].register_forward_hook(lambda *_: called.append("forward"))
        model[2].register_forward_pre_hook(lambda *_: called.append("pre"))
        model[2].register_full_backward_hook(lambda *_: called.append("backward"))
        runs = []

        for change in (lambda _: None, lambda m: lowbit.convert_(m, "sbm8"), lowbit.restore_):
            change(model)
            called.clear()
            model(torch.randn(5, 6)).sum().backward()
            runs.append(list(called))

        assert runs == [["pre", "forward", "backward"]] * 3

    def test_tied_weights_stay_tied(self) -> None:
        """An embedding and a head with one weight keep it, and the report says so."""
        model = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        model["head"].weight = model["tokens"].weight

        report = lowbit.convert_(model, "sbm8")

        assert model["head"].weight is model["tokens"].weight
        assert "shares a parameter with tokens" in str(report)

    def test_a_layer_under_two_names_is_converted_once(self) -> None:
        """A module that is registered twice has one row, one site and runs under both names."""
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.Tanh(), layer)

        report = lowbit.convert_(model, "sbm8")
        model(torch.randn(5, 6))

        assert [row.name for row in report.rows] == ["0"]
        assert layer.site.uses == 2
        lowbit.restore_(model)
        assert type(layer) is nn.Linear

    def test_a_bare_layer_is_a_model(self) -> None:
        """A single layer converts, counts its steps and restores."""
        layer, x = nn.Linear(6, 4), torch.randn(5, 6)
        plain = layer(x)

        report = lowbit.convert_(layer, "sbm8")
        quantized = layer(x)

        assert "(model)" in str(report)
        assert not torch.equal(quantized, plain)
        assert lowbit.state_dict(layer)["groups"][0]["step"] == 1
        lowbit.restore_(layer)
        assert torch.equal(layer(x), plain)

    def test_two_parts_can_be_converted_apart(self) -> None:
        """Two submodules with recipes of their own have two states, and restoring the whole restores both."""
        model = nn.Sequential(_mlp(), nn.Linear(4, 4))
        lowbit.convert_(model[0], "sbm8")
        lowbit.convert_(model[1], "w4a4g6", rules=[("", "w4a4g6")])

        groups = lowbit.state_dict(model)["groups"]
        lowbit.restore_(model)

        assert [len(group["sites"]) for group in groups] == [3, 1]
        assert not any(isinstance(m, QuantLayer) or m._forward_pre_hooks for m in model.modules())

    @pytest.mark.parametrize("training", [True, False])
    def test_mode_is_respected(self, training: bool) -> None:
        """A model in evaluation stays there, and its sites with it."""
        model = _mlp().train(training)

        lowbit.convert_(model, "sbm8")

        assert all(m.training is training for m in model.modules())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_change_of_dtype_leaves_bits_and_ranges(self, dtype: torch.dtype) -> None:
        """After .to(dtype) bits are int64 and ranges float32 of the same values, and the model runs in that dtype."""
        model = _mlp()
        lowbit.convert_(model, "sbm8")
        model(torch.randn(5, 6))
        before = lowbit.state_dict(model)

        y = model.eval().to(dtype)(torch.randn(5, 6).to(dtype))

        after = lowbit.state_dict(model)
        assert y.dtype == dtype
        for name, entry in after["groups"][0]["sites"].items():
            for key in ("bits", "running_range"):
                expected = before["groups"][0]["sites"][name][key]
                assert entry[key].dtype == expected.dtype
                assert torch.equal(entry[key], expected)

    def test_old_weight_normalisation_still_feeds_the_layer(self) -> None:
        """A layer whose hook computes its weight converts, and the hook's parameters get gradients."""
        with pytest.warns(FutureWarning):
            model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4)))
        lowbit.convert_(model, "sbm8")

        model(torch.randn(5, 6)).square().sum().backward()

        assert bool(model[0].weight_g.grad.any())


class TestRefused:
    """What is refused, by name, and without a trace in the model; some of it only without `calls`."""

    CASES = {  # noqa: RUF012 - never changed
        "subclass": (lambda: nn.Sequential(nn.Linear(3, 3), _Plain(3, 3)), r"1 \(_Plain\): a subclass of Linear"),
        "lazy": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), r"1 \(LazyLinear\).*one forward first"),
        "parametrised": (
            lambda: nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3))),
            r"1 \(ParametrizedLinear\): a subclass of Linear",
        ),
        "attention": (
            lambda: nn.ModuleDict({"a": nn.Linear(4, 4), "b": type("Mine", (nn.MultiheadAttention,), {})(4, 2)}),
            r"b \(Mine\): a subclass of MultiheadAttention",
        ),
        "rnn": (lambda: nn.Sequential(nn.Linear(3, 3), nn.RNN(3, 3)), r"1 \(RNN\): only LSTM and GRU"),
        "rnn cell": (lambda: nn.Sequential(nn.Linear(3, 3), nn.RNNCell(3, 3)), r"1 \(RNNCell\)"),
        "bilinear": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 3)), r"1 \(Bilinear\)"),
        "synchronised norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3)), r"1 \(SyncBatchNorm\)"),
        "lazy norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()), r"1 \(LazyBatchNorm1d\)"),
        "complex": (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64)),
            r"1 \(Linear\): weight is torch\.complex64",
        ),
    }

    @pytest.mark.parametrize("case", list(CASES))
    def test_strict_refuses_by_name_and_changes_nothing(self, case: str) -> None:
        """A layer that cannot be converted is a UsageError with its name and type; the model stays as it was."""
        make, message = self.CASES[case]
        model = make()
        before = _snapshot(model)

        with pytest.raises(UsageError, match=message):
            lowbit.convert_(model, "sbm8", calls=False)

        assert _is_same(_snapshot(model), before)

    @pytest.mark.filterwarnings("ignore:convert_")  # most of these models is left
    @pytest.mark.parametrize("case", list(CASES))
    def test_otherwise_it_is_left_with_a_reason(self, case: str) -> None:
        """With strict=False the rest is converted, and the report gives the reason that strict would have."""
        make, message = self.CASES[case]
        model = make()
        name = message.split(" ")[0]

        report = lowbit.convert_(model, "sbm8", strict=False, calls=False)

        left = [row for row in report.rows if not row.converted and row.name == name]
        assert len(left) == 1
        assert len(left[0].reason) > 10
        assert any(row.converted for row in report.rows)

    @pytest.mark.parametrize(("names", "pattern"), [(["0"], "'0'"), (["0", "2"], "re.compile(r'0|2')")])
    def test_two_conversions_are_refused(self, names: list[str], pattern: str) -> None:
        """A model with a converted layer is refused with the ways out, and nothing of it changes."""
        model = _mlp()
        for name in names:
            lowbit.convert_(model.get_submodule(name), "sbm8")

        with pytest.raises(
            UsageError, match=r"converted already: 0.*lowbit\.restore_ first.*rules=.*strict=False"
        ) as error:
            lowbit.convert_(model, "int8")

        assert f"rules=[({pattern}, None)]" in str(error.value)
        assert (type(model[2]) is nn.Linear) == ("2" not in names)

    @pytest.mark.parametrize("way", ["function", "method", "inner method"])
    def test_compiled_models_are_refused(self, way: str) -> None:
        """torch.compile(model), model.compile() and a compiled layer inside are refused: convert first."""
        model: nn.Module = _mlp()
        if way == "function":
            model = torch.compile(model, backend="eager")
        elif way == "method":
            model.compile(backend="eager")
        else:
            model.get_submodule("2").compile(backend="eager")

        with pytest.raises(UsageError, match="is compiled: convert the plain model first"):
            lowbit.convert_(model, "sbm8")

    def test_script_modules_are_refused(self) -> None:
        """A TorchScript module anywhere in the model is refused by name."""
        with warnings.catch_warnings(action="ignore"):  # torch deprecates it, in other words in each version
            scripted = torch.jit.script(nn.Linear(3, 3))
        model = nn.Sequential(nn.Linear(3, 3), scripted)

        with pytest.raises(UsageError, match="'1' is a TorchScript module"):
            lowbit.convert_(model, "sbm8")

    def test_what_is_no_module_is_refused(self) -> None:
        """A function in place of a model is a UsageError that names its type."""
        with pytest.raises(UsageError, match=r"model=a function: give a torch\.nn\.Module"):
            lowbit.convert_(lambda x: x, "sbm8")

    @pytest.mark.parametrize(("argument", "value"), [("recipe", "sbm9"), ("engine", "int9")])
    def test_unknown_names_are_refused(self, argument: str, value: str) -> None:
        """An unknown recipe or engine is a UsageError, and the model stays plain."""
        model = _mlp()

        with pytest.raises(UsageError, match=f"unknown {argument} '{value}'"):
            lowbit.convert_(model, **{"recipe": "sbm8", argument: value})

        assert type(model[0]) is nn.Linear

    def test_restoring_a_plain_model_is_refused(self) -> None:
        """restore_ of a model without converted layers is a UsageError."""
        with pytest.raises(UsageError, match="nothing in this model is converted"):
            lowbit.restore_(_mlp())


class TestRules:
    """Which layers a rule decides, and rules that decide none."""

    @staticmethod
    def _recipes(model: nn.Module, *rules: Any, recipe: Any = "sbm8") -> list[str | None]:
        return [row.recipe for row in lowbit.convert_(model, recipe, rules=rules).rows]

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            (("2", None), ["sbm8", None, "sbm8"]),
            (("2", "w4a4g6"), ["sbm8", "w4a4g6", "sbm8"]),
            ((re.compile("[02]"), "bf16"), ["bf16", "bf16", "sbm8"]),
            ((re.compile(".*"), SBM8.replace(name="mine")), ["mine", "mine", "mine"]),
            ((nn.Linear, None), [None, None, None]),
        ],
    )
    def test_names_expressions_and_types(self, rule: Any, expected: list[str | None]) -> None:
        """A rule goes by exact name, whole match of an expression, or exact type, with a recipe, its name or None."""
        assert self._recipes(_mlp(), rule) == expected

    def test_an_expression_matches_whole_names(self) -> None:
        """An expression that matches only the beginning of a name decides nothing."""
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))

        assert self._recipes(model, (re.compile("1"), None)) == ["sbm8", None]
        lowbit.restore_(model)
        with pytest.raises(UsageError, match="decided nothing"):
            lowbit.convert_(model, "sbm8", rules=[(re.compile("0"), None)])

    def test_a_type_matches_exactly(self) -> None:
        """A rule for Linear leaves a subclass undecided; a rule for the subclass decides it."""
        model = nn.Sequential(nn.Linear(3, 3), _Plain(3, 3))

        with pytest.raises(UsageError, match=r"1 \(_Plain\)"):
            lowbit.convert_(model, "sbm8", rules=[(nn.Linear, None)], calls=False)
        assert self._recipes(model, (_Plain, None)) == ["sbm8", None]

    def test_the_first_match_wins(self) -> None:
        """Of two rules for a layer the earlier one decides."""
        assert self._recipes(_mlp(), ("2", "bf16"), (nn.Linear, "w4a4g6")) == ["w4a4g6", "bf16", "w4a4g6"]

    def test_first_and_last_policies(self) -> None:
        """A recipe that leaves first and last layers leaves exactly these, in registration order."""
        ends = SBM8.replace(name="ends", first="leave", last="leave")

        report = lowbit.convert_(_mlp(), ends)

        assert [row.recipe for row in report.rows] == [None, "ends", None]
        assert [row.reason for row in report.rows] == ["ends leaves the first layer", "", "ends leaves the last layer"]

    def test_a_rule_beats_the_policies(self) -> None:
        """A rule converts a first layer that the recipe would leave."""
        ends = SBM8.replace(name="ends", first="leave", last="leave")

        assert self._recipes(_mlp(), ("0", "bf16"), recipe=ends) == ["bf16", "ends", None]

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ([("nothing", None)], r"rule 1, 'nothing', decided nothing"),
            ([(nn.Linear, "bf16"), (re.compile("2"), None)], r"rule 2, '2', decided nothing.*earlier rule"),
            ([(nn.Conv2d, None)], r"rule 1, 'Conv2d'"),
            ([(3, None)], r"rule for 3: give a name"),
        ],
    )
    def test_a_rule_that_decides_nothing_is_refused(self, rules: list[Any], message: str) -> None:
        """A rule without a layer, or behind one that took all its layers, is a UsageError; nothing changes."""
        model = _mlp()
        before = _snapshot(model)

        with pytest.raises(UsageError, match=message):
            lowbit.convert_(model, "sbm8", rules=rules)

        assert _is_same(_snapshot(model), before)

    def test_a_containers_name_gets_a_hint(self) -> None:
        """A rule for a container is refused with the expression that means its layers."""
        model = nn.ModuleDict({"body": _mlp()})

        with pytest.raises(UsageError, match=re.escape(r"use re.compile(r'body\..*')")):
            lowbit.convert_(model, "sbm8", rules=[("body", None)])
        assert self._recipes(model, (re.compile(r"body\..*"), None)) == [None] * 3

    def test_batch_norm_stays_plain_where_its_rule_has_no_range_norm(self) -> None:
        """A rule that gives batch normalisation a recipe without Range BN leaves it and says why."""
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

        report = lowbit.convert_(model, "sbm8", rules=[(nn.BatchNorm1d, "bf16")])

        assert type(model[1]) is nn.BatchNorm1d
        assert report.rows[1].reason == "has no product"


class TestTransformer:
    """torch's own encoder, whose evaluation would go around its linear layers."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the linear layers that ran, in order."""
        names: list[str] = []
        linear = functional.linear

        def spy(*args: Any, **kwargs: Any) -> Tensor:
            names.append(kwargs["setting"].layer)
            return linear(*args, **kwargs)

        monkeypatch.setattr(functional, "linear", spy)
        return names

    @pytest.mark.parametrize("kind", ["layer", "encoder"])
    @pytest.mark.parametrize("padded", [True, False])
    @pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("training", [True, False])
    def test_converted_linears_are_called(
        self, calls: list[str], kind: str, padded: bool, context: Any, training: bool
    ) -> None:
        """In training and evaluation, with and without gradients and padding, each linear layer runs once a block."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model: nn.Module = nn.TransformerEncoder(layer, 2) if kind == "encoder" else layer
        lowbit.convert_(model, "sbm8", rules=[(nn.MultiheadAttention, None)])
        model.train(training)
        mask = torch.tensor([[False] * 5, [False] * 4 + [True]]) if padded else None

        with context():
            y = model(torch.randn(2, 5, 8), src_key_padding_mask=mask)

        blocks = ["layers.0.", "layers.1."] if kind == "encoder" else [""]
        assert calls == [block + name for block in blocks for name in ("linear1", "linear2")]
        assert y.shape == (2, 5, 8)

    def test_restored_encoder_has_its_fast_path_again(self, calls: list[str]) -> None:
        """restore_ gives back nested tensors and removes every hook."""
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        before = _snapshot(model)

        lowbit.convert_(model, "sbm8", rules=[(nn.MultiheadAttention, None)])
        assert not model.use_nested_tensor
        lowbit.restore_(model)

        assert model.use_nested_tensor
        assert _is_same(_snapshot(model), before)
        assert calls == []


class TestState:
    """lowbit.state_dict and lowbit.load_state_dict."""

    def test_it_loads_without_pickled_code(self) -> None:
        """The state survives torch.save and torch.load(weights_only=True), and continues the run bit for bit."""
        model, x = _mlp(), torch.randn(5, 6)
        lowbit.convert_(model, "sbm8", seed=3)
        twin = copy.deepcopy(model)
        model(x)
        file = io.BytesIO()
        torch.save(lowbit.state_dict(model), file)
        file.seek(0)

        lowbit.load_state_dict(twin, torch.load(file, weights_only=True))
        losses = [m(x).square().sum() for m in (model, twin)]
        grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, twin), strict=True)]

        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert lowbit.state_dict(twin)["groups"][0]["step"] == 2
        assert lowbit.state_dict(twin)["groups"][0]["seed"] == 3

    def test_it_is_a_copy(self) -> None:
        """A later training step changes no tensor of a saved state."""
        model = _mlp()
        lowbit.convert_(model, "sbm8")
        model(torch.randn(5, 6))
        state = lowbit.state_dict(model)
        kept = copy.deepcopy(state)

        model(10 * torch.randn(5, 6))

        ranges = [s["groups"][0]["sites"]["0"]["running_range"] for s in (state, kept, lowbit.state_dict(model))]
        assert torch.equal(ranges[0], ranges[1])
        assert not torch.equal(ranges[0], ranges[2])

    @pytest.mark.parametrize(
        ("recipe", "rules", "message"),
        [
            ("w4a4g6", [], "3 layers differ, first '0'"),
            ("sbm8", [("2", None)], "1 layers differ, first '2'.*here none"),
            ("sbm8", [("2", "bf16")], "1 layers differ, first '2': saved recipe sbm8 .* here recipe bf16"),
        ],
    )
    def test_another_conversion_is_refused_and_changes_nothing(
        self, recipe: str, rules: list[Any], message: str
    ) -> None:
        """The state of other recipes or layers is a UsageError that names the first difference."""
        model, other = _mlp(), _mlp()
        lowbit.convert_(model, "sbm8", seed=5)
        lowbit.convert_(other, recipe, rules=rules)
        if recipe == "w4a4g6":
            lowbit.restore_(other)
            lowbit.convert_(other, recipe, rules=[("4", "w4a4g6")])

        with pytest.raises(UsageError, match=message):
            lowbit.load_state_dict(other, lowbit.state_dict(model))

        assert lowbit.state_dict(other)["groups"][0]["seed"] == 0

    @pytest.mark.parametrize("state", [{}, {"version": 2, "groups": []}, {"version": 1}, []])
    def test_what_is_no_state_is_refused(self, state: Any) -> None:
        """Something else, or a later version, is a UsageError."""
        model = _mlp()
        lowbit.convert_(model, "sbm8")

        with pytest.raises(UsageError, match=r"not a lowbit\.state_dict|state=|lacks groups"):
            lowbit.load_state_dict(model, state)

    def test_a_plain_model_has_no_state(self) -> None:
        """state_dict of a model without converted layers is a UsageError."""
        with pytest.raises(UsageError, match="nothing in this model is converted"):
            lowbit.state_dict(_mlp())


def test_the_report_shows_bits_and_engine_of_each_product() -> None:
    """A printed report has a line per layer with the bits of its three products and its engine."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))

    lines = str(lowbit.convert_(model, "sbm8", engine="reference")).splitlines()

    assert lines[0].startswith("sbm8: 1 of 2 layers converted")
    linear = next(line for line in lines if "Linear" in line)
    assert linear.split() == ["0", "Linear", "sbm8", "8x8", "8x8", "16x8", "reference"]
    assert "has no product" in str(lines)


def test_the_report_as_json_has_what_its_text_has() -> None:
    """Recipe, counts, share, the largest layers that are left, every field of every row, and the notes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 12))
    report = lowbit.convert_(model, "cpt", engine="reference")

    data = json.loads(report.to_json(), parse_constant=pytest.fail)

    assert str(report).startswith(
        f"{data['recipe']}: {data['converted']} of {data['layers']} layers converted with {100 * data['share']:g} %"
    )
    assert (data["version"], data["largest_left"], data["without_gain"]) == (1, ["2"], [])
    assert [row["name"] for row in data["rows"]] == ["0", "1", "2"]
    assert all(row == dataclasses.asdict(own) for row, own in zip(data["rows"], report.rows, strict=True))
    assert data["notes"] == list(report.notes) != []


class Conv1D(nn.Module):
    """A matrix product of a user's own, as GPT-2 has it: the weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``x w + b``."""
        return torch.addmm(self.bias, x, self.weight)


def _foreign(*, tied: bool = False) -> nn.ModuleDict:
    """A language model whose blocks lowbit does not know: 96 of its 656 weights are of its head."""
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(12, 8),
            "norm": nn.LayerNorm((2, 8)),
            "up": Conv1D(8, 32),
            "down": Conv1D(32, 8),
            "mix": Conv1D(8, 4),
            "gain": Conv1D(8, 2),
            "head": nn.Linear(8, 12, bias=False),
        }
    )
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 8)))
    if tied:
        model["head"].weight = model["tokens"].weight
    return model


def _with_norm() -> nn.ModuleDict:
    """Layers of several kinds that are called in order."""
    return nn.ModuleDict(
        {"body": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6), "rnn": nn.LSTM(6, 6), "head": nn.Linear(6, 4)}
    )


class Called(nn.Module):
    """Calls the parts of a dict one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = _with_norm()

    def forward(self, x: Tensor) -> Tensor:
        """All of them."""
        parts = self.parts
        y: Tensor = parts["head"](parts["rnn"](parts["norm"](parts["body"](x)))[0])
        return y


def _synchronise(model: Called) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _resize(model: Called) -> None:
    model.parts["head"] = nn.Linear(6, 9)


def _other_rnn(model: Called) -> None:
    model.parts["rnn"] = nn.LSTM(6, 6)


class Passing(nn.Module):
    """A layer with the interface of an LSTM that does nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The input, and no state."""
        return x, None


def _no_rnn(model: Called) -> None:
    model.parts["rnn"] = Passing()


class TestReplaced:
    """Layers that somebody replaces after the conversion."""

    WAYS: ClassVar = {
        "synchronised norm": (_synchronise, {"parts.norm": "SyncBatchNorm"}),
        "resized head": (_resize, {"parts.head": "Linear"}),
        "other LSTM": (_other_rnn, dict.fromkeys(("parts.rnn.weight_ih_l0", "parts.rnn.weight_hh_l0"), "LSTM")),
        "no LSTM": (_no_rnn, dict.fromkeys(("parts.rnn.weight_ih_l0", "parts.rnn.weight_hh_l0"), "Passing")),
    }

    @staticmethod
    def _changed(way: str) -> Called:
        model = Called()
        lowbit.convert_(model, "sbm8")
        TestReplaced.WAYS[way][0](model)
        return model

    @staticmethod
    def _verify(model: Called) -> lowbit.Proof:
        with lowbit.verify(model) as proof:
            model(torch.randn(5, 6)).sum().backward()
        return proof

    @pytest.mark.parametrize("way", WAYS)
    def test_verify_fails_and_the_next_state_forgets(self, way: str) -> None:
        """`verify` and the next state name each layer that is gone, and after that nobody speaks of it."""
        model, gone = self._changed(way), self.WAYS[way][1]

        for name, kind in gone.items():
            with pytest.raises(VerificationError, match=rf"{re.escape(name)}: .*{kind} stands in its place"):
                self._verify(model)
        text = ", ".join(f"{name} (now {kind})" for name, kind in gone.items())
        with pytest.warns(UserWarning, match=re.escape(f"state_dict: {text}: converted layers that are no longer")):
            first = lowbit.state_dict(model)
        assert not first["groups"][0]["sites"].keys() & gone.keys()
        assert len(first["groups"][0]["sites"]) == 5 - len(gone)
        assert first["groups"][0]["sites"].keys() == lowbit.state_dict(model)["groups"][0]["sites"].keys()
        outside = {row.module for row in self._verify(model).outside}
        assert way != "resized head" or any("head" in module for module in outside)

    @pytest.mark.parametrize("way", WAYS)
    def test_a_copy_knows_too(self, way: str) -> None:
        """A deep copy misses what its original misses; a copy of a part misses nothing."""
        model = self._changed(way)

        with pytest.raises(VerificationError, match="in its place"):
            self._verify(copy.deepcopy(model))
        assert lowbit.state_dict(copy.deepcopy(model.parts["body"]))["groups"][0]["sites"].keys() == {"parts.body"}

    @pytest.mark.parametrize("way", ["resized head", "other LSTM"])
    def test_what_replaced_it_can_be_converted(self, way: str) -> None:
        """With the new layer converted the model is whole again."""
        model = self._changed(way)
        lowbit.convert_(model.parts["head" if way == "resized head" else "rnn"], "sbm8", seed=1)

        rows = self._verify(model).rows

        assert {row.layer.split(".")[1] for row in rows} == {"body", "norm", "rnn", "head"}
        assert [len(group["sites"]) for group in lowbit.state_dict(model)["groups"]] in ([4, 1], [3, 2])

    def test_restored_first_it_is_missed_by_nobody(self) -> None:
        """A layer that was restored before it is replaced is not reported."""
        model = Called()
        lowbit.convert_(model, "sbm8")
        lowbit.restore_(model.parts["head"])
        _resize(model)

        self._verify(model)
        assert len(lowbit.state_dict(model)["groups"][0]["sites"]) == 4

    def test_parametrised_and_pruned_layers_are_still_there(self) -> None:
        """What wraps the weight of a converted layer does not replace the layer."""
        model = Called()
        lowbit.convert_(model, "sbm8")
        parametrizations.orthogonal(model.parts["body"])
        prune.l1_unstructured(model.parts["head"], "weight", amount=0.3)

        assert {row.layer.split(".")[1] for row in self._verify(model).rows} == {"body", "norm", "rnn", "head"}
        assert len(lowbit.state_dict(model)["groups"][0]["sites"]) == 5

    def test_states_of_changed_models_load_into_such(self) -> None:
        """A state with the layer does not fit a model without it; one that was saved without it does."""
        whole = Called()
        lowbit.convert_(whole, "sbm8")
        model = self._changed("resized head")

        with pytest.raises(UsageError, match=r"first 'parts\.head'"):
            lowbit.load_state_dict(model, lowbit.state_dict(whole))
        with pytest.warns(UserWarning, match="now Linear"):
            state = lowbit.state_dict(self._changed("resized head"))
        state["groups"][0]["step"] = 7
        lowbit.load_state_dict(model, state)

        assert int(model.parts["body"].site.clock.step) == 7

    def test_a_part_has_a_state_of_its_own(self) -> None:
        """The state of a part of a converted model holds its layers, warns of no other, and loads into the part."""
        model = Called()
        lowbit.convert_(model, "sbm8")
        model(torch.randn(5, 6))
        state = lowbit.state_dict(model.parts["rnn"])
        other = Called()
        lowbit.convert_(other, "sbm8")
        lowbit.load_state_dict(other.parts["rnn"], state)

        ranges = [m.parts["rnn"].sites()[0].running_range for m in (model, other)]
        assert state["groups"][0]["sites"].keys() == {"parts.rnn.weight_ih_l0", "parts.rnn.weight_hh_l0"}
        assert torch.equal(*ranges)
        assert ranges[0][2] == 1
        assert other.parts["body"].site.running_range[2] == 0


class TestShare:
    """How much of the weights of matrix products and convolutions is converted."""

    @pytest.mark.parametrize("tied", [False, True])
    def test_it_counts_weights_of_products(self, tied: bool) -> None:
        """Unknown layers count, an embedding only where it is the head too, and norms, biases and single rows never."""
        model = _foreign(tied=tied)

        with pytest.warns(UserWarning, match="1 of 8 layers"):
            report = lowbit.convert_(model, "sbm8", calls=False)

        assert {row.name: row.weights for row in report.rows} == {
            "": 0,
            "tokens": 0,
            "norm": 0,
            "up": 256,
            "down": 256,
            "mix": 32,
            "gain": 16,
            "head": 96,
        }
        assert report.share == 96 / 656

    def test_the_first_line_names_the_largest_that_are_not(self) -> None:
        """Share, then up to three layers with type and size, the largest first; a warning says the same."""
        said = (
            "1 of 8 layers converted with 14.6 % of the weights of matrix products and convolutions, largest not "
            "converted: up (Conv1D, 256), down (Conv1D, 256), mix (Conv1D, 32)"
        )
        with pytest.warns(UserWarning, match=re.escape(f"convert_(ModuleDict, 'sbm8'): {said}. What")):
            report = lowbit.convert_(_foreign(), "sbm8", calls=False)

        assert str(report).splitlines()[0] == f"sbm8: {said}; bits as first operand x second"

    def test_what_a_rule_leaves_is_not_asked_for(self) -> None:
        """With rules for the unknown layers everything else is converted, and nobody warns."""
        report = lowbit.convert_(_foreign(), "sbm8", rules=[(Conv1D, None)])

        assert report.share == 1
        assert "with 100 % of the weights" in str(report)
        assert "largest" not in str(report)

    def test_what_the_recipe_leaves_counts_and_does_not_warn(self) -> None:
        """A last layer that cpt leaves lowers the share; it was not asked for, so nobody warns."""
        report = lowbit.convert_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 12)), "cpt")

        assert report.share == 16 / 64
        assert "largest not converted: 1 (Linear, 48)" in str(report)

    def test_almost_all_is_not_all(self) -> None:
        """One unconverted weight in a thousand and more does not round to 100 %, and half of them is enough."""
        large = nn.Sequential(nn.Linear(100, 100), Conv1D(2, 2))

        assert "with 99.9 % of" in str(lowbit.convert_(large, "sbm8", calls=False))
        assert lowbit.convert_(nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4)), "sbm8", calls=False).share == 0.5

    def test_all_weights_of_a_layer_with_several_count(self) -> None:
        """Those of attention, its output projection included, and of an LSTM."""
        model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.LSTM(4, 3), "c": nn.Conv2d(2, 3, 5)})

        report = lowbit.convert_(model, "sbm8", rules=[("b", None)])

        assert [row.weights for row in report.rows] == [64, 12 * 7, 150]
        assert report.share == 1

    def test_a_model_without_such_weights_has_no_share(self) -> None:
        """Range BN alone multiplies by no matrix."""
        report = lowbit.convert_(nn.Sequential(nn.BatchNorm1d(4)), "sbm8")

        assert report.share is None
        assert str(report).startswith("sbm8: 1 of 1 layers converted; bits")


def test_converted_layers_are_still_instances_of_their_plain_type() -> None:
    """Code that asks for nn.Linear finds the converted layer."""
    layer = nn.Linear(3, 3)
    lowbit.convert_(layer, "sbm8")

    assert isinstance(layer, nn.Linear)
    assert type(layer) is QuantLinear


class TestAwkward:
    """Places where a conversion could go wrong silently."""

    def test_nothing_to_convert_is_an_error(self) -> None:
        """A model without layers with products is refused, since somebody asked for low precision."""
        with pytest.raises(UsageError, match="nothing in this model would be converted"):
            lowbit.convert_(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), "sbm8")

    def test_no_recipe_is_an_error(self) -> None:
        """None is no recipe, and the message lists those there are."""
        with pytest.raises(UsageError, match="sbm8-hoffer"):
            lowbit.convert_(_mlp(), None)

    def test_a_rule_that_is_no_pair_is_an_error(self) -> None:
        """A pair in place of a list of pairs is refused in words."""
        with pytest.raises(UsageError, match="pairs"):
            lowbit.convert_(_mlp(), "sbm8", rules=("0", None))

    def test_a_replaced_forward_is_refused(self) -> None:
        """An object whose forward was replaced would bypass its new class."""
        model = _mlp()
        model[0].forward = lambda x: x

        with pytest.raises(UsageError, match="replaced"):
            lowbit.convert_(model, "sbm8")

    def test_the_hint_for_a_bare_layer_is_its_name(self) -> None:
        """The rule that the message offers for a model that is the layer itself works."""
        layer = nn.Bilinear(2, 2, 2)

        with pytest.raises(UsageError, match=re.escape("rules=[('', None)]")):
            lowbit.convert_(layer, "sbm8", calls=False)
        report = lowbit.convert_(layer, "sbm8", rules=[("", None)])

        assert not report.rows[0].converted

    def test_a_class_that_changed_since_is_not_half_restored(self) -> None:
        """Restoring fails before it touches anything where a layer's class is no longer the converted one."""
        model = _mlp()
        lowbit.convert_(model, "sbm8")
        parametrizations.weight_norm(model[2])

        with pytest.raises(UsageError, match="Parametrized"):
            lowbit.restore_(model)

        assert isinstance(model[0], QuantLinear)
        assert model[0].site.name == "0"

    def test_layers_restored_one_by_one_leave_no_hook(self) -> None:
        """The model's hook removes itself once no layer needs it."""
        model = _mlp()
        lowbit.convert_(model, "sbm8")
        for i in (0, 2, 4):
            lowbit.restore_(model[i])

        model(torch.randn(2, 6))

        assert not model._forward_pre_hooks

    def test_conversion_on_the_meta_device(self) -> None:
        """Bits and ranges are values on a model without storage too, and follow it to a real device."""
        with torch.device("meta"):
            model = _mlp()
            lowbit.convert_(model, "sbm8")
        model.to_empty(device="cpu")

        assert model[0].site.bits.tolist() == [8, 8, 8, 8, 16, 8]
        assert model[0].site.running_range.tolist() == [0, 0, 0]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda s: s["groups"][0].pop("seed"),
            lambda s: s["groups"][0]["sites"]["0"].pop("bits"),
            lambda s: s["groups"][0]["sites"]["0"].update(bits=torch.tensor([8])),
            lambda s: s["groups"][0]["sites"]["0"].update(formats=0),
            lambda s: s["groups"][0].update(step="many"),
        ],
    )
    def test_a_damaged_state_changes_nothing(self, damage: Callable[[Any], None]) -> None:
        """A state that lacks or bends something is a UsageError, and the model's own state stays."""
        model = _mlp()
        lowbit.convert_(model, "sbm8", seed=3)
        state = lowbit.state_dict(model)
        damage(state)
        state["groups"][0]["seed"] = state["groups"][0].get("seed") and 99

        with pytest.raises(UsageError, match="load_state_dict"):
            lowbit.load_state_dict(model, state)

        assert lowbit.state_dict(model)["groups"][0]["seed"] == 3

    def test_a_layer_that_is_called_alone_resumes_its_noise(self) -> None:
        """Where the model's own forward is not what is called, use numbers are part of the state."""
        model = _mlp()
        lowbit.convert_(model, "sbm8")
        x = torch.randn(3, 6)

        def gradient() -> Tensor:
            y = model[0](x.requires_grad_())
            return torch.autograd.grad(y.square().sum(), x)[0]

        gradient()
        state = copy.deepcopy(lowbit.state_dict(model))
        second, third = gradient(), gradient()
        lowbit.load_state_dict(model, state)

        assert torch.equal(gradient(), second)
        assert not torch.equal(second, third)


@pytest.mark.parametrize(
    "seed", [True, 1.5, "1", None, -1, 2**64, 10**5000, torch.tensor(1)], ids=lambda s: type(s).__name__
)
def test_a_seed_is_a_whole_number_of_64_bits(seed: Any) -> None:
    """Any other seed would share its noise with one of these, or fail in a step: the model stays plain."""
    model = _mlp()

    with pytest.raises(UsageError, match=r"seed=.*from 0 to 18446744073709551615"):
        lowbit.convert_(model, "sbm8", seed=seed)

    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_smallest_and_the_largest_seed_train(seed: int) -> None:
    """Both ends of the range convert, step and round trip."""
    model = _mlp()
    lowbit.convert_(model, "sbm8", seed=seed)
    model(torch.randn(5, 6)).sum().backward()

    lowbit.load_state_dict(model, lowbit.state_dict(model))

    assert lowbit.state_dict(model)["groups"][0]["seed"] == seed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rules": 3}, "rules=3"),
        ({"rules": "0"}, "rules='0'"),
        ({"rules": {"0": None}}, "rules="),
        ({"rules": [("0",)]}, "rule .*pairs"),
        ({"rules": [(3, None)]}, "rule for 3: give a name"),
        ({"rules": [("0", 3)]}, "recipe 3: give a lowbit.Recipe"),
        ({"engine": 3}, "engine 3"),
        ({"engine": None}, "engine None"),
        ({"engine": ["int8"]}, "engine \\['int8'\\]"),
        ({"strict": "no"}, "strict='no': give True or False"),
        ({"strict": 0}, "strict=0: give True or False"),
    ],
)
def test_an_argument_of_another_type_is_refused(arguments: dict[str, Any], said: str) -> None:
    """What was given is named with what is allowed, and the model stays plain."""
    model = _mlp()

    with pytest.raises(UsageError, match=said):
        lowbit.convert_(model, "sbm8", **arguments)

    assert type(model[0]) is nn.Linear


class TestSharedEncoder:
    """A second root that holds a part that is converted."""

    WAYS: ClassVar[dict[str, dict[str, Any]]] = {
        "a rule": {"rules": [(re.compile(r"0\..*"), None)]},
        "not strict": {"strict": False},
    }

    @staticmethod
    def _roots() -> tuple[nn.Sequential, nn.Sequential]:
        """Two models with one encoder, the first of them converted."""
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        first, second = (nn.Sequential(encoder, nn.ReLU(), nn.Linear(8, classes)) for classes in (3, 5))
        lowbit.convert_(first, "sbm8", seed=1)
        return first, second

    @pytest.mark.parametrize("way", WAYS)
    def test_the_rest_is_converted(self, way: str) -> None:
        """What is converted already stays as it is, with a line in the report for each layer; the head is converted."""
        first, second = self._roots()
        site = first.get_submodule("0.0").site

        report = lowbit.convert_(second, "int8", **self.WAYS[way])

        left, converted = report.rows[:2], report.rows[2:]
        assert [row.name for row in left] == ["0.0", "0.2"]
        assert all(row.reason == "converted already, to sbm8" and not row.converted for row in left)
        assert [(row.name, row.recipe) for row in converted] == [("2", "int8")]
        assert first.get_submodule("0.0").site is site
        assert report.share == 1

    def test_the_error_names_a_rule_that_works(self) -> None:
        """The rule in the message, copied, converts the rest."""
        _, second = self._roots()
        with pytest.raises(UsageError) as error:
            lowbit.convert_(second, "int8")
        found = re.search(r"rules=(\[.*\]) or", str(error.value))
        assert found is not None

        report = lowbit.convert_(second, "int8", rules=eval(found[1]))

        assert [row.converted for row in report.rows] == [False, False, True]

    @pytest.mark.parametrize("way", WAYS)
    def test_both_train_and_resume(self, way: str) -> None:
        """Steps of both roots in turn equal those after saving and loading the state of both halfway, bit for bit."""
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

        def steps(roots: tuple[nn.Module, nn.Module], count: int) -> list[Tensor]:
            losses = []
            for _ in range(count):
                for root in roots:
                    loss = root(x).square().sum()
                    root.zero_grad()
                    loss.backward()
                    losses.append(loss.detach())
                    with torch.no_grad():
                        for p in root.parameters():
                            p.sub_(p.grad, alpha=0.01)
            return losses

        def make() -> tuple[nn.Module, nn.Module]:
            first, second = self._roots()
            lowbit.convert_(second, "sbm8", seed=2, **self.WAYS[way])
            return first, second

        one, other = make(), make()
        steps(one, 2)
        for old, new in zip(one, other, strict=True):
            new.load_state_dict(old.state_dict())
            lowbit.load_state_dict(new, lowbit.state_dict(old))

        losses = steps(one, 2)

        assert losses == steps(other, 2)
        assert len({float(loss) for loss in losses}) == len(losses)

    def test_verify_sees_all_of_it(self) -> None:
        """A proof of the second root covers the encoder that another conversion made, and its head."""
        _, second = self._roots()
        lowbit.convert_(second, "sbm8", strict=False)

        with lowbit.verify(second) as proof:
            second(torch.randn(6, 8, requires_grad=True)).sum().backward()

        assert len({row.layer for row in proof.rows}) == 3

    def test_restoring_one_leaves_the_head_of_the_other(self) -> None:
        """restore_ of the second root makes the encoder plain for both, and the first root's head stays converted."""
        first, second = self._roots()
        lowbit.convert_(second, "sbm8", strict=False)

        lowbit.restore_(second)

        assert type(second[2]) is nn.Linear
        assert type(first.get_submodule("0.0")) is nn.Linear
        assert type(first[2]) is not nn.Linear
        first(torch.randn(6, 8)).sum().backward()
        assert lowbit.state_dict(first)["groups"][0]["step"] == 1

    def test_a_transformer_evaluates_through_its_layers_after_two_conversions(self) -> None:
        """restore_ gives back torch's setting of nested tensors, which two conversions have changed once."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        before = encoder.use_nested_tensor
        root = nn.Sequential(encoder, nn.Linear(8, 4))
        lowbit.convert_(encoder, "sbm8")
        lowbit.convert_(root, "sbm8", strict=False)
        assert before
        assert not encoder.use_nested_tensor

        lowbit.restore_(root)

        assert encoder.use_nested_tensor
        assert not any(module._forward_pre_hooks for module in root.modules())


def test_contiguous_convolutions_are_told() -> None:
    """The report says for 2-d convolutions on the int8 engine that channels last spares copies; not after it is so."""
    model: Any = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 1))
    text = "model.to(memory_format=torch.channels_last) spares a copy"

    for engine, memory, told in (
        ("int8", torch.contiguous_format, True),
        ("int8", torch.channels_last, False),
        ("reference", torch.contiguous_format, False),
    ):
        if engine == "int8" and int8.missing("int8"):
            continue
        converted = copy.deepcopy(model).to(memory_format=memory)
        report = lowbit.convert_(converted, "int8", engine=engine)
        assert (text in str(report)) == told


@pytest.mark.parametrize("recipe", ["sbm8", "cpt-int8"])
def test_a_model_converted_in_inference_mode_trains(recipe: str) -> None:
    """Conversion, attaching a controller, evaluation and loading a state in inference mode change nothing later."""
    losses = []
    for inference in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(inference):
            lowbit.convert_(model, recipe)
            controller = None
            if recipe == "cpt-int8":
                controller = lowbit.PrecisionController.from_recipe(model, total_steps=64)
            lowbit.load_state_dict(model, lowbit.state_dict(model))
            model.eval()(x)
        for _ in range(3):
            model.zero_grad()
            loss = model.train()(x).square().sum()
            loss.backward()
            if controller is not None:
                controller.step(loss.item())
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=1e-4)
            losses.append(loss.item())

    assert losses[:3] == losses[3:]
    assert len({*losses}) == 3
