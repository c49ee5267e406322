"""`sbm8` where a sample has few features, and where a channel has few values: it trains, as full precision does."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit


class Dense(nn.Module):
    """Convolutions behind normalisations, each of which sees what all those before it gave, as in a DenseNet."""

    def __init__(self, layers: int, growth: int = 8) -> None:
        super().__init__()
        channels = [growth * (i + 2) for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.convolutions = nn.ModuleList(nn.Conv2d(c, growth, 1, bias=False) for c in channels)
        self.last = nn.Linear(channels[-1] + growth, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(B, 16, 1, 1)``."""
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = torch.cat([x, convolution(norm(x).relu())], 1)
        return self.last(x.flatten(1))


def _stack(layers: int) -> nn.Sequential:
    """Convolutions, each with its normalisation, one after the other without a way past them."""
    parts = [part for _ in range(layers) for part in (nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(16, 4))


def _losses(model: nn.Module, recipe: str, *, steps: int, lr: float) -> list[float]:
    """The losses of training on one batch of 4 images of 1 by 1."""
    lowbit.convert_(model, recipe, seed=0)
    x = torch.randn(4, 16, 1, 1, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("build", "layers", "lr"), [(Dense, 40, 0.01), (_stack, 8, 0.01)])
def test_four_values_a_channel_train_like_batch_normalisation(build: type[nn.Module], layers: int, lr: float) -> None:
    """At maps of 1 by 1 with batch 4 the loss starts where that of batch normalisation does, and falls as it does."""
    found = {}
    for recipe in ("fp32", "sbm8"):
        torch.manual_seed(0)
        found[recipe] = _losses(build(layers), recipe, steps=30, lr=lr)

    full, ours = found["fp32"], found["sbm8"]
    assert full[-1] < 0.2 * full[0]
    assert ours[0] < 2 * full[0]
    assert ours[-1] < 0.2 * full[0]
    assert ours != full


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_a_proof_says_which_rules_the_shape_chose(engine: str) -> None:
    """Few features a sample and few values a channel are named in the proof; more of both are not."""
    for size, one_chunk, rule in ((2, True, "tensor"), (16, False, "tensor, sample-mean from 256 values")):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        lowbit.convert_(model, "sbm8", engine=engine)
        with lowbit.verify(model) as proof:
            model(torch.randn(4, 4, size, size, generator=torch.Generator().manual_seed(0))).sum().backward()
        rows = {(row.layer, row.product): row for row in proof.rows}

        assert rows["1", "output"].kernel.endswith(" (one chunk)") == one_chunk
        for layer in ("0", "1"):
            assert rows[layer, "output"].operands["input"].format == f"8-bit integer, {rule}"


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_one_feature_is_not_clipped(engine: str) -> None:
    """A regression of sin(3x) from x alone ends below a mean squared error of 0.02; the target's variance is 0.5."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    lowbit.convert_(model, "sbm8", engine=engine)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        x = 4 * torch.rand(128, 1, generator=generator) - 2
        optimizer.zero_grad()
        F.mse_loss(model(x), torch.sin(3 * x)).backward()
        optimizer.step()

    x = torch.linspace(-2, 2, 256)[:, None]
    with lowbit.verify(model) as proof:
        F.mse_loss(model(x), torch.sin(3 * x)).backward()
    error = F.mse_loss(model.eval()(x), torch.sin(3 * x))

    assert 0 < error < 0.02
    assert max(row.clipped for row in proof.rows) < 0.001


@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("batch", [2, 3])
def test_two_and_three_values_a_channel_stay_bounded(batch: int, engine: str) -> None:
    """Values that fall into one code do not blow up gradients: losses stay where those of batch normalisation do."""
    most = {}
    for recipe in ("fp32", "sbm8"):
        torch.manual_seed(0)
        parts: list[nn.Module] = [nn.Conv2d(3, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        for _ in range(3):
            parts += [nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 4))
        lowbit.convert_(model, recipe, engine="reference" if recipe == "fp32" else engine, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        noise = torch.Generator().manual_seed(1)
        most[recipe] = 0.0
        for _ in range(60):
            x, y = torch.randn(batch, 3, 1, 1, generator=noise), torch.randint(4, (batch,), generator=noise)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            most[recipe] = max(most[recipe], loss.item())

    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert 1 < most["sbm8"] < 4 * most["fp32"]


@pytest.mark.parametrize("engine", ["reference", "int8"])
@pytest.mark.parametrize("narrowest", ["step", "zero"])
def test_equal_codes_are_divided_by_the_narrowest_range(narrowest: str, engine: str) -> None:
    """A channel within one code gives beta and the gradient ``gamma (g - mean g) / d``: d of a step, or epsilon's."""
    recipe = lowbit.Recipe.from_name("sbm8")
    recipe = recipe.replace(normalization=dataclasses.replace(recipe.normalization, narrowest=narrowest), name="mine")
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.weight.fill_(3.0)
        norm.bias.fill_(0.5)
    lowbit.convert_(norm, recipe, engine=engine)
    x = torch.tensor([[0.0, 50.0], [255.0, 50.1], [102.0, 49.9], [51.0, 50.0]])[:, :, None, None]  # steps of 1
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    y.backward(torch.tensor([[0.0, 0.0], [0.0, 85.0], [0.0, 170.0], [0.0, 255.0]])[:, :, None, None])  # of 1 too

    sigma = 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(4))
    d = math.sqrt(sigma**2 + norm.eps) if narrowest == "step" else math.sqrt(norm.eps)
    assert x.grad is not None
    torch.testing.assert_close(y[:, 1].flatten(), torch.full((4,), 0.5), rtol=0, atol=1e-4)
    expected = 3.0 / d * torch.tensor([-127.5, -42.5, 42.5, 127.5])
    torch.testing.assert_close(x.grad[:, 1].flatten(), expected, rtol=1e-5, atol=0)
