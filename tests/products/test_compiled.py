"""Compiled models: one graph without a break, the eager numbers, nothing compiled anew when bits change."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import PrecisionController
from lowbit.products import compiled
from lowbit.schedules import Cyclic


class Block(nn.Module):
    """A transformer block whose attention is torch's own."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """A residual step of attention and one of an MLP."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        return x + self.mlp(self.second(x))


class Residual(nn.Module):
    """A residual block of a ResNet, channels last or not."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``relu(x + f(x))``."""
        return F.relu(x + self.body(x))


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))


def resnet() -> nn.Module:
    """A small ResNet."""
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def gpt() -> nn.Module:
    """Two blocks between an embedding and a head."""
    return nn.Sequential(nn.Embedding(50, 32), Block(), Block(), nn.LayerNorm(32), nn.Linear(32, 50))


def others() -> nn.Module:
    """A transposed and a grouped convolution, padded with reflections."""
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="reflect")
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "mlp": (mlp, lambda g: torch.randn(8, 16, generator=g)),
    "resnet": (resnet, lambda g: torch.randn(8, 3, 12, 12, generator=g)),
    "gpt": (gpt, lambda g: torch.randint(50, (4, 12), generator=g)),
    "others": (others, lambda g: torch.randn(4, 3, 8, 8, generator=g)),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that was compiled before, and nothing left for what comes after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twins(case: str, recipe: str) -> tuple[nn.Module, nn.Module, Any]:
    """A converted model, a converted copy, and that copy compiled in one graph."""
    torch.manual_seed(0)
    model = CASES[case][0]()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        lowbit.convert_(each, recipe, seed=1)
    return model, twin, torch.compile(twin, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("recipe", ["int8", "sbm8", "sbm8-cpt", "bf16"])
@pytest.mark.parametrize("case", list(CASES))
def test_one_graph_gives_the_eager_numbers(case: str, recipe: str) -> None:
    """Outputs, gradients, running statistics and evaluations of three steps are those of the model as it is."""
    model, twin, run = twins(case, recipe)
    data = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = CASES[case][1](data)
        a, b = model(x), run(x)
        a.square().mean().backward()
        b.square().mean().backward()
    model.eval()
    twin.eval()
    x = CASES[case][1](data)

    assert torch.equal(a, b)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        assert torch.equal(model(x), run(x))


def test_steps_draw_different_noise() -> None:
    """The same batch gives other gradients in the next step, as eagerly."""
    _, twin, run = twins("mlp", "sbm8")
    x, grads = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), []
    for _ in range(2):
        run(x).square().mean().backward()
        grads.append(twin[0].weight.grad.clone())
        twin.zero_grad()

    assert not torch.equal(*grads)
    assert int(twin[0].site.clock.step) == 2


def test_bits_change_without_a_new_compilation() -> None:
    """A schedule sets other bits at every step; the graph of the first step serves them all."""
    torch.manual_seed(0)
    model = mlp()
    lowbit.convert_(model, "sbm8-cpt", seed=1)
    bits = PrecisionController(model, forward=Cyclic(low=3, high=8, cycles=1, total_steps=6), backward=8)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, seen, losses = torch.randn(8, 16), [], []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            seen.append(int(model[0].site.bits[0]))
            loss = run(x).square().mean()
            loss.backward()
            bits.step(loss.detach())
            losses.append(loss.item())

    assert len(set(seen)) > 3
    assert len(set(losses)) > 3


def test_a_copy_is_a_site_of_its_own() -> None:
    """A deep copy of a converted model has other numbers, so that compiled calls do not reach the original."""
    model = mlp()
    lowbit.convert_(model, "int8")
    twin = copy.deepcopy(model)

    assert model[0].site.number != twin[0].site.number
    assert model[0].site.clock.number != twin[0].site.clock.number


def test_what_the_backward_needs_goes_with_the_memo() -> None:
    """A memo keeps what it was given for as long as a tensor uses its memory, and no longer."""
    gc.collect()
    before = len(compiled._memories)
    note = compiled.memo(["kept"])
    view = note[2:]
    del note

    assert compiled.kept_by(view.as_strided((8,), (1,), 0)) == ["kept"]
    del view
    gc.collect()
    assert len(compiled._memories) == before


def test_no_memo_outlives_its_step() -> None:
    """After backward, and after a forward without one, nothing is kept."""
    _, twin, run = twins("mlp", "int8")
    x = torch.randn(8, 16)
    run(x).sum().backward()
    run(x)
    with torch.no_grad():
        run(x)
    gc.collect()

    assert len(compiled._memories) == 0
    assert twin[0].weight.grad is not None


@pytest.mark.parametrize("recipe", ["int8", "sbm8"])
def test_the_operators_are_what_they_say(recipe: str) -> None:
    """`opcheck`: schema, fake kernels, and autograd of products and of Range BN."""
    linear, norm = nn.Linear(6, 4), nn.BatchNorm2d(3)
    conv = nn.Conv2d(3, 5, 3, stride=2)
    model = nn.Sequential(nn.Sequential(conv), norm if recipe == "sbm8" else nn.Identity(), linear)
    lowbit.convert_(model, recipe, seed=1)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    plain = (False, [], [], [], [], 1)
    x = torch.randn(5, 6, requires_grad=True)
    needs = [True, True, True]

    def products(layer: Any, x: Tensor, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
        site = layer.site
        return (x, layer.weight, layer.bias, site.clock.pulse, site.number, *numbers, torch.float32, needs)

    torch.library.opcheck(torch.ops.lowbit.products.default, products(linear, x, plain), test_utils=tests)
    picture = torch.randn(2, 3, 8, 8, requires_grad=True)
    numbers = (False, [2, 2], [0, 0], [1, 1], [], 1)
    torch.library.opcheck(torch.ops.lowbit.products.default, products(conv, picture, numbers), test_utils=tests)
    if recipe == "sbm8":
        site = norm.site
        arguments = (picture, norm.weight, norm.bias, site.clock.pulse, None, None, site.number, 1e-5, False, needs)
        torch.library.opcheck(torch.ops.lowbit.range_norm.default, arguments, test_utils=tests)


def test_layers_of_other_shapes_compile_too() -> None:
    """Batches of several sizes run in one compiled model, each with the eager numbers."""
    model, _, run = twins("resnet", "sbm8")
    for batch in (8, 5, 3):
        x = torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))

        assert torch.equal(model(x), run(x))
