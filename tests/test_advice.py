"""Advice: what is timed, what is left alone, and that only whole steps decide."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.advice import Advice, Timed, Trial, Variant, mean_square


def mlp() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def cnn() -> nn.Module:
    """A convolution with batch normalisation and a change in place."""
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 4))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def advice() -> Advice:
    """That of a small network of convolutions."""
    return lowbit.advise(cnn(), torch.randn(4, 3, 8, 8), seconds=0.2)


def test_every_variant_is_timed(advice: Advice) -> None:
    """Plain and each recipe, with and without autocast, in both memory formats."""
    wanted = {
        Variant(recipe=recipe, autocast=autocast, channels_last=last)
        for recipe in (None, "int8", "sbm8")
        for autocast in (False, True)
        for last in (False, True)
    }

    assert {t.variant for t in advice.timed} == wanted


def test_the_fastest_comes_first(advice: Advice) -> None:
    """Variants stand in the order of their times, and fp32 as it is has speed 1."""
    times = [t.ms for t in advice.timed]

    assert times == sorted(times)
    assert next(t.to_fp32 for t in advice.timed if t.variant == Variant()) == 1


def test_a_model_without_images_has_one_memory_format() -> None:
    """Channels last are tried only where a parameter has four axes."""
    found = lowbit.advise(mlp(), torch.randn(4, 32), recipes=["int8"], seconds=0.1)

    assert len(found.timed) == 4
    assert not any(t.variant.channels_last for t in found.timed)


def test_the_model_is_left_as_it_is() -> None:
    """Parameters, buffers, gradients, mode and torch's random state are those of before."""
    model = cnn().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()

    lowbit.advise(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), seconds=0.1)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("batch", [(torch.ones(2, 32),), {"input": torch.ones(2, 32)}, torch.ones(2, 32)])
def test_a_batch_is_a_tensor_arguments_or_keywords(batch: Any) -> None:
    """All three ways of giving the input run."""
    assert lowbit.advise(mlp(), batch, recipes=["int8"], seconds=0.1).timed


def test_a_loss_of_ones_own_is_taken() -> None:
    """The function gets the model's output."""
    seen: list[torch.Size] = []

    def loss(output: Tensor) -> Tensor:
        seen.append(output.shape)
        return output.abs().sum()

    lowbit.advise(mlp(), torch.ones(2, 32), loss=loss, recipes=["int8"], seconds=0.1)

    assert set(seen) == {torch.Size((2, 8))}


def test_the_loss_that_a_model_gives_is_taken() -> None:
    """An output with a loss needs no other, and nested outputs are summed up."""
    one = torch.ones(3, requires_grad=True)

    assert mean_square(SimpleNamespace(loss=one.sum())) == 3
    assert mean_square({"a": 2 * one, "b": (one, torch.ones(1, dtype=torch.int64))}) == 5


def _timed(variant: Variant, ms: float) -> Timed:
    return Timed(variant=variant, ms=ms, to_fp32=10 / ms, to_bf16=5 / ms, rounds=3)


PLAIN, BF16, INT8 = Variant(), Variant(autocast=True), Variant(recipe="int8", autocast=True)


def test_a_gain_within_noise_is_none() -> None:
    """A recipe that is 1 % faster than bf16 is not advised; one that is 20 % faster is."""
    bases = (_timed(BF16, 5.0), _timed(PLAIN, 10.0))

    close = Advice(timed=(_timed(INT8, 4.95), *bases), shares=(), trials=())
    clear = Advice(timed=(_timed(INT8, 4.0), *bases), shares=(), trials=())

    assert (close.fastest, clear.fastest) == (BF16, INT8)
    assert "No recipe gains more than 2 %" in str(close)
    assert "No recipe" not in str(clear)
    assert "convert_" not in close.code
    assert 'lowbit.convert_(model, "int8")' in clear.code


def test_only_a_faster_step_makes_a_rule() -> None:
    """A layer that is slower alone is left plain only if the whole step is faster without it."""
    bases = (_timed(INT8, 4.0), _timed(BF16, 5.0), _timed(PLAIN, 10.0))
    trials = (Trial(layers=("0", "2"), speed=1.1), Trial(layers=("4",), speed=0.7))

    found = Advice(timed=bases, shares=(), trials=trials)

    assert found.rules == [("0", None), ("2", None)]
    assert "rules=[('0', None), ('2', None)]" in found.code
    assert "Leave 0, 2 plain" in str(found)
    assert "4: slower alone, but the whole step without them converted is 0.70 times as fast" in str(found)


def test_the_time_of_layers_is_there(advice: Advice) -> None:
    """Layers have the types that they had before, and a time in both variants."""
    shares = {share.name: share for share in advice.shares}

    assert (shares["0"].type, shares["4"].type) == ("Conv2d", "Linear")
    assert min(shares["0"].ms, shares["0"].plain_ms) > 0


def test_advice_is_plain_values_and_html(advice: Advice) -> None:
    """JSON holds the variants and the lines of code; a notebook gets tables."""
    data = json.loads(advice.to_json())

    assert len(data["timed"]) == len(advice.timed)
    assert data["code"] == advice.code
    assert "<table>" in advice._repr_html_()


def test_what_cannot_be_advised_is_refused() -> None:
    """Each refusal says what to do."""
    converted = mlp()
    lowbit.convert_(converted, "int8")

    with pytest.raises(lowbit.UsageError, match=r"converted already: lowbit.restore_\(model\) first"):
        lowbit.advise(converted, torch.ones(2, 32))
    with pytest.raises(lowbit.UsageError, match="no parameter of this model needs a gradient"):
        lowbit.advise(mlp().requires_grad_(False), torch.ones(2, 32))
    with pytest.raises(lowbit.UsageError, match="seconds=0 must be a positive number"):
        lowbit.advise(mlp(), torch.ones(2, 32), seconds=0)
    with pytest.raises(lowbit.UsageError, match="only the CPU is timed"):
        lowbit.advise(mlp().to("meta"), torch.ones(2, 32))
    with pytest.raises(lowbit.UsageError, match="give loss="):
        mean_square("text")
    with pytest.raises(lowbit.UsageError, match="unknown recipe"):
        lowbit.advise(mlp(), torch.ones(2, 32), recipes=["int9"])
