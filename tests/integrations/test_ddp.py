"""DDP and FSDP2 with two gloo processes on this machine: equal to one process, and gradients in 8 bits."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowbit
from lowbit import UsageError
from lowbit.integrations.ddp import Int8AllReduce, average_ranges_

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

# One script for both processes; what it finds is printed as JSON.
RANK = """
import copy, io, json, os, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import lowbit
from lowbit.integrations import RunState
from lowbit.integrations.ddp import Int8AllReduce, average_ranges_

rank, meet = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + meet, rank=rank, world_size=2)
X = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
found = {}

def network(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    lowbit.convert_(model, recipe, engine="reference", seed=3)
    return model

def gradient(recipe, world, steps=1):
    model = network(recipe)
    call = DistributedDataParallel(model) if world == 2 else model
    half = X.chunk(2)[rank] if world == 2 else X
    total = 0
    for _ in range(steps):
        model.zero_grad()
        call(half).square().mean().backward()
        total = total + torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    return total / steps

def relative(a, b):
    return float((a - b).norm() / b.norm())

exact = gradient("fp32", 1)
found["fp32"] = relative(gradient("fp32", 2), exact)
found["one"] = relative(gradient("sbm8", 2), exact)
found["many"] = relative(gradient("sbm8", 2, steps=40), gradient("sbm8", 1, steps=40))

# Gradients in 8 bits.
def run(steps, resume=None, exchange=True, meter=None):
    model = network("int8")
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hook = Int8AllReduce(ddp, meter=meter) if exchange else None
    state = RunState(ddp)
    first = 0
    if resume is not None:
        resume.seek(0)
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.load_state_dict(saved["lowbit"])
        hook.load_state_dict(saved["exchange"])
        first = 3
    for t in range(first, steps):
        x = torch.randn(32, 40, generator=torch.Generator().manual_seed(10 + t)).chunk(2)[rank]
        ddp(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if meter is not None:
            meter.step()
        if t == 2 and steps == 3:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "lowbit": state.state_dict(), "exchange": hook.state_dict()}, file)
            return file
    return torch.cat([p.detach().flatten() for p in model.parameters()])

whole = run(6)
plain = run(6, exchange=False)
resumed = run(6, resume=run(3))
gathered = [torch.empty_like(whole) for _ in range(2)]
dist.all_gather(gathered, whole)
found["replicas_equal"] = torch.equal(*gathered)
found["as_plain"] = relative(whole, plain)
found["resumed"] = torch.equal(whole, resumed)

# The same gradient in every step: with error feedback, sums differ by the rounding of one step, not of all.
class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4096))
        self.b = nn.Parameter(torch.zeros(10))
    def forward(self, g):
        return (self.w * g).sum() + self.b.sum() * (rank + 1)

own = torch.randn(4096, generator=torch.Generator().manual_seed(rank))
every = [torch.empty_like(own) for _ in range(2)]
dist.all_gather(every, own)
mean = torch.stack(every).mean(0)
ddp = DistributedDataParallel(Fixed())
hook = Int8AllReduce(ddp)
total, errors = torch.zeros(4096), []
for t in range(20):
    ddp.zero_grad()
    ddp(own).backward()
    total += ddp.module.w.grad
    errors.append(float((total - (t + 1) * mean).abs().max()))
found["errors"] = [errors[0], errors[-1]]
found["step"] = float(own.abs().max() / 127)
found["small"] = ddp.module.b.grad.tolist()
own[5] = float("inf")
ddp.zero_grad()
ddp(own).backward()
found["not_finite"] = int((~ddp.module.w.grad.isfinite()).sum())
own[5] = 0
ddp.zero_grad()
ddp(own).backward()
found["finite_again"] = bool(ddp.module.w.grad.isfinite().all())

model = network("int8")
big = nn.Sequential(nn.Linear(256, 256, bias=False))
lowbit.convert_(big, "int8", engine="reference")
ddp = DistributedDataParallel(big)
with lowbit.Meter(big) as meter:
    Int8AllReduce(ddp, meter=meter)
    for _ in range(2):
        ddp(torch.randn(4, 256)).sum().backward()
        meter.step()
found["sent"] = meter.ledger.sent_bytes
found["in_report"] = "sent for gradients" in str(lowbit.Cost(meter.ledger))

# Ranges.
model = network("sbm8")
ddp = DistributedDataParallel(model)
for _ in range(3):
    ddp((rank + 1) * X).square().mean().backward()
ddp.eval()(X)
found["broadcast"] = [layer.site.running_range.tolist() for layer in model[::2]]
model = network("sbm8")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it, older ones do not
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
for _ in range(3):
    ddp((rank + 1) * X).square().mean().backward()
before = [layer.site.running_range.tolist() for layer in model[::2]]
average_ranges_(ddp)
found["ranges"] = [before, [layer.site.running_range.tolist() for layer in model[::2]]]

# Parameters sharded over both ranks.
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

mesh = init_device_mesh("cpu", (2,))

def shard(model):
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

for recipe in ("fp32", "int8"):
    model, twin = network(recipe), network(recipe)
    shard(model)
    ddp = DistributedDataParallel(twin)
    x = X.chunk(2)[rank]
    for call in (model, ddp):
        call(x).square().mean().backward()
    whole = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    found["sharded " + recipe] = relative(whole, torch.cat([p.grad.flatten() for p in twin.parameters()]))
    found["steps " + recipe] = lowbit.state_dict(model)["groups"][0]["step"]
    lowbit.restore_(model)
    plain = torch.nn.Sequential(*[nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)])
    plain.load_state_dict(twin.state_dict())
    found["restored " + recipe] = torch.allclose(model(x), plain(x), atol=1e-6) and isinstance(model[0], FSDPModule)
    found["class " + recipe] = [type(model[0]).__name__, hasattr(model[0], "site")]
try:
    lowbit.convert_(shard(nn.Sequential(nn.Linear(8, 8))), "int8")
except lowbit.UsageError as error:
    found["refused"] = str(error)
print(json.dumps(found), flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive the group, and the interpreter's end then aborts now and then
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes printed."""
    meet = tmp_path_factory.mktemp("ddp") / "meet"
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", RANK, str(rank), str(meet)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed[0][1] + printed[1][1]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def test_two_processes_in_full_precision_are_one(found: list[dict[str, Any]]) -> None:
    """The averaged gradient of two halves of a batch is that of the batch, to 1e-6."""
    assert all(rank["fp32"] < 1e-6 for rank in found)


def test_two_processes_in_8_bits_are_one_on_average(found: list[dict[str, Any]]) -> None:
    """One gradient of sbm8 differs from full precision, and means of 40 agree within 3 %.

    Ranges are those of each half, so the grids differ a little; a lost factor or rank would differ by 50 %.
    """
    for rank in found:
        assert 1e-4 < rank["one"] < 0.1
        assert rank["many"] < 0.03


def test_replicas_stay_equal(found: list[dict[str, Any]]) -> None:
    """After six steps of 8-bit gradients both ranks have the same weights, close to those of exact averages."""
    for rank in found:
        assert rank["replicas_equal"]
        assert 0 < rank["as_plain"] < 0.02


def test_a_resumed_run_is_the_run_that_was_never_stopped(found: list[dict[str, Any]]) -> None:
    """With what each rank has not sent yet, three steps, a file and three more are six steps bit for bit."""
    assert all(rank["resumed"] for rank in found)


def test_what_rounding_takes_is_given_back(found: list[dict[str, Any]]) -> None:
    """The sum of 20 equal gradients is off by about one step's rounding; without feedback it would be 20 of them."""
    for rank in found:
        first, last = rank["errors"]
        assert first > rank["step"] / 100
        assert last < 2 * rank["step"]


def test_small_parameters_are_averaged_exactly(found: list[dict[str, Any]]) -> None:
    """The mean of 1 and 2 is 1.5."""
    assert all(rank["small"] == [1.5] * 10 for rank in found)


def test_a_gradient_that_is_not_finite_shows_and_passes(found: list[dict[str, Any]]) -> None:
    """An inf on one rank gives nan in its block on all, so that a scaler sees it; the next step is finite again."""
    assert {rank["not_finite"] for rank in found} == {256}
    assert all(rank["finite_again"] for rank in found)


def test_the_ledger_has_the_bytes(found: list[dict[str, Any]]) -> None:
    """Each rank sends 65,536 values each way in halves: codes and 4 bytes a block, a quarter of float32's."""
    each = 256 * 256 // 2 * (1 + 4 / 256)

    for rank in found:
        assert rank["sent"] == 2 * 2 * each
        assert rank["in_report"]


def test_ranges_are_those_of_rank_0_by_default(found: list[dict[str, Any]]) -> None:
    """DDP broadcasts buffers at each forward, so that an evaluation has the same ranges on all ranks."""
    one, two = (rank["broadcast"] for rank in found)

    assert one == two
    assert one[0] == found[0]["ranges"][0][0]


def test_ranges_are_averaged(found: list[dict[str, Any]]) -> None:
    """Without that broadcast, ranks that saw other samples get one range, the mean of theirs."""
    (one, shared), (two, shared_too) = (rank["ranges"] for rank in found)

    assert one != two
    assert shared == shared_too
    for a, b, mean in zip(one, two, shared, strict=True):
        assert mean[1] == pytest.approx((a[1] + b[1]) / 2, rel=1e-6)
        assert mean[2] == a[2]


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_sharded_parameters_give_the_gradients_of_replicas(found: list[dict[str, Any]], recipe: str) -> None:
    """`fully_shard` after the conversion: gradients are those under DDP, to 1e-6, with the same noise."""
    for rank in found:
        assert rank[f"sharded {recipe}"] < 1e-6
        assert rank[f"steps {recipe}"] == 1


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_a_sharded_model_is_restored(found: list[dict[str, Any]], recipe: str) -> None:
    """It computes what the plain model computes, stays sharded, and has nothing of lowbit."""
    for rank in found:
        assert rank[f"restored {recipe}"]
        assert rank[f"class {recipe}"] == ["FSDPLinear", False]


def test_conversion_comes_before_sharding(found: list[dict[str, Any]]) -> None:
    """A sharded model is refused, with the order that works."""
    assert all("convert the plain model first, then shard it" in rank["refused"] for rank in found)


def test_a_model_that_is_not_distributed_is_refused() -> None:
    """There is nothing to exchange."""
    with pytest.raises(UsageError, match="give a DistributedDataParallel"):
        Int8AllReduce(nn.Linear(2, 2))


def test_ranges_of_one_process_stay() -> None:
    """Without a process group there is nothing to average."""
    model = nn.Sequential(nn.Linear(4, 4))
    lowbit.convert_(model, "sbm8", engine="reference")
    model(torch.randn(8, 4))
    before = model[0].site.running_range.clone()
    average_ranges_(model)

    assert torch.equal(before, model[0].site.running_range)
    with pytest.raises(UsageError, match="nothing in this model is converted"):
        average_ranges_(nn.Linear(2, 2))
