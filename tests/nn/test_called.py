"""Products in functions of modules: found by their weights, named, converted, and like layers in everything else."""

import copy
import io
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import Proof, UsageError
from lowbit.nn.calls.call import QuantCall
from lowbit.nn.calls.caller import Caller
from lowbit.nn.site import Site


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``."""
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Net(nn.Module):
    """A function's product in a child, a layer, and a product of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = Conv1D(8, 16), nn.Linear(16, 16)
        self.w = nn.Parameter(torch.randn(16, 4) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 8)`` to ``(..., 4)``."""
        return self.layer(F.relu(self.first(x))) @ self.w


class Calls(nn.Module):
    """A module whose forward is a function of its weight and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)) / 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x, self.weight)


def _net(recipe: str = "int8", seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    model = Net()
    lowbit.convert_(model, recipe, **options)
    return model


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _prove(model: nn.Module, *x: Tensor) -> Proof:
    with lowbit.verify(model) as proof:
        model(*x).square().sum().backward()
    return proof


def _train(model: nn.Module, steps: int, begin: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(begin, begin + steps):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# What a module does with x and its weight, the shapes of both, and the name of the call.
FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...], str]] = {
    "linear": (F.linear, (5, 3, 8), (6, 8), "linear"),
    "linear of a vector": (F.linear, (8,), (6, 8), "linear"),
    "@": (lambda x, w: x @ w, (5, 3, 8), (8, 6), "matmul"),
    "weight on the left": (lambda x, w: w @ x, (5, 8, 3), (6, 8), "matmul"),
    "a vector": (lambda x, w: x @ w[0], (5, 8), (2, 8), "matmul"),
    "mm": (lambda x, w: x.mm(w.t()), (5, 8), (6, 8), "mm"),
    "mv": (lambda x, w: torch.mv(w, x), (8,), (6, 8), "mv"),
    "bmm": (torch.bmm, (4, 5, 8), (4, 8, 6), "bmm"),
    "bmm of large matrices": (torch.bmm, (2, 64, 32), (2, 32, 32), "bmm"),
    "bmm of copies": (lambda x, w: torch.bmm(x, w.expand(4, 8, 6)), (4, 5, 8), (8, 6), "bmm"),
    "experts by matmul": (lambda x, w: torch.matmul(x.unsqueeze(1), w), (3, 5, 8), (2, 8, 6), "matmul"),
    "addmm": (lambda x, w: torch.addmm(x[:, :1], x, w, beta=2, alpha=0.5), (5, 8), (8, 6), "addmm"),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, :, :1], x, w), (4, 5, 8), (4, 8, 6), "baddbmm"),
    "einsum": (lambda x, w: torch.einsum("...d,hde->...he", x, w), (5, 3, 8), (2, 8, 4), "einsum"),
    "einsum of batches": (lambda x, w: torch.einsum("bnd,ndk->bnk", x, w), (5, 3, 8), (3, 8, 4), "einsum"),
    "einsum without a result": (lambda x, w: torch.einsum("bd,dk", x, w), (5, 8), (8, 4), "einsum"),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding="same"), (2, 4, 9), (6, 4, 3), "conv1d"),
    "conv2d": (lambda x, w: F.conv2d(x, w, None, 2, 1, groups=2), (2, 4, 9, 9), (6, 2, 3, 3), "conv2d"),
    "conv2d of one": (lambda x, w: F.conv2d(x, w, stride=(2, 1)), (4, 9, 9), (6, 4, 3, 3), "conv2d"),
    "conv3d": (F.conv3d, (2, 4, 5, 5, 5), (6, 4, 3, 3, 3), "conv3d"),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2),
        (2, 4, 5, 5),
        (4, 6, 3, 3),
        "conv_transpose2d",
    ),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (5, 8), (6, 8, 8), "bilinear"),
    "a cast": (lambda x, w: x.double() @ w.double(), (5, 8), (8, 6), "matmul"),
    "a concatenation": (lambda x, w: x @ torch.cat([w, 2 * w], 1), (5, 8), (8, 3), "matmul"),
    "a chosen expert": (lambda x, w: F.linear(x, w[torch.tensor(1)]), (5, 8), (3, 6, 8), "linear"),
    "a standardised weight": (lambda x, w: F.linear(x, F.layer_norm(w, (8,))), (5, 8), (6, 8), "linear"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_is_converted_and_near_full_precision(case: str) -> None:
    """Output and both gradients of each function are near those in float32 and not equal, and it has one call."""
    function, x_shape, w_shape, operator = FUNCTIONS[case]
    plain = Calls(function, *w_shape)
    model = copy.deepcopy(plain)
    lowbit.convert_(model, "int8")
    a, b = _x(*x_shape).requires_grad_(), _x(*x_shape).requires_grad_()

    y, expected = model(a), plain(b)
    y.square().sum().backward()
    expected.square().sum().backward()

    assert [name for name, m in model.named_modules() if isinstance(m, QuantCall)] == [f"{operator}.0"]
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    for mine, theirs in ((y.detach(), expected.detach()), (a.grad, b.grad), (model.weight.grad, plain.weight.grad)):
        assert mine is not None
        assert theirs is not None
        assert not torch.equal(mine, theirs)
        assert float((mine - theirs).norm() / theirs.norm()) < 0.05


def test_grouped_products_multiply_each_group_by_its_matrix() -> None:
    """Rows between two offsets meet their own matrix, an empty group none."""
    offs = torch.tensor([3, 3, 7], dtype=torch.int32)
    model = Calls(lambda x, w: torch._grouped_mm(x, w.transpose(-2, -1), offs=offs), 3, 16, 16)
    lowbit.convert_(model, "int8")
    x = _x(7, 16)

    proof = _prove(model, x)
    y = model.eval()(x).detach()

    expected = torch.cat([x[:3] @ model.weight[0].T, x[3:] @ model.weight[2].T]).detach()
    assert float((y - expected).norm() / expected.norm()) < 0.05
    assert [(row.layer, row.product, row.calls) for row in proof.rows] == [
        ("grouped_mm.0", "output", 2),
        ("grouped_mm.0", "grad_weight", 2),
    ]


class TestWeights:
    """Which operand is a weight."""

    def _calls(self, model: nn.Module, *x: Tensor) -> list[str]:
        lowbit.convert_(model, "int8", strict=False)
        model(*x)
        return [name for name, m in model.named_modules() if isinstance(m, QuantCall)]

    def test_products_of_activations_stay_outside(self) -> None:
        """Scores of attention are products of two activations: verify lists them, and no call is made of them."""
        model = Calls(lambda x, w: (x @ w) @ (x @ w).mT, 8, 8)
        lowbit.convert_(model, "int8")

        proof = _prove(model, _x(2, 5, 8))

        assert {row.layer for row in proof.rows} == {"matmul.0", "matmul.1"}
        assert sum(row.calls for row in proof.outside) == 3

    def test_products_of_weights_stay_outside(self) -> None:
        """What makes a weight of two others runs as it is; the product by the result is converted."""
        assert self._calls(Calls(lambda x, w: x @ (w @ w), 8, 8), _x(5, 8)) == ["matmul.0"]

    def test_rows_of_a_parameter_looked_up_by_the_input_are_an_activation(self) -> None:
        """A table of embeddings that is indexed is multiplied by a weight like any other input."""
        table = nn.Parameter(torch.randn(10, 8))
        model = Calls(lambda x, w: table[x] @ w, 8, 4)

        assert self._calls(model, torch.tensor([[1, 2], [3, 4]])) == ["matmul.0"]
        assert model.get_submodule("").lowbit_calls.layers["matmul.0"].multiplied == (model.weight,)

    def test_a_weight_with_a_buffer_is_a_weight(self) -> None:
        """A mask that is a buffer of the module leaves a weight a weight."""
        model = Calls(lambda x, w: x @ (w * model.mask), 8, 4)
        model.register_buffer("mask", torch.ones(8, 4))

        assert self._calls(model, _x(5, 8)) == ["matmul.0"]

    def test_a_parameter_that_scales_an_activation_is_none(self) -> None:
        """Activations times a parameter, element by element, are activations."""
        model = Calls(lambda x, w: (x * w) @ (x * w).mT, 8)

        assert self._calls(model, _x(2, 5, 8)) == []

    def test_a_module_with_a_small_parameter_of_its_own_is_watched(self) -> None:
        """A module that owns a scale and multiplies by the weight of a layer in it, as Swin V2 does, has calls."""

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale, self.qkv = nn.Parameter(torch.ones(8, 1, 1)), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.qkv.weight) * self.scale

        assert self._calls(nn.Sequential(nn.Linear(8, 8), Scaled()), _x(5, 8)) == ["1.linear.0"]

    def test_a_weight_of_the_parent_runs_in_a_child(self) -> None:
        """A weight that a parent makes and hands on is one in every step."""

        class Child(nn.Module):
            def forward(self, x: Tensor, w: Tensor) -> Tensor:
                return x @ w

        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.child, self.w = Child(), nn.Parameter(torch.randn(8, 4))

            def forward(self, x: Tensor) -> Tensor:
                return self.child(x, self.w * 2)

        model = Parent()

        assert self._calls(model, _x(5, 8)) == ["child.matmul.0"]
        for _ in range(3):
            assert {row.layer for row in _prove(model, _x(5, 8)).rows} == {"child.matmul.0"}


class TestSubclasses:
    """Subclasses of known layers, which keep or change the forward."""

    def test_those_with_the_forward_of_torch(self) -> None:
        """A Conv2d with another constructor alone, a parametrised layer and a Bilinear are converted by their calls."""
        model = nn.ModuleDict(
            {
                "same": type("Same", (nn.Conv2d,), {})(3, 4, 3),
                "normed": parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
                "last": nn.Conv2d(4, 2, 1),
            }
        )
        model.forward = lambda x: model["last"](model["normed"](model["same"](x)))
        report = lowbit.convert_(model, "int8")

        rows = {row.layer for row in _prove(model, _x(2, 3, 9, 9)).rows}

        assert rows == {"same.conv2d.0", "normed.conv2d.0", "last"}
        assert report.share == 1
        assert [row.called for row in report.rows][:2] == [True, True]

    def test_attention_of_a_subclass(self) -> None:
        """The projections of a subclass of MultiheadAttention are calls; the products of attention are not."""
        model = type("Mine", (nn.MultiheadAttention,), {})(8, 2, batch_first=True)
        lowbit.convert_(model, "int8")
        x = _x(2, 5, 8)

        with lowbit.verify(model) as proof:
            model(x, x, x, need_weights=False)[0].sum().backward()

        assert {row.layer for row in proof.rows} == {"linear.0", "linear.1"}

    def test_they_are_refused_without_calls(self) -> None:
        """`calls=False` refuses a subclass by name."""
        with pytest.raises(UsageError, match="a subclass of Linear"):
            lowbit.convert_(type("Mine", (nn.Linear,), {})(3, 3), "int8", calls=False)


class TestRules:
    """Rules by names of modules and of calls."""

    @pytest.mark.parametrize(
        "which", ["first", "first.addmm.0", re.compile(r"first\.addmm\.\d"), re.compile("first.*"), Conv1D]
    )
    def test_a_rule_leaves_a_call(self, which: Any) -> None:
        """A module's name or type, a call's name or a pattern leaves the product, which verify then lists."""
        model = _net(rules=[(which, None)])

        proof = _prove(model, _x(5, 8))

        assert {row.layer for row in proof.rows} == {"layer", "matmul.0"}
        assert {row.module for row in proof.outside} == {"first"}

    def test_a_rule_gives_a_recipe(self) -> None:
        """The first rule that matches decides which recipe a call runs."""
        model = _net(rules=[("matmul.0", "bf16"), (re.compile(".*"), "int8")])

        bits = {row.layer: row.bits for row in _prove(model, _x(5, 8)).rows}

        assert bits == {"first.addmm.0": "8x8", "layer": "8x8", "matmul.0": "16x16"}

    def test_a_rule_that_can_mean_nothing_is_an_error(self) -> None:
        """A call of a module that is not there, or of an unknown operator, is refused."""
        for name in ("second.addmm.0", "first.multiply.0"):
            with pytest.raises(UsageError, match="decided nothing"):
                lowbit.convert_(Net(), "int8", rules=[(name, None)])

    def test_products_by_a_weight_that_a_rule_leaves_stay(self) -> None:
        """A parent that multiplies by the weight of a layer which a rule leaves does so in full precision."""

        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(F.linear(x, self.qkv.weight))

        left, converted = Reads(), Reads()
        lowbit.convert_(left, "int8", rules=[("qkv", None)])
        lowbit.convert_(converted, "int8")

        assert {row.layer for row in _prove(left, _x(5, 8)).rows} == {"head"}
        assert {row.layer for row in _prove(converted, _x(5, 8)).rows} == {"head", "linear.0"}

    def test_a_layer_that_a_rule_leaves_is_left(self) -> None:
        """A plain layer inside a watched module is not converted by the back door."""
        model = _net(rules=[("layer", None)])

        assert {row.layer for row in _prove(model, _x(5, 8)).rows} == {"first.addmm.0", "matmul.0"}

    def test_a_layer_that_came_later_is_left(self) -> None:
        """A plain layer that is put into a converted model runs as it is, in every step."""
        model = _net()
        model.layer = nn.Linear(16, 16)

        for _ in range(2):
            model(_x(5, 8))

        assert model.lowbit_calls.layers.keys() == {"matmul.0"}


class TestNames:
    """Names from step to step."""

    def test_they_are_the_same_in_every_step(self) -> None:
        """Three steps and an evaluation have the calls of the first."""
        model = _net()
        _train(model, 3)
        model.eval()(_x(5, 8))

        assert list(lowbit.state_dict(model)["groups"][0]["sites"]) == ["layer", "first.addmm.0", "matmul.0"]

    def test_a_new_name_is_announced(self) -> None:
        """A product that first runs later warns with its name, and is converted."""
        model = Calls(lambda x, w: x @ w if len(x) < 9 else x @ w @ w, 8, 8)
        lowbit.convert_(model, "int8")
        model(_x(5, 8))

        with pytest.warns(UserWarning, match=r"matmul\.1: this product did not run in the first forward"):
            model(_x(9, 8))
        assert {row.layer for row in _prove(model, _x(9, 8)).rows} == {"matmul.0", "matmul.1"}

    def test_no_attribute_of_a_module_is_hidden(self) -> None:
        """A module with parts named as the library's own attributes finds its own."""

        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.plain, self.site, self.calls, self.is_altered = (nn.Linear(4, 4) for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                return self.is_altered(self.calls(self.site(self.plain(x))))

        model = Parts()
        lowbit.convert_(model, "int8")

        assert {row.layer for row in _prove(model, _x(2, 4)).rows} == {"plain", "site", "calls", "is_altered"}

    def test_children_and_state_are_those_of_the_plain_model(self) -> None:
        """A call is among `named_modules`, but not among children, parameters or the state."""
        model, plain = _net(), Net()
        model(_x(5, 8))

        assert [name for name, _ in model.named_children()] == [name for name, _ in plain.named_children()]
        assert list(model.state_dict()) == list(plain.state_dict())
        assert "first.addmm.0" in dict(model.named_modules())
        assert type(model).__name__ == "Net"
        assert isinstance(model, Net)


class TestLife:
    """What happens to a model: exceptions, threads, copies, checkpoints."""

    def test_an_exception_ends_the_watch(self) -> None:
        """After a forward that raised, functions outside the model are plain, and the next forward works."""

        def fails(x: Tensor, w: Tensor) -> Tensor:
            if len(x) == 1:
                raise KeyboardInterrupt
            return x @ w

        model = Calls(fails, 8, 4)
        lowbit.convert_(model, "int8")

        with pytest.raises(KeyboardInterrupt):
            model(_x(1, 8))
        assert torch._C._len_torch_function_stack() == 0
        assert torch.equal(_x(5, 8) @ model.weight, _x(5, 8) @ model.weight.detach())
        assert {row.layer for row in _prove(model, _x(5, 8)).rows} == {"matmul.0"}

    def test_a_module_that_calls_itself_has_one_name_for_both(self) -> None:
        """A reentrant forward numbers its own calls."""

        class Again(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(8, 8))

            def forward(self, x: Tensor, depth: int = 2) -> Tensor:
                return self(x @ self.w, depth - 1) if depth else x @ self.w

        model = Again()
        lowbit.convert_(model, "int8")

        rows = _prove(model, _x(5, 8)).rows

        assert [(row.layer, row.calls) for row in rows if row.product == "output"] == [("matmul.0", 3)]

    def test_threads_evaluate_alike(self) -> None:
        """Several threads that evaluate at once, the first forward included, get what one gets."""
        model, x = _net().eval(), _x(50, 8)
        results: list[Tensor] = []
        threads = [threading.Thread(target=lambda: results.append(model(x).detach())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(model.lowbit_calls.clock.sites) == 3
        assert all(torch.equal(y, model(x)) for y in results)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_the_first_forward_may_be_without_gradients(self, mode: Callable[[], Any]) -> None:
        """A model that first runs in evaluation finds its calls there and trains afterwards."""
        model = _net("sbm8").eval()
        with mode():
            y = model(_x(5, 8))
        assert torch.equal(y, model(_x(5, 8)))

        _train(model.train(), 2)

        assert model.lowbit_calls.layers["matmul.0"].site.running_range[2] == 2

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_recomputes_the_same(self, reentrant: bool) -> None:
        """A checkpointed module gives the gradients of the same model without checkpointing."""

        class Outer(nn.Module):
            def __init__(self, use: bool) -> None:
                super().__init__()
                self.inner, self.use = Net(), use

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.inner, x, use_reentrant=reentrant) if self.use else self.inner(x)

        models = []
        for use in (False, True):
            torch.manual_seed(0)
            model = Outer(use)
            lowbit.convert_(model, "int8")
            for _ in range(2):
                model.zero_grad()
                model(_x(5, 8).requires_grad_()).square().sum().backward()
            models.append(model)

        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p.grad, q.grad)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
    def test_a_copy_goes_on_alike(self, way: str) -> None:
        """A copy of a model that ran trains as its original does, and apart from it."""
        model = _net()
        _train(model, 2)
        if way == "save":
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert twin.lowbit_calls.layers["matmul.0"].site is not model.lowbit_calls.layers["matmul.0"].site

        _train(model, 2, 2)
        _train(twin, 2, 2)

        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

    def test_restored_it_is_the_plain_model(self) -> None:
        """`restore_` gives back class and outputs of the plain model, also where it had calls alone."""
        for model, x in ((_net(), _x(5, 8)), (Calls(lambda x, w: x @ w, 8, 4), _x(5, 8))):
            if not isinstance(model, Caller):
                lowbit.convert_(model, "int8")
            model(x)
            plain = copy.deepcopy(model)

            lowbit.restore_(model)

            assert type(model) in (Net, Calls)
            assert not any(isinstance(m, Caller | Site) for m in model.modules())
            assert not model._forward_pre_hooks
            assert not torch.equal(model(x), plain.eval()(x))

    def test_a_mode_of_the_user_stays_in_place(self) -> None:
        """A mode that was entered outside sees the functions of the model, and is on afterwards."""
        seen = []

        class Mine(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        model = _net()
        with Mine():
            model(_x(5, 8))
            assert torch._C._len_torch_function_stack() == 1
        assert torch.nn.functional.relu in seen or torch.relu in seen

    def test_a_module_without_products_is_watched_once(self) -> None:
        """After a forward without a product of its own a module runs without a mode; the first forward has one."""
        depths = []

        class Watched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                depths.append(torch._C._len_torch_function_stack())
                return self.layer(x)

        model = Watched()
        lowbit.convert_(model, "int8")
        for _ in range(3):
            model(_x(2, 4))

        assert depths == [1, 0, 0]

    def test_autocast_gives_its_dtype(self) -> None:
        """Inside autocast a call returns bfloat16, as the function does."""
        model = _net()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(_x(5, 8)).dtype == torch.bfloat16


class TestState:
    """Saved and resumed runs, controllers, meters, optimizers."""

    @pytest.mark.parametrize("recipe", ["int8", "sbm8"])
    @pytest.mark.parametrize("ran", [False, True])
    def test_a_resumed_run_is_the_run(self, recipe: str, ran: bool) -> None:
        """Two steps, a state loaded into a new model, which may have run, and two steps are four steps."""
        whole, part = _net(recipe), _net(recipe)
        _train(whole, 4)
        _train(part, 2)
        saved, weights = lowbit.state_dict(part), copy.deepcopy(part.state_dict())
        new = _net(recipe, seed=1)
        if ran:
            _train(new, 1)

        lowbit.load_state_dict(new, saved)
        new.load_state_dict(weights)
        with warnings.catch_warnings(action="error"):
            _train(new, 2, 2)

        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), new.parameters(), strict=True))

    def test_a_state_that_does_not_fit_leaves_no_call(self) -> None:
        """If a state is refused, the model lacks calls as before."""
        model = _net()
        _train(model, 1)
        state = lowbit.state_dict(model)
        state["groups"][0]["sites"]["first.addmm.0"]["uses"] = -1
        new = _net()

        with pytest.raises(UsageError, match="uses"):
            lowbit.load_state_dict(new, state)
        assert list(lowbit.state_dict(new)["groups"][0]["sites"]) == ["layer"]

    @pytest.mark.parametrize("loaded_first", [False, True])
    def test_a_controller_made_before_the_first_forward_sets_calls(self, loaded_first: bool) -> None:
        """A schedule moves the bits of calls as of layers, and a run that was resumed under it is the run."""

        def controller(model: nn.Module) -> lowbit.PrecisionController:
            schedule = lowbit.schedules.Cyclic(low=3, high=8, cycles=2, total_steps=8)
            return lowbit.PrecisionController(model, forward=schedule, rules=[("matmul.0", (6, 6))])

        def run(model: nn.Module, bits: lowbit.PrecisionController, steps: range) -> None:
            for step in steps:
                _train(model, 1, step)
                bits.step()

        whole, part, new = _net(), _net(), _net(seed=1)
        bits = controller(whole)
        run(whole, bits, range(3))
        assert bits.bits()["first.addmm.0"] == bits.bits()["layer"] != (8, 8)
        assert bits.bits()["matmul.0"] == (6, 6)
        run(whole, bits, range(3, 6))
        first = controller(part)
        run(part, first, range(4))

        if loaded_first:
            lowbit.load_state_dict(new, lowbit.state_dict(part))
        second = controller(new)
        if not loaded_first:
            lowbit.load_state_dict(new, lowbit.state_dict(part))
        second.load_state_dict(first.state_dict())
        new.load_state_dict(part.state_dict())
        run(new, second, range(4, 6))

        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), new.parameters(), strict=True))

    def test_a_dynamic_recipe_without_a_controller_is_refused(self) -> None:
        """A model of calls alone whose recipe changes bits raises as one of layers does."""
        model = Calls(lambda x, w: x @ w, 8, 4)
        lowbit.convert_(model, "cpt-int8")

        with pytest.raises(UsageError, match="no controller is attached"):
            model(_x(5, 8))

    def test_a_meter_counts_calls(self) -> None:
        """The MACs of a step are those of the plain model, and none are outside."""
        model, plain = _net(), Net()
        counted = []
        for each in (model, plain):
            with lowbit.Meter(each) as meter:
                each(_x(5, 8)).sum().backward()
                meter.step()
            counted.append([(total.product.layer, total.macs) for total in meter.ledger.totals()])

        assert sorted(macs for _, macs in counted[0]) == sorted(macs for _, macs in counted[1])
        assert {layer for layer, _ in counted[0]} == {"first.addmm.0", "layer", "matmul.0"}

    def test_an_engine_that_cannot_run_a_call_is_refused_by_name(self) -> None:
        """With engine="int8" a recipe's call that the engine cannot run raises and names the call and the rule."""
        model = Calls(torch.bmm, 4, 8, 6)
        lowbit.convert_(model, "int8", engine="int8")

        with pytest.raises(UsageError, match=r"bmm\.0: the int8 engine cannot run .*rules=\[\('bmm\.0', None\)\]"):
            model(_x(4, 5, 8))


class TestCompile:
    """torch.compile."""

    def test_a_model_with_calls_runs_them_eagerly(self) -> None:
        """Compiled, the model gives the numbers of its eager twin; as one graph it is refused."""
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="_run_eagerly"):
            torch.compile(_net(), backend="eager", fullgraph=True)(_x(5, 8))
        torch._dynamo.reset()
        model, twin = _net(), _net()
        compiled = torch.compile(model, backend="eager")

        for _ in range(2):
            assert torch.equal(compiled(_x(5, 8)), twin(_x(5, 8)))
        assert model.lowbit_calls.layers.keys() == {"matmul.0"}
