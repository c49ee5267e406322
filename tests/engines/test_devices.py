"""What converted models compute on a GPU, beside what they compute on the CPU; skips where there is no GPU."""

import copy
import io
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.methods.recipe import Recipe, recipes
from lowbit.numerics.rounding import noise_key, step_key, tensor_id, uniform_noise
from lowbit.train.models import ResNet

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

NAMES = [name for name in recipes() if "X" not in name]
STATIC = [name for name in NAMES if Recipe.from_name(name).schedule is None and Recipe.from_name(name).gates is None]


@pytest.fixture(autouse=True)
def _layers_that_moved_may_warn() -> Iterator[None]:
    """Which layers leave the int8 engine on a GPU is tested with the engine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs on the reference engine on cuda")
        yield


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of a generator of their own, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1,), (1000,), (7, 33, 5), (2**20 + 3,), (0,)])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 5])
def test_the_noise_is_the_same(shape: tuple[int, ...], seed: int) -> None:
    """The same numbers for the same seed, step and tensor, wherever they and their key are made."""
    name = tensor_id("layer", "grad_weight", "grad_output", 3)
    here = uniform_noise(noise_key(step_key(seed, torch.tensor(7)), name), shape)
    there = uniform_noise(noise_key(step_key(seed, torch.tensor(7, device=DEVICE)), name), shape)
    moved = uniform_noise(noise_key(step_key(seed, torch.tensor(7)), name), shape, torch.device(DEVICE))

    assert there.device.type == moved.device.type == DEVICE
    assert torch.equal(there.cpu(), here)
    assert torch.equal(moved.cpu(), here)


def network() -> nn.Sequential:
    """Convolutions with normalisation, a depthwise one, and linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 40),
        nn.ReLU(),
        nn.Linear(40, 8),
    )


def data() -> tuple[Tensor, Tensor]:
    """A batch that can be learnt."""
    x = randn(32, 3, 8, 8, seed=5)
    return x.to(DEVICE), (x[:, 0, :4, :2].flatten(1).argmax(1)).to(DEVICE)


def train(model: nn.Module, steps: int, *, autocast: bool, control: Any = None) -> list[float]:
    """Losses of plain SGD."""
    x, y = data()
    gates = getattr(control, "gates", None)
    optimizer = torch.optim.SGD([*model.parameters(), *(gates.parameters() if gates else ())], lr=0.1)
    scaler = lowbit.amp.GradScaler.from_recipe(model)
    losses = []
    for _ in range(steps):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast), lowbit.amp.autocast(model):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss if gates is None else loss + gates.penalty()).backward()
        scaler.step(optimizer)
        scaler.update()
        if control is not None:
            control.step(loss)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("name", STATIC)
def test_a_model_trains(name: str, engine: Any, autocast: bool) -> None:
    """The loss of every recipe without a schedule falls, whether converted here and moved or converted there."""
    model = network()
    if engine == "auto":
        lowbit.convert_(model, name, engine=engine)
        model.to(DEVICE)
    else:
        lowbit.convert_(model.to(DEVICE), name, engine=engine)

    losses = train(model, 30, autocast=autocast)

    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", STATIC)
def test_auto_on_a_model_that_lies_there_is_the_reference(name: str, autocast: bool) -> None:
    """Bit for bit, in five steps."""
    losses = []
    for engine in ("reference", "auto"):
        model = network().to(DEVICE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            report = lowbit.convert_(model, name, engine=engine)  # type: ignore[arg-type]
        assert {e for row in report.rows for e in row.engines.values()} <= {"reference"}
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            losses.append(train(model, 5, autocast=autocast))

    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", STATIC)
def test_the_first_step_is_near_that_of_the_cpu(name: str) -> None:
    """The loss of one forward differs by no more than sums in another order make it: a flipped code or two."""
    here = network()
    lowbit.convert_(here, name, engine="reference")
    there = copy.deepcopy(here).to(DEVICE)
    x, y = data()

    with lowbit.amp.autocast(here):
        one = F.cross_entropy(here(x.cpu()), y.cpu())
    with lowbit.amp.autocast(there):
        two = F.cross_entropy(there(x), y)

    torch.testing.assert_close(two.cpu(), one, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["cpt", "cpt-int8", "pfq"])
def test_a_schedule_runs(name: str) -> None:
    """A controller changes the bits of a model that lies there, and all of it is proven."""
    model = network()
    lowbit.convert_(model, name)
    model.to(DEVICE)
    control = lowbit.PrecisionController.from_recipe(model, total_steps=64, steps_per_epoch=2)

    with lowbit.verify(model) as proof:
        losses = train(model, 12, autocast=False, control=control)

    assert all(map(math.isfinite, losses))
    assert proof.rows


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["dfq", "fractrain"])
def test_gates_choose(name: str, autocast: bool) -> None:
    """Blocks whose samples run at bits of their own train there, gates and all."""
    torch.manual_seed(0)
    model = ResNet(depths=(2, 2), width=8, classes=8)
    lowbit.convert_(model, name)
    model.to(DEVICE)
    blocks = [re.compile(r"groups\.\d\.\d")]
    control = lowbit.PrecisionController.from_recipe(model, total_steps=64, steps_per_epoch=2, blocks=blocks)
    assert control.gates is not None
    before = [p.detach().clone() for p in control.gates.parameters()]

    losses = train(model, 10, autocast=autocast, control=control)

    assert all(map(math.isfinite, losses))
    assert all(p.device.type == DEVICE for p in control.gates.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(control.gates.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["sbm8", "int8", "sbm8-cpt"])
def test_state_moves_between_devices(name: str) -> None:
    """What was saved there loads on the CPU and there, with the same values and the same clock."""
    model = network()
    lowbit.convert_(model, name)
    model.to(DEVICE)
    train(model, 3, autocast=False)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "lowbit": lowbit.state_dict(model)}, file)
    outputs = []
    for device in ("cpu", DEVICE):
        file.seek(0)
        saved = torch.load(file, map_location=device, weights_only=True)
        again = network()
        lowbit.convert_(again, name)
        again.load_state_dict(saved["model"])
        lowbit.load_state_dict(again, saved["lowbit"])
        again.to(DEVICE)
        outputs.append(train(again, 2, autocast=False))
    outputs.append(train(model, 2, autocast=False))

    for losses in outputs[:2]:
        assert losses == pytest.approx(outputs[2], rel=1e-3)


def test_tools_work_there() -> None:
    """A meter counts, a probe measures, and a range test runs on a model that lies on the device."""
    model = network()
    lowbit.convert_(model, "w8a8g8", engine="reference")
    model.to(DEVICE)
    x, y = data()
    with lowbit.Meter(model) as meter:
        train(model, 2, autocast=False)
    found = lowbit.probe(model, [(x, y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), bits=(3, 6))

    assert str(meter)
    assert found.suggest(0.5)
