import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import UsageError
from lowbit.nn.frozen import FrozenLinear, FrozenWeight

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


class Adapted(nn.Module):
    """A frozen stack with a trained side path, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
        self.down, self.up = nn.Linear(24, 4, bias=False), nn.Linear(4, 24, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Both paths, twice, so that the frozen layers have to give gradients of their input."""
        for _ in range(2):
            x = self.base(x) + self.up(self.down(x))
        return x


def adapted(recipe: str, engine: str = "reference") -> Adapted:
    """A converted one."""
    model = Adapted()
    lowbit.convert_(model, recipe, engine=engine)
    return model


def step(model: nn.Module) -> list[Tensor]:
    """Output and gradients of a training step."""
    model.zero_grad()
    y = model(X)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("recipe", ["int8", "sbm8"])
def test_a_frozen_layer_is_the_layer_of_its_values(recipe: str, engine: str) -> None:
    """Output and gradients are those of a model with the weights q * S, bit for bit."""
    frozen, float_ = adapted(recipe, engine), adapted(recipe, engine)
    reasons = lowbit.freeze_(frozen)
    float_.load_state_dict(frozen.state_dict())
    lowbit.load_state_dict(float_, lowbit.state_dict(frozen))

    assert reasons == {"base.0": "", "base.2": "", "down": "its weight trains", "up": "its weight trains"}
    assert all(torch.equal(a, b) for a, b in zip(step(frozen), step(float_), strict=True))


@pytest.mark.parametrize("recipe", ["int8", "sbm8"])
def test_freezing_does_not_change_the_output(recipe: str) -> None:
    """The codes are those that `output` had before: to 1e-6. The weights themselves are rounded."""
    model = adapted(recipe)
    twin = copy.deepcopy(model)
    lowbit.freeze_(twin)
    y, z = model(X), twin(X)

    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.base[0].weight, twin.state_dict()["base.0.weight"])


def test_the_weight_takes_a_quarter_of_its_bytes() -> None:
    """One byte a weight, four for each row; nothing float of this size is kept, for the backward neither."""
    model = adapted("int8")
    lowbit.freeze_(model)
    layer = model.base[0]
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(X.clone().requires_grad_())
    held = {t.shape for t in kept if t.is_floating_point()}

    assert sum(t.numel() * t.element_size() for t in layer.buffers() if t.shape[:1] == (32,)) == 32 * 24 + 32 * 4
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert (32, 24) not in held
    assert (24, 32) not in held
    assert y.requires_grad


def test_the_proof_sees_its_products() -> None:
    """`output` and `grad_input` of frozen layers ran in 8 bits, and `grad_weight` did not."""
    model = adapted("int8")
    lowbit.freeze_(model)
    with lowbit.verify(model) as proof:
        step(model)

    assert {row.product for row in proof.rows if row.layer == "base.0"} == {"output", "grad_input"}
    assert all(bits == (8, 8) for row in proof.rows for bits in [tuple(o.bits for o in row.operands.values())])


def test_values_give_the_same_codes_again() -> None:
    """Of 20,000 rows, codes and scales of q * S are q and S, bit for bit."""
    first = FrozenWeight(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)))
    again = FrozenWeight(first.values())

    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scale, again.scale)


def test_the_way_back_gives_the_values_that_ran() -> None:
    """`thaw_` and `restore_` give parameters with the keys, order and values of the state."""
    model, keys = adapted("int8"), list(Adapted().state_dict())
    lowbit.freeze_(model)
    saved = model.state_dict()
    assert sorted(saved) == sorted(keys)
    lowbit.thaw_(model)

    assert type(model.base[0]).__name__ == "QuantLinear"
    assert torch.equal(model.base[0].weight, saved["base.0.weight"])
    assert not model.base[0].weight.requires_grad
    lowbit.freeze_(model)
    lowbit.restore_(model)
    assert type(model.base[0]) is nn.Linear
    assert torch.equal(model.base[0].weight, saved["base.0.weight"])


def test_a_saved_state_loads_exactly() -> None:
    """Into a frozen model of other weights; missing and unexpected keys are found as ever."""
    model, other = adapted("int8"), adapted("int8")
    with torch.no_grad():
        other.base[0].weight.mul_(3)
    for each in (model, other):
        lowbit.freeze_(each)
    other.load_state_dict(model.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    state = model.state_dict()
    del state["base.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*base\.0\.weight"):
        other.load_state_dict(state)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_frozen_too(way: object) -> None:
    """They give the same step."""
    model = adapted("int8")
    lowbit.freeze_(model)
    twin = way(model)  # type: ignore[operator]

    assert isinstance(twin.base[0], FrozenLinear)
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(twin), strict=True))


def test_scales_keep_their_digits_in_other_dtypes() -> None:
    """`model.bfloat16()` casts what trains, and neither codes nor scales."""
    model = adapted("int8")
    lowbit.freeze_(model)
    before = model.base[0].frozen.values()
    model.bfloat16()

    assert torch.equal(before, model.base[0].frozen.values())
    assert model.up.weight.dtype == torch.bfloat16


def test_the_weight_of_a_frozen_layer_is_not_there_to_change() -> None:
    """What would be written to it would be lost: it says what to do."""
    model = adapted("int8")
    lowbit.freeze_(model)

    with pytest.raises(UsageError, match=r"base\.0: its weight is kept as codes: call lowbit\.thaw_"):
        model.base[0].weight.data.add_(1)


@pytest.mark.parametrize("recipe", ["mxint8", "w4a4g8", "cpt-int8"])
def test_other_recipes_are_refused(recipe: str) -> None:
    """The codes would not be what the layer multiplies by."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    lowbit.convert_(model, recipe, engine="reference")

    with pytest.raises(UsageError, match=r"no weight can be kept as codes.*does not round it to"):
        lowbit.freeze_(model)


def test_tied_and_trained_weights_stay() -> None:
    """A weight that another module has too would be there twice."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)}).requires_grad_(False)
    model["b"].weight = model["a"].weight
    lowbit.convert_(model, "int8", engine="reference")

    assert lowbit.freeze_(model) == {
        "a": "other modules share its weight",
        "b": "other modules share its weight",
        "c": "",
    }
    with pytest.raises(UsageError, match="no weight in this model"):
        lowbit.thaw_(nn.Linear(2, 2))
