"""Quantised multi-head attention: the plain layer's results, in every way that layer can be called."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.products import watch

B, L, S, E, H = 3, 5, 7, 8, 2


def _pair(recipe: str = "fp32", **options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """A plain layer and its converted copy."""
    plain = nn.MultiheadAttention(E, H, **options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    converted = copy.deepcopy(plain)
    lowbit.convert_(converted, recipe)
    return plain, converted


def _inputs(*, batch_first: bool, key: int = E, value: int = E) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, L, E), torch.randn(B, S, key), torch.randn(B, S, value)
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


def _assert_equal(plain: nn.Module, converted: nn.Module, *args: Tensor, **kwargs: Any) -> None:
    """Outputs, attention weights and gradients of all parameters agree to float32 rounding."""
    results = []
    for layer in (plain, converted):
        out, weights = layer(*args, **kwargs)
        layer.zero_grad()
        out.square().sum().backward()
        results.append([out, weights, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 4},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
def test_it_equals_the_plain_layer(batch_first: bool, need_weights: bool, options: dict[str, Any]) -> None:
    """With the fp32 recipe, every option of the layer gives the plain layer's results."""
    plain, converted = _pair(batch_first=batch_first, **options)
    inputs = _inputs(batch_first=batch_first, key=options.get("kdim", E), value=options.get("vdim", E))

    _assert_equal(plain, converted, *inputs, need_weights=need_weights)


def _causal() -> Tensor:
    return torch.ones(L, S, dtype=torch.bool).triu(1)


def _padding() -> Tensor:
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, -2:] = True
    return mask


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {"attn_mask": _causal()},
        {"attn_mask": torch.zeros(L, S).masked_fill_(_causal(), -1e4)},
        {"attn_mask": _causal().expand(B * H, L, S)},
        {"key_padding_mask": _padding()},
        {"attn_mask": _causal(), "key_padding_mask": _padding()},
        {"attn_mask": _causal(), "is_causal": True},
    ],
    ids=["causal", "float", "per head", "padding", "both", "hint"],
)
def test_masks_equal_the_plain_layers(need_weights: bool, extra: bool, masks: dict[str, Any]) -> None:
    """Boolean and float masks, per head and of padding, hide what they hide in the plain layer."""
    plain, converted = _pair(batch_first=True, add_bias_kv=extra, add_zero_attn=extra)

    if masks.get("is_causal") and not need_weights:
        masks = masks | {"is_causal": False}  # the plain layer then trusts the hint and ignores the mask's shape

    _assert_equal(plain, converted, *_inputs(batch_first=True), need_weights=need_weights, **masks)


def test_an_unbatched_call_equals_the_plain_layer() -> None:
    """Inputs without the axis of samples give results without it."""
    plain, converted = _pair()

    _assert_equal(plain, converted, torch.randn(L, E), torch.randn(S, E), torch.randn(S, E))


def test_weights_per_head_equal_the_plain_layers() -> None:
    """Attention weights that are not averaged have their axis of heads."""
    plain, converted = _pair(batch_first=True)

    _assert_equal(plain, converted, *_inputs(batch_first=True), average_attn_weights=False)


def test_dropout_is_that_of_the_training_mode() -> None:
    """In training dropout changes the result from call to call, in evaluation it does not."""
    _, converted = _pair(batch_first=True, dropout=0.5)
    inputs = _inputs(batch_first=True)

    assert not torch.equal(converted(*inputs)[0], converted(*inputs)[0])
    converted.eval()
    assert torch.equal(converted(*inputs)[0], converted(*inputs)[0])


def test_a_quantised_layer_is_close_and_not_equal() -> None:
    """Eight bits change the output a little."""
    plain, converted = _pair("sbm8", batch_first=True)
    inputs = _inputs(batch_first=True)

    expected, actual = plain(*inputs)[0], converted(*inputs)[0]

    assert not torch.equal(expected, actual)
    assert (actual - expected).norm() < 0.2 * expected.norm()


def test_a_mask_of_the_wrong_shape_is_refused() -> None:
    """The message says what was given and what is expected."""
    _, converted = _pair(batch_first=True)

    with pytest.raises(ValueError, match=r"attn_mask of shape \(5, 5\): expected \(5, 7\)"):
        converted(*_inputs(batch_first=True), attn_mask=torch.zeros(L, L))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \(3, 5\): expected \(3, 7\)"):
        converted(*_inputs(batch_first=True), key_padding_mask=torch.zeros(B, L))


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_calls_every_projection(training: bool) -> None:
    """All six products of a TransformerEncoderLayer run quantised, in training and in evaluation without gradients."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2, enable_nested_tensor=not training
    ).train(training)
    lowbit.convert_(encoder, "sbm8")
    seen: list[str] = []

    with watch.observed_by(lambda run: seen.append(run.layer)), torch.set_grad_enabled(training):
        encoder(torch.randn(B, S, E), src_key_padding_mask=_padding())

    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert seen == [f"layers.{i}.{name}" for i in range(2) for name in names]


def test_verify_lists_what_attention_does_outside() -> None:
    """The products of queries, keys and values are listed with their MACs; the projections are rows."""
    _, converted = _pair("sbm8", batch_first=True)

    with lowbit.verify(converted) as proof:
        converted(*_inputs(batch_first=True), need_weights=False)[0].sum().backward()

    assert {row.layer for row in proof.rows} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert sum(row.macs or 0 for row in proof.outside) >= 2 * B * L * S * E


def test_restore_gives_the_plain_layer_back() -> None:
    """The restored layer's output is bit-identical to the plain one's."""
    plain, converted = _pair("sbm8", batch_first=True)
    lowbit.restore_(converted)
    inputs = _inputs(batch_first=True)

    assert type(converted) is nn.MultiheadAttention
    assert torch.equal(plain(*inputs)[0], converted(*inputs)[0])


@pytest.mark.parametrize("recipe", ["fp32", "int8-attention"])
@pytest.mark.parametrize(("queries", "samples"), [(0, 3), (4, 0)])
def test_empty_inputs_have_empty_outputs(recipe: str, queries: int, samples: int) -> None:
    """No queries, or no samples, give the plain layer's shape, and a backward gives zeros."""
    plain, converted = _pair(recipe, batch_first=True)
    q, k = torch.randn(samples, queries, E), torch.randn(samples, S, E)

    out, _ = converted(q, k, k, need_weights=False)
    out.sum().backward()

    assert out.shape == plain(q, k, k, need_weights=False)[0].shape
    assert all(p.grad is None or not p.grad.any() for p in converted.parameters())


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(0, S), (4, 0)])
@pytest.mark.parametrize("heads", [(), (3 * H,)])
def test_a_mask_without_places_is_taken(heads: tuple[int, ...], queries: int, keys: int, need_weights: bool) -> None:
    """A mask for no queries, or no keys, of all heads or of each, gives an output of the layer's shape."""
    _, converted = _pair("fp32", batch_first=True)
    q, k = torch.randn(3, queries, E), torch.randn(3, keys, E)

    out, _ = converted(q, k, k, attn_mask=torch.zeros(*heads, queries, keys), need_weights=need_weights)

    assert out.shape == q.shape
