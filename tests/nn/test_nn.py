"""Linear and convolution layers: the plain layers' results, noise of their own, and what a step is."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.methods.recipe import Recipe
from lowbit.nn import PRODUCT_LAYERS, QuantLayer, QuantLinear
from lowbit.products import watch

SBM8 = Recipe.from_name("sbm8")
# A recipe whose forward rounds stochastically too.
NOISY = SBM8.replace(
    name="noisy",
    output=dataclasses.replace(SBM8.output, input=SBM8.grad_input.grad_output),
    grad_weight=dataclasses.replace(SBM8.grad_weight, input=SBM8.grad_input.grad_output),
)


def _gradients(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Output, gradient of the input and of the parameters for the sum of squares."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _clock_step(model: nn.Module) -> int:
    return lowbit.state_dict(model)["groups"][0]["step"]


class TestLayers:
    """The twins of linear and convolution layers."""

    @pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
    @pytest.mark.parametrize("padding", [2, "same", "valid"])
    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_fp32_convolution_layers_equal_the_plain_ones(self, axes: int, padding: int | str, mode: str) -> None:
        """With the fp32 recipe every padding of every dimension gives the plain layer's values and gradients."""
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        layer = kind(4, 6, 3, padding=padding, dilation=2, groups=2, padding_mode=mode).double()
        x = torch.randn(2, 4, *[7, 6, 5][:axes], dtype=torch.float64)
        expected = _gradients(layer, x, list(layer.parameters()))

        lowbit.convert_(layer, "fp32")
        actual = _gradients(layer, x, list(layer.parameters()))

        assert isinstance(layer, QuantLayer)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-11)

    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_fp32_transposed_layers_honour_the_output_size(self, axes: int) -> None:
        """A transposed layer with a stride reaches every output size that the plain one reaches."""
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        layer = kind(4, 6, 3, stride=2, padding=1, groups=2).double()
        x = torch.randn(2, 4, *[4] * axes, dtype=torch.float64)
        plain = [layer(x, output_size=[n] * axes).detach() for n in (7, 8)]

        lowbit.convert_(layer, "fp32")

        for n, y in zip((7, 8), plain, strict=True):
            torch.testing.assert_close(layer(x, output_size=[n] * axes).detach(), y, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        "kind",
        [k for k in PRODUCT_LAYERS if not issubclass(k, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention))],
    )
    def test_sbm8_layers_are_near_the_plain_ones_and_not_equal(self, kind: type[nn.Module]) -> None:
        """8-bit output and gradients are within 10 % of full precision in norm, and differ from it."""
        axes = int(kind.__name__[-2]) if kind is not nn.Linear else 0
        layer = kind(16, 8) if kind is nn.Linear else kind(16, 8, 3)
        # So narrow that every sample has the same extremes: nothing is clipped.
        x = torch.randn(6, 16, *[6] * axes).clamp(-0.4, 0.4)
        plain = _gradients(layer, x, list(layer.parameters()))

        lowbit.convert_(layer, "sbm8")
        quantized = _gradients(layer, x, list(layer.parameters()))

        for q, p in zip(quantized, plain, strict=True):
            assert not torch.equal(q, p)
            assert (q - p).norm() < 0.1 * p.norm()

    def test_a_twin_cannot_be_made_directly(self) -> None:
        """Calling the class of a twin says which plain layer to convert."""
        with pytest.raises(TypeError, match=r"convert_\(torch\.nn\.Linear"):
            QuantLinear(3, 4)

    def test_an_input_of_wrong_rank_is_refused(self) -> None:
        """A convolution names itself, the shape it got and the shapes it takes."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        lowbit.convert_(model, "sbm8")

        with pytest.raises(ValueError, match=r"0: input of shape \(3, 4\); expected \(C, \*size\)"):
            model(torch.randn(3, 4))

    def test_autocast_gives_its_dtype(self) -> None:
        """Under autocast a converted layer returns bfloat16 and its parameters get float32 gradients."""
        layer = nn.Linear(8, 4)
        lowbit.convert_(layer, "sbm8")

        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(6, 8))
        y.sum().backward()

        assert y.dtype == torch.bfloat16
        assert layer.weight.grad.dtype == torch.float32

    def test_evaluation_takes_the_running_range(self) -> None:
        """In evaluation a value far outside what training saw is clipped to the running range."""
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        lowbit.convert_(layer, "sbm8")
        layer(torch.tensor([[0.0], [1.0]]))
        layer(torch.tensor([[1.0], [3.0]]))
        low, high = 0.9 * 1.0 + 0.1 * 3.0, 100.0  # of one feature a sample, the batch's extremes count

        y = layer.eval()(torch.tensor([[low], [high]]))

        torch.testing.assert_close(y, torch.full((2, 1), low), rtol=1e-5, atol=0)

    def test_evaluation_before_training_takes_the_range_of_its_batch(self) -> None:
        """A model that never trained evaluates with the batch's own range, within half a step of the input."""
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        lowbit.convert_(layer, "sbm8")
        x = torch.full((64, 1), 5.0) - torch.rand(1)

        y = layer.eval()(x)

        torch.testing.assert_close(y, x, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
    def test_an_unbatched_input_is_a_batch_of_one(self, kind: type[nn.Module]) -> None:
        """Without a batch axis, output and recorded range are those of a batch of one."""
        layer = nn.Linear(8, 4) if kind is nn.Linear else nn.Conv1d(8, 4, 3)
        lowbit.convert_(layer, "sbm8")
        twin, x = copy.deepcopy(layer), torch.randn(8) if kind is nn.Linear else torch.randn(8, 6)

        y, expected = layer(x), twin(x.unsqueeze(0)).squeeze(0)

        assert torch.equal(y, expected)
        assert torch.equal(layer.site.running_range, twin.site.running_range)

    def test_inf_in_evaluation_surfaces_as_nan(self) -> None:
        """A running range does not turn inf into its largest value."""
        layer = nn.Linear(8, 4)
        lowbit.convert_(layer, "sbm8")
        layer(torch.randn(6, 8))
        x = torch.randn(2, 8)
        x[0, 0] = float("inf")

        y = layer.eval()(x)

        assert y[0].isnan().all()

    def test_evaluation_records_no_range(self) -> None:
        """Forwards in evaluation leave the running range as it is."""
        layer = nn.Linear(8, 4)
        lowbit.convert_(layer, "sbm8")
        layer(torch.randn(6, 8))
        before = layer.site.running_range.clone()

        layer.eval()(10 * torch.randn(6, 8))

        assert before[2] == 1
        assert torch.equal(layer.site.running_range, before)


class TestNoise:
    """Noise by step, by layer and by use."""

    @staticmethod
    def _model() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        lowbit.convert_(model, "sbm8")
        return model

    def test_two_training_forwards_draw_different_noise(self) -> None:
        """The same input twice gives the same output and other gradients."""
        model = self._model()
        x = torch.randn(6, 8)

        first, second = (_gradients(model, x, list(model.parameters())) for _ in range(2))

        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])

    def test_a_replayed_step_draws_the_same_noise(self) -> None:
        """After load_state_dict of the state before a step, that step's gradients come again bit for bit."""
        model = self._model()
        x = torch.randn(6, 8)
        _gradients(model, x, list(model.parameters()))
        state = lowbit.state_dict(model)
        first = _gradients(model, x, list(model.parameters()))

        lowbit.load_state_dict(model, state)
        replayed = _gradients(model, x, list(model.parameters()))

        assert _same(first, replayed)
        assert not _same(first, _gradients(model, x, list(model.parameters())))

    def test_another_seed_draws_other_noise(self) -> None:
        """Two copies of a model with different seeds have different gradients in the same step."""
        plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        x, results = torch.randn(6, 8), []
        for seed in (0, 0, 1):
            model = copy.deepcopy(plain)
            lowbit.convert_(model, "sbm8", seed=seed)
            results.append(_gradients(model, x, list(model.parameters())))

        assert _same(results[0], results[1])
        assert not torch.equal(results[0][1], results[2][1])

    def test_a_layer_used_twice_draws_two_fields(self) -> None:
        """Two uses of a layer in one forward have different noise, and the next forward begins anew."""
        layer = nn.Linear(8, 8)
        lowbit.convert_(layer, NOISY)
        model = nn.ModuleList([layer])
        x = torch.randn(6, 8)
        layer.site.clock.advance(model, ())

        first, second = layer.forward(x), layer.forward(x)
        layer.site.clock.set_step(0)
        again = layer(x)

        assert not torch.equal(first, second)
        assert torch.equal(first, again)

    def test_two_layers_draw_two_fields(self) -> None:
        """Two layers with the same weights and input round differently in the same step."""
        first = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": first, "b": copy.deepcopy(first)})
        lowbit.convert_(model, NOISY)
        x = torch.randn(6, 8)

        assert not torch.equal(model["a"](x), model["b"](x))

    def test_evaluation_does_not_advance_the_step(self) -> None:
        """Only training forwards are counted."""
        model = self._model()
        x = torch.randn(6, 8)
        model(x)

        model.eval()(x)
        model.eval()(x)

        assert _clock_step(model) == 1
        model.train()(x)
        assert _clock_step(model) == 2

    def test_evaluation_between_forward_and_backward_changes_no_gradient(self) -> None:
        """A validation pass between a training forward and its backward leaves the gradients as they are."""
        model, x = self._model(), torch.randn(6, 8)
        twin = copy.deepcopy(model)
        expected = _gradients(twin, x, list(twin.parameters()))

        leaf = x.clone().requires_grad_()
        y = model(leaf)
        with torch.no_grad():
            model.eval()(3 * x)
        model.train()
        actual = [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])]

        assert _same(actual, expected)

    def test_two_forwards_then_two_backwards(self) -> None:
        """Two forwards followed by their backwards give the gradients of forward, backward, forward, backward."""
        model, x = self._model(), torch.randn(2, 6, 8)
        twin = copy.deepcopy(model)
        expected = [_gradients(twin, part, list(twin.parameters()))[1:] for part in x]

        leaves = [part.clone().requires_grad_() for part in x]
        losses = [model(leaf).square().sum() for leaf in leaves]
        actual = [
            list(torch.autograd.grad(loss, [leaf, *model.parameters()]))
            for loss, leaf in zip(losses, leaves, strict=True)
        ]

        assert _same(actual[0], expected[0])
        assert _same(actual[1], expected[1])

    def test_global_generators_are_left_alone(self) -> None:
        """A training step draws nothing from torch's own generator."""
        model, x = self._model(), torch.randn(6, 8)
        before = torch.get_rng_state()

        _gradients(model, x, list(model.parameters()))

        assert torch.equal(torch.get_rng_state(), before)


class _Checkpointed(nn.Module):
    """Blocks that are recomputed in backward; `reentrant` None keeps them."""

    def __init__(self, *blocks: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class TestCheckpointing:
    """Gradient checkpointing recomputes what the forward computed."""

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("recipe", [SBM8, NOISY], ids=["sbm8", "noisy"])
    def test_training_gradients_are_bit_identical(self, recipe: Recipe, reentrant: bool) -> None:
        """With either kind of checkpointing, output and gradients are those of keeping everything."""
        x, results = torch.randn(6, 3, 5, 5), []
        for kind in (None, reentrant):
            torch.manual_seed(1)
            blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()) for _ in range(3)]
            model = _Checkpointed(*blocks, reentrant=kind)
            lowbit.convert_(model, recipe)
            results.append(_Step(model, x))

        assert _same(results[0].gradients, results[1].gradients)
        assert all(bool(g.any()) for g in results[0].gradients if g.dim() > 1)
        assert all(torch.equal(a, b) for a, b in zip(results[0].buffers, results[1].buffers, strict=True))

    @pytest.mark.parametrize("together", [True, False], ids=["one backward", "two backwards"])
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("recipe", [SBM8, NOISY], ids=["sbm8", "noisy"])
    def test_two_forwards_before_their_backwards_keep_their_noise(
        self, recipe: Recipe, reentrant: bool, together: bool
    ) -> None:
        """Recomputed layers draw the noise of the forward that the backward is of, not of the last forward."""
        xs = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
        gradients = []
        for kind in (None, reentrant):
            torch.manual_seed(1)
            model = _Checkpointed(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)), reentrant=kind)
            lowbit.convert_(model, recipe)
            losses = [model(x).square().sum() for x in xs]
            if together:
                sum(losses, torch.zeros(())).backward()
            else:
                for loss in losses:
                    loss.backward()
            gradients.append([p.grad for p in model.parameters()])

        assert _same(*gradients)
        assert all(bool(g.any()) for g in gradients[0])

    def test_a_checkpointed_layer_that_runs_twice_and_rounds_its_input_is_refused(self) -> None:
        """Recomputing one of two uses with a stochastic forward raises, naming the layer."""
        layer = nn.Linear(8, 8)
        model = _Checkpointed(layer, layer, reentrant=False)
        lowbit.convert_(model, NOISY)

        with pytest.raises(RuntimeError, match=r"blocks\.0: gradient checkpointing runs again"):
            model(torch.randn(6, 8).requires_grad_()).sum().backward()


class _Step:
    """One training step of a model: its gradients and the buffers it left."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        self.gradients: list[Any] = [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]
        self.buffers = [b.clone() for b in model.buffers()]


def test_products_run_in_converted_layers_only_once() -> None:
    """One training step runs each of the three products of a layer once."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    lowbit.convert_(model, "sbm8")
    seen: list[tuple[str, str]] = []

    with watch.observed_by(lambda run: seen.append((run.layer, run.product))):
        model(torch.randn(6, 8)).sum().backward()

    assert seen == [
        ("0", "output"),
        ("2", "output"),
        ("2", "grad_input"),
        ("2", "grad_weight"),
        ("0", "grad_weight"),
    ]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_evaluation_keeps_the_running_range(reentrant: bool) -> None:
    """A recomputed evaluation takes the running range, as the forward did, not its batch's."""
    model = nn.Sequential(nn.Linear(4, 4))
    lowbit.convert_(model, "sbm8")
    model(torch.randn(6, 4) * 0.1)
    model.eval()
    x = torch.randn(6, 4, requires_grad=True)

    gradients = []
    for y in (model(x), checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        y.square().sum().backward()
        gradients.append(model[0].weight.grad.clone())

    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_the_whole_model_is_one_step(reentrant: bool) -> None:
    """The forward that a backward runs again does not advance the step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lowbit.convert_(model, "sbm8")

    checkpoint(model, torch.randn(6, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()

    assert _clock_step(model) == 1


def test_an_odd_same_padding_adds_real_zeros() -> None:
    """Where zero is off the grid, an even kernel's padding is still zero and not the grid's nearest value."""
    layer = nn.Conv1d(1, 1, 2, padding="same", bias=False)
    nn.init.ones_(layer.weight)
    lowbit.convert_(layer, Recipe.from_name("sbm8-cpt").replace(last="convert"))
    x = torch.linspace(1, 2, 9).reshape(1, 1, 9)

    y = layer(x)

    assert y.shape == x.shape
    assert abs(y[0, 0, -1].item() - 2) < 0.01
    assert not torch.equal(y[0, 0, :-1], (x[0, 0, :-1] + x[0, 0, 1:]))


def test_bits_of_a_forward_are_those_of_its_backward() -> None:
    """Bits that change between forward and backward do not reach the backward that is still to come."""
    model = nn.Sequential(nn.Linear(8, 8))
    lowbit.convert_(model, Recipe.from_name("sbm8-cpt").replace(last="convert"))
    x = torch.randn(4, 8)
    lowbit_state = lowbit.state_dict(model)
    model(x).square().sum().backward()
    expected = model[0].weight.grad.clone()
    lowbit.load_state_dict(model, lowbit_state)
    model.zero_grad()

    loss = model(x).square().sum()
    model[0].site.bits.fill_(2)
    loss.backward()

    assert torch.equal(model[0].weight.grad, expected)


def test_a_compiled_model_gives_the_eager_values() -> None:
    """torch.compile leaves converted layers eager and compiles the rest: output and gradients are the same."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.convert_(model, "sbm8")
    again = copy.deepcopy(model)
    compiled = torch.compile(again, backend="aot_eager")
    x = torch.randn(6, 8)

    kept = _gradients(model, x, list(model.parameters()))
    other = _gradients(compiled, x, list(again.parameters()))

    assert _same(kept, other)
