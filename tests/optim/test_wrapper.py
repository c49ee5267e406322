"""`LowBitOptimizer`: any optimiser of torch with states in 8 bits and rounded weights."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.errors import RunError, UsageError
from lowbit.methods.update import Update
from lowbit.numerics.formats import BF16, integer
from lowbit.numerics.quantizer import quantize
from lowbit.optim import LowBitOptimizer

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    "amsgrad-foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-3, amsgrad=True, foreach=True),
    "adamw-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=1e-2),
}
BOOKS = ["int8", "dynamic8"]


def problem(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small network whose larger matrix has 8,192 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of some steps on data that their numbers fix."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 64, generator=generator).to(next(model.parameters()).dtype)
        y = (x[:, :10] + x[:, 10:20]).argmax(1)
        loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def saved(content: Any) -> Any:
    """What `torch.load` gives of what `torch.save` wrote, without executing anything."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("states", BOOKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_wrapper_goes_on_bit_for_bit(name: str, states: Any, rounding: Any, dtype: torch.dtype) -> None:
    """5 steps are 3 steps, a saved state in a new wrapper of another seed, and 2 more, bit for bit."""

    def wrapped(model: nn.Module, seed: int) -> LowBitOptimizer:
        inner = OPTIMIZERS[name](list(model.parameters()))
        return LowBitOptimizer(inner, states=states, weights="bf16", rounding=rounding, seed=seed)

    whole = problem(dtype)
    train(whole, wrapped(whole, 1), range(5))
    first = problem(dtype)
    optimizer = wrapped(first, 1)
    train(first, optimizer, range(3))
    content = saved({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second = problem(dtype)
    second.load_state_dict(content["model"])
    optimizer = wrapped(second, 2)
    optimizer.load_state_dict(content["optimizer"])
    train(second, optimizer, range(3, 5))

    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == dtype


@pytest.mark.parametrize("states", BOOKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_falls_as_with_float_states(name: str, states: Any) -> None:
    """Over 60 steps the mean of the last 20 losses is within 5 % of that with float states, but not the same."""
    losses = {}
    for kind in ("fp32", states):
        model = problem()
        optimizer = LowBitOptimizer(OPTIMIZERS[name](list(model.parameters())), states=kind)
        losses[kind] = torch.tensor(train(model, optimizer, range(60)))

    plain, coded = losses["fp32"], losses[states]
    assert plain[-20:].mean() < 0.9 * plain[:5].mean()
    assert abs(coded[-20:].mean() / plain[-20:].mean() - 1) < 0.05
    assert not torch.equal(plain, coded)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float_states_are_the_plain_optimizer(name: str) -> None:
    """With nothing rounded, a step is bit for bit that of the wrapped optimiser."""
    plain, wrapped = problem(), problem()

    train(plain, OPTIMIZERS[name](list(plain.parameters())), range(4))
    train(wrapped, LowBitOptimizer(OPTIMIZERS[name](list(wrapped.parameters())), states="fp32"), range(4))

    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_take_a_quarter_of_the_memory() -> None:
    """Codes and scales of 8,192 weights are 65/256 of float32, small tensors and counters stay as they are."""
    model = problem()
    optimizer = LowBitOptimizer(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, range(2))

    large, small = optimizer.state[model[0].weight], optimizer.state[model[2].weight]
    for name in ("exp_avg", "exp_avg_sq"):
        held = sum(each.nbytes for each in large[name].values() if isinstance(each, Tensor))
        assert held == 8192 * 4 * 65 // 256
        assert small[name].dtype == torch.float32
    assert float(large["step"]) == 2
    assert not optimizer.inner.state


def test_states_of_a_name_may_have_their_own_format() -> None:
    """A dict gives each state its format; a format keeps values on its grid, and what is left out stays."""
    model = problem()
    fmt = integer(bits=4, zero="symmetric")
    optimizer = LowBitOptimizer(
        torch.optim.AdamW(model.parameters()), states={"exp_avg": fmt, "exp_avg_sq": "dynamic8"}
    )
    train(model, optimizer, range(2))

    state = optimizer.state[model[0].weight]
    assert len(state["exp_avg"].unique()) <= 15
    assert set(state["exp_avg_sq"]) == {"codes", "scales", "dtype"}


def test_a_state_that_is_not_there_is_an_error() -> None:
    """A misspelt state is refused at the first step, with the names that there are."""
    model = problem()
    optimizer = LowBitOptimizer(torch.optim.AdamW(model.parameters()), states={"exp_average": "int8"})

    with pytest.raises(RunError, match="no state 'exp_average': its states are exp_avg, exp_avg_sq, step"):
        train(model, optimizer, range(1))


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_weights_lie_on_their_grid(weights: Any) -> None:
    """After steps the weights are numbers of the format, and updates below half a step still move them."""
    model = problem()
    before = model[0].weight.detach().clone()
    optimizer = LowBitOptimizer(torch.optim.SGD(model.parameters(), lr=1e-5), weights=weights)
    train(model, optimizer, range(3))

    weight = model[0].weight.detach()
    fmt, dims = (BF16, None) if weights == "bf16" else (integer(bits=8, zero="symmetric"), (1,))
    torch.testing.assert_close(quantize(weight, fmt, dims=dims).values, weight, rtol=1e-6, atol=0)
    assert not torch.equal(weight, before)
    assert not torch.equal(quantize(before, fmt, dims=dims).values, weight)


def test_bfloat16_parameters_round_stochastically() -> None:
    """The mean of many weights moves by updates of 1/64 of a step, which bfloat16 by itself would lose.

    It lies within 5 standard errors (false alarm < 1e-6): one weight has a variance of p (1 - p) steps squared.
    """
    count, steps = 100_000, 4
    p = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    lost = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = LowBitOptimizer(torch.optim.SGD([p], lr=2.0**-13), weights="bf16")
    plain = torch.optim.SGD([lost], lr=2.0**-13)
    for _ in range(steps):
        p.grad, lost.grad = -torch.ones_like(p), -torch.ones_like(lost)
        optimizer.step()
        plain.step()

    moved, step = float((p.detach().double() - 1).mean()), 2.0**-7
    expected = steps * 2.0**-13
    assert bool((lost == 1).all())
    assert abs(moved - expected) < 5 * step * (steps / 64 / count) ** 0.5


def test_closures_schedulers_and_groups_work() -> None:
    """The closure is called once with gradients, a scheduler moves every group, and a group may come later."""
    model = problem()
    optimizer = LowBitOptimizer(torch.optim.AdamW([{"params": model[0].parameters()}], lr=1e-2))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-3})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    before = model[2].weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 64)).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    loss = optimizer.step(closure)
    scheduler.step()

    assert calls == [loss]
    assert [group["lr"] for group in optimizer.inner.param_groups] == [5e-3, 5e-4]
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert not torch.equal(before, model[2].weight)


def test_a_copy_goes_on_as_the_original() -> None:
    """A deep copy of model and optimiser makes the same steps."""
    model = problem()
    optimizer = LowBitOptimizer(torch.optim.AdamW(model.parameters()), weights="bf16")
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))

    train(model, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))

    assert torch.equal(model[0].weight, twin[0].weight)
    assert model[0].weight is not twin[0].weight


def test_states_that_were_there_before_are_taken_over() -> None:
    """An optimiser that made steps is wrapped with its states."""
    model = problem()
    inner = torch.optim.AdamW(model.parameters())
    train(model, inner, range(2))
    state = copy.deepcopy(inner.state[model[0].weight])

    optimizer = LowBitOptimizer(inner, states={"exp_avg_sq": "int8"})

    kept = optimizer.state[model[0].weight]
    assert float(kept["step"]) == 2
    assert torch.equal(kept["exp_avg"], state["exp_avg"])
    assert kept["exp_avg_sq"]["codes"].dtype == torch.uint8


class Counting(torch.optim.SGD):
    """An optimiser that counts its steps in its group, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        """One step whose rate is the number of steps."""
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_changes_its_own_settings_steps_at_once() -> None:
    """It is refused one by one, and counts right with all states decoded at once."""
    model = problem()
    one_by_one = LowBitOptimizer(Counting(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), states="int8")
    one_by_one.param_groups[0]["k"] = 0
    with pytest.raises(RunError, match=r"changes its own k in a step.*at_once=True"):
        train(model, one_by_one, range(1))

    optimizer = LowBitOptimizer(Counting(model.parameters(), lr=0.1, momentum=0.9), at_once=True)
    optimizer.param_groups[0]["k"] = 0
    train(model, optimizer, range(3))

    assert optimizer.param_groups[0]["k"] == 3


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_extreme_gradients_keep_weights_finite(value: float) -> None:
    """All-zero, tiny and huge gradients neither divide by zero nor overflow."""
    for states in BOOKS:
        p = nn.Parameter(torch.ones(5000))
        optimizer = LowBitOptimizer(torch.optim.SGD([p], lr=1e-32, momentum=0.9), states=states)
        for _ in range(3):
            p.grad = torch.full_like(p, value)
            optimizer.step()
        assert bool(p.isfinite().all())


def test_a_nan_gradient_surfaces() -> None:
    """The block with a nan in its state gives nan in the next step, and others do not."""
    p = nn.Parameter(torch.ones(5120))
    optimizer = LowBitOptimizer(torch.optim.SGD([p], lr=0.1, momentum=0.9))
    p.grad = torch.ones_like(p)
    p.grad[0] = torch.nan
    optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()

    assert bool(p[:256].isnan().all())
    assert bool(p[256:].isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: LowBitOptimizer(torch.optim.LBFGS([p])), "one state for all parameters"),
        (lambda p: LowBitOptimizer(torch.optim.AdamW([p], capturable=True)), "capturable=True"),
        (lambda p: LowBitOptimizer(torch.optim.AdamW([p], differentiable=True)), "differentiable=True"),
        (lambda p: LowBitOptimizer(torch.optim.SGD([p]), states="int4"), "'int4'"),
        (lambda p: LowBitOptimizer(torch.optim.SGD([p]), weights="int4"), "'int4'"),
        (lambda p: LowBitOptimizer(torch.optim.SGD([p]), weights="bf16", update=Update()), "one of them"),
        (
            lambda p: LowBitOptimizer(torch.optim.SGD([nn.Parameter(p.bfloat16())]), weights="int8"),
            "float32 parameters",
        ),
        (lambda p: LowBitOptimizer(LowBitOptimizer(torch.optim.SGD([p]))), "already"),
        (lambda p: LowBitOptimizer(torch.optim.SGD([p]), block=1), "block=1"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    """One sentence says why."""
    with pytest.raises(UsageError, match=message):
        make(nn.Parameter(torch.ones(4, 4)))


def test_sparse_gradients_are_refused() -> None:
    """The message says how to get dense ones."""
    layer = nn.Embedding(10, 4, sparse=True)
    layer(torch.tensor([1])).sum().backward()

    with pytest.raises(RunError, match="sparse=False"):
        LowBitOptimizer(torch.optim.SGD(layer.parameters())).step()


def test_foreign_states_are_refused() -> None:
    """The state of a plain optimiser, of other settings, and one with damaged codes do not load."""
    model = problem()
    optimizer = LowBitOptimizer(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    damaged = copy.deepcopy(state)
    damaged["state"][0]["exp_avg"]["scales"] = torch.ones(3)

    with pytest.raises(UsageError, match="not the state of a LowBitOptimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(UsageError, match="same settings"):
        LowBitOptimizer(torch.optim.AdamW(model.parameters()), states="dynamic8").load_state_dict(state)
    with pytest.raises(UsageError, match="exp_avg of parameter 0"):
        optimizer.load_state_dict(damaged)


def test_the_package_has_it() -> None:
    """`lowbit.optim` is there after `import lowbit`."""
    assert lowbit.optim.LowBitOptimizer is LowBitOptimizer


@pytest.mark.parametrize("states", ["fp32", *BOOKS])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_loss_gives_the_same_steps(name: str, states: Any) -> None:
    """A GradScaler's power of two changes no bit of float32 weights and states, and an overflow leaves a step out."""
    plain, scaled = problem(), problem()
    train(plain, LowBitOptimizer(OPTIMIZERS[name](list(plain.parameters())), states=states), range(4))
    optimizer = LowBitOptimizer(OPTIMIZERS[name](list(scaled.parameters())), states=states)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in (0, 1, None, 2, 3):  # None: a step whose gradients overflow
        generator = torch.Generator().manual_seed(step or 0)
        x = torch.randn(64, 64, generator=generator)
        y = (x[:, :10] + x[:, 10:20]).argmax(1)
        loss = F.cross_entropy(scaled(x), y)
        optimizer.zero_grad()
        scaler.scale(loss if step is not None else loss * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()

    assert scaler.get_scale() == 2.0**9
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)
