"""The three products against torch's own and against dense products of operands that the test quantises itself."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowbit
from helpers import recipe_of, threads
from lowbit import UsageError, functional
from lowbit.methods.recipe import SLOTS, GradWeight, Recipe
from lowbit.numerics.formats import BF16, FP32, integer
from lowbit.numerics.rounding import CounterNoise, RecordedNoise, step_key
from lowbit.products import watch
from lowbit.products.operators import Convolution, Linear, Matmul, Op
from lowbit.products.setting import Setting, slot_of
from lowbit.products.watch import ProductRun

PLAIN = Setting(recipe=Recipe.from_name("fp32"))
SYMMETRIC = integer(bits=4, zero="symmetric")
STOCHASTIC = integer(bits=4, zero="symmetric", rounding="stochastic")
# A weight has no samples.
PER_TENSOR_WEIGHT = {"output__weight": SYMMETRIC, "grad_input__weight": SYMMETRIC}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def _grid(
    x: Tensor, *, view: tuple[int, ...] | None = None, dims: tuple[int, ...], bits: int = 4, u: Tensor | None = None
) -> Tensor:
    """`x` on the symmetric grid, written from the definition: one scale for what `dims` of `view` span."""
    v = x.reshape(view or x.shape)
    top = 2 ** (bits - 1) - 1
    scale = v.abs().amax(dims, keepdim=True) / top
    t = v / scale
    q = t.round() if u is None else t.floor() + (u.reshape(v.shape) < t - t.floor())
    return (q.clamp(-top, top) * scale).reshape(x.shape)


def _gradients(call: Callable[..., Tensor], g: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The result of `call` and its gradients for an incoming `g`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, g))


def _assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TIGHT)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def runs() -> Iterator[list[ProductRun]]:
    """Every product that runs during the test."""
    seen: list[ProductRun] = []
    with watch.observed_by(seen.append):
        yield seen


class TestPlain:
    """Without quantisation, everything equals torch's own operators."""

    @pytest.mark.parametrize("leading", [(), (5,), (1,), (0,), (2, 3), (2, 1, 3, 2)])
    @pytest.mark.parametrize("has_bias", [True, False])
    def test_linear(self, leading: tuple[int, ...], has_bias: bool) -> None:
        """Linear equals torch's for inputs of 1 to 4 axes, with and without bias."""
        tensors = [_randn(*leading, 7), _randn(3, 7), *([_randn(3)] if has_bias else [])]
        g = _randn(*leading, 3)

        actual = _gradients(lambda *t: functional.linear(*t, setting=PLAIN), g, *tensors)

        _assert_same(actual, _gradients(F.linear, g, *tensors))

    def test_linear_of_a_strided_input(self) -> None:
        """A transposed input and an expanded gradient give what torch gives."""
        x, w = _randn(7, 4, 5).transpose(0, 2), _randn(3, 7)
        g = _randn(1, 1, 3).expand(5, 4, 3)

        actual = _gradients(lambda *t: functional.linear(*t, setting=PLAIN), g, x, w)

        _assert_same(actual, _gradients(F.linear, g, x, w))

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ((3, 4), (4, 5)),
            ((2, 3, 4), (2, 4, 5)),
            ((2, 3, 4), (4, 5)),
            ((3, 4), (2, 4, 5)),
            ((2, 1, 3, 4), (6, 4, 5)),
            ((0, 3, 4), (0, 4, 5)),
            ((2, 3, 0), (2, 0, 5)),
        ],
    )
    def test_matmul(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        """Matrix products equal torch's, also where leading axes broadcast or are empty."""
        x, w = _randn(*left), _randn(*right)
        g = _randn(*torch.matmul(x, w).shape)

        actual = _gradients(lambda *t: functional.matmul(*t, setting=PLAIN), g, x, w)

        _assert_same(actual, _gradients(torch.matmul, g, x, w))

    def test_matmul_refuses_vectors(self) -> None:
        """A vector has no rows to quantise and is refused with both shapes."""
        with pytest.raises(UsageError, match=r"\(4,\) and \(4, 5\)"):
            functional.matmul(_randn(4), _randn(4, 5), setting=PLAIN)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_convolution(self, data: st.DataObject) -> None:
        """Convolutions of 1 to 3 axes equal torch's for any groups, stride, dilation, padding, kernel and layout."""
        axes = data.draw(st.integers(1, 3), "axes")
        groups = data.draw(st.integers(1, 3), "groups")
        inputs, outputs = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
        each = st.lists(st.integers(1, 2), min_size=axes, max_size=axes).map(tuple)
        stride, dilation = data.draw(each, "stride"), data.draw(each, "dilation")
        kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(axes))
        padding = data.draw(st.one_of(st.sampled_from(["valid", "same"]), each), "padding")
        stride = (1,) * axes if padding == "same" else stride
        size = tuple(data.draw(st.integers(5, 7)) for _ in range(axes))
        batch = data.draw(st.sampled_from([(), (0,), (1,), (2,)]), "batch")
        last = data.draw(st.booleans(), "channels last")
        x, w, b = _randn(*batch, inputs, *size), _randn(outputs, inputs // groups, *kernel), _randn(outputs)
        if last and batch and axes > 1:
            x = x.to(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)
        function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        zeros_after = padding == "same" and any(d * (k - 1) % 2 for k, d in zip(kernel, dilation, strict=True))

        def torch_conv(*t: Tensor) -> Tensor:
            if not zeros_after:
                return function(*t, stride, padding, dilation, groups)
            totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            pad = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
            return function(F.pad(t[0], pad), *t[1:], stride, 0, dilation, groups)

        def our_conv(*t: Tensor) -> Tensor:
            return functional.conv(*t, stride=stride, padding=padding, dilation=dilation, groups=groups, setting=PLAIN)

        g = _randn(*torch_conv(x, w, b).shape)

        actual = _gradients(our_conv, g, x, w, b)

        _assert_same(actual, _gradients(torch_conv, g, x, w, b))

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_transposed_convolution(self, data: st.DataObject) -> None:
        """Transposed convolutions equal torch's, output padding included."""
        axes = data.draw(st.integers(1, 3), "axes")
        groups = data.draw(st.integers(1, 3), "groups")
        inputs, outputs = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
        stride, dilation, kernel = (tuple(data.draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(3))
        padding = tuple(data.draw(st.integers(0, 1)) for _ in range(axes))
        extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        size = tuple(data.draw(st.integers(3, 5)) for _ in range(axes))
        batch = data.draw(st.sampled_from([(), (0,), (1,), (2,)]), "batch")
        x = _randn(*batch, groups * inputs, *size)
        w, b = _randn(groups * inputs, outputs, *kernel), _randn(groups * outputs)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        geometry = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation}
        geometry["groups"] = groups
        try:
            y = function(x, w, b, **geometry)
        except RuntimeError:
            assume(False)
        g = _randn(*y.shape)

        actual = _gradients(lambda *t: functional.conv_transpose(*t, **geometry, setting=PLAIN), g, x, w, b)

        _assert_same(actual, _gradients(lambda *t: function(*t, **geometry), g, x, w, b))

    @pytest.mark.parametrize("kind", ["linear", "matmul", "conv", "conv_transpose"])
    def test_gradients_are_the_derivatives(self, kind: str) -> None:
        """Numerical differentiation confirms the gradients of each kind of product."""
        geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
        call, shapes = {
            "linear": (lambda *t: functional.linear(*t, setting=PLAIN), [(2, 3, 4), (5, 4), (5,)]),
            "matmul": (lambda *t: functional.matmul(*t, setting=PLAIN), [(2, 3, 4), (4, 5)]),
            "conv": (
                lambda *t: functional.conv(*t, **geometry, padding_mode="circular", setting=PLAIN),
                [(1, 4, 4, 3), (2, 2, 3, 2), (2,)],
            ),
            "conv_transpose": (
                lambda *t: functional.conv_transpose(*t, **geometry, output_padding=(1, 0), setting=PLAIN),
                [(1, 4, 2, 2), (4, 1, 3, 2), (2,)],
            ),
        }[kind]

        assert torch.autograd.gradcheck(call, [_randn(*s).requires_grad_() for s in shapes])


# What shares a scale, as (view, dims), for x (2, 3, 8), w (6, 8), g (2, 3, 6).
SHARED_BY_LINEAR = {
    "tensor": dict.fromkeys(SLOTS, (None, None)),
    "sample": {slot: (None, None if slot[1] == "weight" else (1, 2)) for slot in SLOTS},
    "row": dict.fromkeys(SLOTS, (None, (-1,))),
    "kept-channel": {
        ("output", "input"): (None, (2,)),
        ("output", "weight"): (None, (1,)),
        ("grad_input", "grad_output"): (None, (2,)),
        ("grad_input", "weight"): (None, (0,)),
        ("grad_weight", "grad_output"): (None, (0, 1)),
        ("grad_weight", "input"): (None, (0, 1)),
    },
    "block": {
        ("output", "input"): ((2, 3, 4, 2), (3,)),
        ("output", "weight"): ((6, 4, 2), (2,)),
        ("grad_input", "grad_output"): ((2, 3, 3, 2), (3,)),
        ("grad_input", "weight"): ((3, 2, 8), (1,)),
        ("grad_weight", "grad_output"): ((3, 2, 6), (1,)),
        ("grad_weight", "input"): ((3, 2, 8), (1,)),
    },
}
# The same for two groups: x (2, 4, 5, 5), w (6, 2, 3, 3), g (2, 6, 3, 3).
SHARED_BY_CONVOLUTION = {
    "tensor": dict.fromkeys(SLOTS, (None, None)),
    "row": dict.fromkeys(SLOTS, (None, None)),
    "sample": {slot: (None, None if slot[1] == "weight" else (1, 2, 3)) for slot in SLOTS},
    "kept-channel": {
        ("output", "input"): ((2, 2, 2, 5, 5), (2, 3, 4)),
        ("output", "weight"): (None, (1, 2, 3)),
        ("grad_input", "grad_output"): ((2, 2, 3, 3, 3), (2, 3, 4)),
        ("grad_input", "weight"): ((2, 3, 2, 3, 3), (1, 3, 4)),
        ("grad_weight", "grad_output"): (None, (0, 2, 3)),
        ("grad_weight", "input"): (None, (0, 2, 3)),
    },
    "block": {
        ("output", "input"): ((2, 2, 1, 2, 5, 5), (3,)),
        ("output", "weight"): ((6, 1, 2, 3, 3), (2,)),
        ("grad_input", "grad_output"): ((2, 2, 1, 3, 3, 3), (3,)),
        ("grad_input", "weight"): ((2, 1, 3, 2, 3, 3), (2,)),
        ("grad_weight", "grad_output"): ((1, 2, 6, 3, 3), (1,)),
        ("grad_weight", "input"): ((1, 2, 4, 5, 5), (1,)),
    },
}


class TestQuantized:
    """With quantised operands, the products equal dense products of operands that the test puts on the grid."""

    @staticmethod
    def _dense(
        call: Callable[[Tensor, Tensor], Tensor], table: dict, x: Tensor, w: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def hat(product: str, operand: str) -> Tensor:
            values = {"input": x, "weight": w, "grad_output": g}[operand]
            view, dims = table[product, operand]
            return _grid(values, view=view, dims=tuple(range(values.dim())) if dims is None else dims)

        def gradient(of: int, a: Tensor, b: Tensor, incoming: Tensor) -> Tensor:
            return _gradients(call, incoming, a, b)[of]

        return (
            call(hat("output", "input"), hat("output", "weight")),
            gradient(1, x, hat("grad_input", "weight"), hat("grad_input", "grad_output")),
            gradient(2, hat("grad_weight", "input"), w, hat("grad_weight", "grad_output")),
        )

    @staticmethod
    def _assert_quantized(actual: tuple, expected: tuple, plain: tuple) -> None:
        for a, e, p in zip(actual, expected, plain, strict=True):
            torch.testing.assert_close(a, e, **TIGHT)
            assert not torch.allclose(a, p, rtol=1e-4)

    @pytest.mark.parametrize("granularity", sorted(SHARED_BY_LINEAR))
    def test_linear(self, granularity: str) -> None:
        """The three products of a linear layer are those of the operands on their grids, for each granularity."""
        fmt = SYMMETRIC.replace(granularity=granularity, block=2 if granularity == "block" else None)
        x, w, g = _randn(2, 3, 8), _randn(6, 8), _randn(2, 3, 6)
        setting = Setting(recipe=recipe_of(fmt, **(PER_TENSOR_WEIGHT if granularity == "sample" else {})))

        actual = _gradients(lambda *t: functional.linear(*t, setting=setting), g, x, w)

        self._assert_quantized(
            actual, self._dense(F.linear, SHARED_BY_LINEAR[granularity], x, w, g), _gradients(F.linear, g, x, w)
        )

    @pytest.mark.parametrize("granularity", sorted(SHARED_BY_CONVOLUTION))
    def test_grouped_convolution(self, granularity: str) -> None:
        """So are those of a grouped convolution, where kept channels of the weight are (group, channel in group)."""
        block = {"block": 3 if granularity == "block" else None}
        formats = dict.fromkeys(SLOTS, SYMMETRIC.replace(granularity=granularity, **block))
        if granularity == "sample":
            formats |= {slot: SYMMETRIC for slot in SLOTS if slot[1] == "weight"}
        if granularity == "block":
            for slot, table in SHARED_BY_CONVOLUTION["block"].items():
                assert table[0] is not None
                formats[slot] = formats[slot].replace(block=table[0][table[1][0]])
        recipe = recipe_of(SYMMETRIC, **{"__".join(slot): fmt for slot, fmt in formats.items()})
        x, w, g = _randn(2, 4, 5, 5), _randn(6, 2, 3, 3), _randn(2, 6, 3, 3)
        geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}

        actual = _gradients(lambda *t: functional.conv(*t, **geometry, setting=Setting(recipe=recipe)), g, x, w)

        def dense(*t: Tensor) -> Tensor:
            return F.conv2d(*t, groups=2)

        self._assert_quantized(
            actual, self._dense(dense, SHARED_BY_CONVOLUTION[granularity], x, w, g), _gradients(dense, g, x, w)
        )

    @pytest.mark.parametrize("transposed", [False, True])
    def test_output_channels_of_a_grouped_weight(self, transposed: bool) -> None:
        """Granularity "output-channel" keeps the same output channels of the weight in both of its products."""
        fmt = SYMMETRIC.replace(granularity="output-channel")
        recipe = recipe_of(FP32, output__weight=fmt, grad_input__weight=fmt)
        geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}
        x, w = _randn(2, 4, 5, 5), _randn(4, 3, 3, 3) if transposed else _randn(6, 2, 3, 3)
        # (group, inputs, outputs) of a transposed weight, (group, outputs, inputs) of a plain one.
        w_hat = _grid(w, view=(2, 2, 3, 3, 3), dims=(1, 3, 4)) if transposed else _grid(w, dims=(1, 2, 3))
        ours, dense = (functional.conv_transpose, F.conv_transpose2d) if transposed else (functional.conv, F.conv2d)
        extra = {"output_padding": (0, 0)} if transposed else {}
        g = _randn(*dense(x, w, groups=2).shape)

        y, grad_input, _ = _gradients(lambda *t: ours(*t, **geometry, **extra, setting=Setting(recipe=recipe)), g, x, w)

        expected = _gradients(lambda *t: dense(*t, groups=2), g, x, w_hat)
        torch.testing.assert_close(y, expected[0], **TIGHT)
        torch.testing.assert_close(grad_input, expected[1], **TIGHT)
        assert not torch.allclose(y, dense(x, w, groups=2), rtol=1e-4)

    def test_kept_channels_of_a_grouped_transposed_weight(self) -> None:
        """In `grad_input` a transposed convolution keeps its input channels, the weight's first axis."""
        fmt = SYMMETRIC.replace(granularity="kept-channel")
        recipe = recipe_of(FP32, output__weight=fmt, grad_input__weight=fmt)
        geometry = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
        x, w = _randn(2, 4, 3, 3), _randn(4, 3, 3, 3)
        dense = {"stride": 2, "padding": 1, "groups": 2}
        g = _randn(*F.conv_transpose2d(x, w, **dense).shape)

        y, grad_input, _ = _gradients(
            lambda *t: functional.conv_transpose(*t, **geometry, output_padding=(0, 0), setting=Setting(recipe=recipe)),
            g,
            x,
            w,
        )

        outputs_kept = _grid(w, view=(2, 2, 3, 3, 3), dims=(1, 3, 4))
        inputs_kept = _grid(w, dims=(1, 2, 3))
        torch.testing.assert_close(y, F.conv_transpose2d(x, outputs_kept, **dense), **TIGHT)
        expected = _gradients(lambda *t: F.conv_transpose2d(*t, **dense), g, x, inputs_kept)[1]
        torch.testing.assert_close(grad_input, expected, **TIGHT)
        assert not torch.equal(outputs_kept, inputs_kept)

    def test_matmul_keeps_channels_of_each_matrix(self) -> None:
        """A batch of matrices has a scale per kept channel of each matrix."""
        fmt = SYMMETRIC.replace(granularity="kept-channel")
        x, w, g = _randn(2, 3, 8), _randn(2, 8, 6), _randn(2, 3, 6)
        table = {
            ("output", "input"): (None, (2,)),
            ("output", "weight"): (None, (1,)),
            ("grad_input", "grad_output"): (None, (2,)),
            ("grad_input", "weight"): (None, (2,)),
            ("grad_weight", "grad_output"): (None, (1,)),
            ("grad_weight", "input"): (None, (1,)),
        }
        setting = Setting(recipe=recipe_of(fmt))

        actual = _gradients(lambda *t: functional.matmul(*t, setting=setting), g, x, w)

        self._assert_quantized(actual, self._dense(torch.matmul, table, x, w, g), _gradients(torch.matmul, g, x, w))

    def test_bits_of_the_setting_replace_those_of_the_recipe(self) -> None:
        """Widths of the call decide, not the format's own."""
        bits = (3, 5, 8, 8, 8, 8)
        x, w = _randn(4, 8), _randn(6, 8)

        y = functional.linear(x, w, setting=Setting(recipe=recipe_of(SYMMETRIC), bits=bits))

        expected = F.linear(_grid(x, dims=(0, 1), bits=3), _grid(w, dims=(0, 1), bits=5))
        torch.testing.assert_close(y, expected, **TIGHT)
        assert not torch.allclose(y, functional.linear(x, w, setting=Setting(recipe=recipe_of(SYMMETRIC))))

    def test_operands_of_one_format_have_one_width(self) -> None:
        """`sbm8` has one format for each of input and weight, and two of grad_output: four widths count."""
        slots = [slot_of(Recipe.from_name("sbm8"), *slot) for slot in SLOTS]

        assert [SLOTS[i] for i in slots] == [
            ("output", "input"),
            ("output", "weight"),
            ("grad_input", "grad_output"),
            ("output", "weight"),
            ("grad_weight", "grad_output"),
            ("output", "input"),
        ]

    def test_padding_stays_zero_where_zero_is_off_the_grid(self) -> None:
        """The zeros around an offset-quantised input are added after quantisation."""
        fmt = integer(bits=4, zero="offset")
        x, w = torch.rand(1, 1, 4, dtype=torch.float64) + 1, torch.ones(1, 1, 3, dtype=torch.float64)
        setting = Setting(recipe=recipe_of(FP32, output__input=fmt))

        y = functional.conv(x, w, stride=(1,), padding=(1,), dilation=(1,), setting=setting)

        step = (x.max() - x.min()) / 15
        x_hat = ((x - x.min()) / step).round() * step + x.min()
        torch.testing.assert_close(y, F.conv1d(x_hat, w, padding=1), **TIGHT)
        assert not torch.allclose(y, F.conv1d(x, w, padding=1))

    @pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
    def test_other_padding_repeats_values_of_the_grid(self, mode: str) -> None:
        """Reflected, replicated and circular padding give the convolution of the padded, quantised input."""
        x, w, g = _randn(2, 2, 5, 5), _randn(3, 2, 3, 3), _randn(2, 3, 5, 5)
        setting = Setting(recipe=recipe_of(SYMMETRIC))

        y, grad_input, _ = _gradients(
            lambda *t: functional.conv(
                *t, stride=(1, 1), padding=(1, 1), dilation=(1, 1), padding_mode=mode, setting=setting
            ),
            g,
            x,
            w,
        )

        def dense(a: Tensor, b: Tensor) -> Tensor:
            return F.conv2d(F.pad(a, (1, 1, 1, 1), mode=mode), b)

        every = (0, 1, 2, 3)
        x_hat, w_hat, g_hat = (_grid(t, dims=every) for t in (x, w, g))
        torch.testing.assert_close(y, dense(x_hat, w_hat), **TIGHT)
        torch.testing.assert_close(grad_input, _gradients(dense, g_hat, x, w_hat)[1], **TIGHT)
        assert not torch.allclose(y, dense(x, w))

    def test_bias_is_quantised_in_its_own_format(self) -> None:
        """The bias that is added lies on the grid of the recipe's bias format."""
        recipe = recipe_of(FP32).replace(bias=integer(bits=2, zero="symmetric"))
        x, w, b = _randn(4, 8), _randn(6, 8), _randn(6)

        y = functional.linear(x, w, b, setting=Setting(recipe=recipe))

        torch.testing.assert_close(y, F.linear(x, w, _grid(b, dims=(0,), bits=2)), **TIGHT)
        assert not torch.allclose(y, F.linear(x, w, b))


class TestGradients:
    """Which codes of grad_output each product sees, and what the backward costs."""

    @pytest.mark.parametrize("changed", ["grad_input", "grad_weight"])
    def test_bifurcation_changes_one_product_only(self, changed: str) -> None:
        """A coarser format of grad_output in one product changes that product and not the other."""
        x, w, g = _randn(4, 8), _randn(6, 8), _randn(4, 6)
        coarse = SYMMETRIC.replace(bits=2)
        results = [
            _gradients(lambda *t, r=recipe: functional.linear(*t, setting=Setting(recipe=r)), g, x, w)
            for recipe in (recipe_of(SYMMETRIC), recipe_of(SYMMETRIC, **{f"{changed}__grad_output": coarse}))
        ]

        same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]

        assert same == [True, changed != "grad_input", changed != "grad_weight"]

    def test_without_bifurcation_both_products_see_the_same_codes(self) -> None:
        """With one stochastic format of grad_output, one noise field serves grad_input and grad_weight."""
        x, w, g, u = _randn(4, 8), _randn(6, 8), _randn(4, 6), torch.rand(4, 6)
        recipe = recipe_of(FP32, grad_input__grad_output=STOCHASTIC, grad_weight__grad_output=STOCHASTIC)
        noise = RecordedNoise(draws={("grad_input", "grad_output"): u})

        _, grad_input, grad_weight = _gradients(
            lambda *t: functional.linear(*t, setting=Setting(recipe=recipe, noise=noise)), g, x, w
        )

        g_hat = _grid(g, dims=(0, 1), u=u)
        torch.testing.assert_close(grad_input, g_hat @ w, **TIGHT)
        torch.testing.assert_close(grad_weight, g_hat.t() @ x, **TIGHT)
        assert not torch.allclose(g_hat, g)

    def test_bifurcated_stochastic_copies_have_noise_of_their_own(self) -> None:
        """Two different stochastic formats of grad_output draw two noise fields, each for its product."""
        x, w, g = _randn(4, 8), _randn(6, 8), _randn(4, 6)
        u, v = torch.rand(4, 6), torch.rand(4, 6)
        fine = STOCHASTIC.replace(bits=6)
        recipe = recipe_of(FP32, grad_input__grad_output=STOCHASTIC, grad_weight__grad_output=fine)
        noise = RecordedNoise(draws={("grad_input", "grad_output"): u, ("grad_weight", "grad_output"): v})

        _, grad_input, grad_weight = _gradients(
            lambda *t: functional.linear(*t, setting=Setting(recipe=recipe, noise=noise)), g, x, w
        )

        torch.testing.assert_close(grad_input, _grid(g, dims=(0, 1), u=u) @ w, **TIGHT)
        torch.testing.assert_close(grad_weight, _grid(g, dims=(0, 1), bits=6, u=v).t() @ x, **TIGHT)

    def test_grad_bias_is_the_plain_sum(self) -> None:
        """The gradient of the bias is the sum of grad_output as it came, with every operand in 4 bits."""
        x, w, b, g = _randn(4, 8), _randn(6, 8), _randn(6), _randn(4, 6)
        setting = Setting(recipe=recipe_of(SYMMETRIC))

        grads = _gradients(lambda *t: functional.linear(*t, setting=setting), g, x, w, b)

        torch.testing.assert_close(grads[3], g.sum(0), **TIGHT)
        assert not torch.allclose(grads[2], g.t() @ x)

    def test_clipped_values_receive_their_gradient(self) -> None:
        """The estimator is straight through: a value outside the range gets the gradient of its clipped self."""
        fmt = integer(bits=4, zero="integer", running=0.9)
        x, w, g = torch.tensor([[0.5, 9.0]]), torch.tensor([[2.0, 3.0]]), torch.ones(1, 1)
        extremes = (torch.tensor(0.0), torch.tensor(1.5))
        setting = Setting(recipe=recipe_of(FP32, output__input=fmt, grad_weight__input=fmt), input_range=extremes)

        y, grad_input, grad_weight = _gradients(lambda *t: functional.linear(*t, setting=setting), g, x, w)

        assert y.item() == pytest.approx(2 * 0.5 + 3 * 1.5)
        assert grad_input.tolist() == [[2.0, 3.0]]
        torch.testing.assert_close(grad_weight, torch.tensor([[0.5, 1.5]]))

    def test_a_second_derivative_is_refused(self) -> None:
        """create_graph=True raises, naming what to do, and does not return a wrong second derivative."""
        x = _randn(4, 8).requires_grad_()
        y = functional.linear(x, _randn(6, 8), setting=PLAIN).sum()

        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(y, x, create_graph=True)

    def test_two_backwards_give_the_same_gradients(self) -> None:
        """A retained graph draws the same noise the second time."""
        noise = CounterNoise(key=step_key(0, torch.tensor(1)), layer="a")
        x, w, g = _randn(4, 8).requires_grad_(), _randn(6, 8).requires_grad_(), _randn(4, 6)
        y = functional.linear(x, w, setting=Setting(recipe=recipe_of(STOCHASTIC), noise=noise))

        first = torch.autograd.grad(y, [x, w], g, retain_graph=True)
        second = torch.autograd.grad(y, [x, w], g)

        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.allclose(first[0], g @ w)

    @pytest.mark.parametrize("granularity", ["kept-channel", "tensor"])
    def test_a_weight_changed_between_forward_and_backward_never_enters_the_gradient(self, granularity: str) -> None:
        """Autograd's version check raises, or grad_input is that of the weight of the forward."""
        fmt = SYMMETRIC.replace(granularity=granularity)
        x, w, g = _randn(4, 8).requires_grad_(), _randn(6, 8).requires_grad_(), _randn(4, 6)
        y = functional.linear(x, w, setting=Setting(recipe=recipe_of(FP32, output__weight=fmt, grad_input__weight=fmt)))
        w_hat = _grid(w.detach(), dims=(0, 1))
        with torch.no_grad():
            w.mul_(2)

        if granularity == "tensor":
            torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ w_hat, **TIGHT)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, x, g)

    @pytest.mark.parametrize(
        ("frozen", "left"), [("input", ["output", "grad_weight"]), ("weight", ["output", "grad_input"])]
    )
    def test_a_frozen_operand_costs_no_product(self, runs: list[ProductRun], frozen: str, left: list[str]) -> None:
        """The gradient that nobody needs is not computed, and the other one is what it was."""
        x, w, g = _randn(4, 8), _randn(6, 8), _randn(4, 6)
        both = _gradients(lambda *t: functional.linear(*t, setting=Setting(recipe=recipe_of(SYMMETRIC))), g, x, w)
        runs.clear()
        x.requires_grad_(frozen != "input")
        w.requires_grad_(frozen != "weight")

        functional.linear(x, w, setting=Setting(recipe=recipe_of(SYMMETRIC))).backward(g)

        assert [run.product for run in runs] == left
        needed = x.grad if frozen == "weight" else w.grad
        assert torch.equal(needed, both[1 if frozen == "weight" else 2])

    @pytest.mark.parametrize("frozen", ["input", "weight"])
    def test_a_frozen_operand_draws_no_noise(self, frozen: str) -> None:
        """Only the copy of grad_output that a product needs is rounded."""
        drawn: list[str] = []

        class Spy:
            def draw(self, product: str, operand: str, x: Tensor) -> Tensor:
                drawn.append(f"{product}.{operand}")
                return torch.rand(x.shape)

            def words(self, *_: str) -> None:
                """None."""

        recipe = recipe_of(FP32, grad_input__grad_output=STOCHASTIC)
        recipe = recipe.replace(grad_weight=GradWeight(grad_output=STOCHASTIC.replace(bits=6), input=FP32))
        x, w = _randn(4, 8).requires_grad_(frozen != "input"), _randn(6, 8).requires_grad_(frozen != "weight")

        functional.linear(x, w, setting=Setting(recipe=recipe, noise=Spy())).sum().backward()

        assert drawn == [f"{'grad_input' if frozen == 'weight' else 'grad_weight'}.grad_output"]


class TestValues:
    """Dtypes, autocast, nan and inf, and what is refused."""

    def test_an_integer_tensor_is_refused(self) -> None:
        """An int64 input raises a TypeError that names it."""
        with pytest.raises(TypeError, match=r"input is torch\.int64"):
            functional.linear(torch.ones(2, 8, dtype=torch.int64), torch.ones(6, 8), setting=PLAIN)

    @pytest.mark.parametrize("which", ["weight", "bias"])
    def test_two_dtypes_are_refused_outside_autocast(self, which: str) -> None:
        """Operands of different dtypes raise a TypeError that names both."""
        w, b = torch.ones(6, 8), torch.ones(6)
        w, b = (w.half(), b) if which == "weight" else (w, b.half())

        with pytest.raises(TypeError, match=rf"torch\.float32 and {which} is torch\.float16"):
            functional.linear(torch.ones(2, 8), w, b, setting=PLAIN)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_result_and_gradients_keep_the_dtype(self, dtype: torch.dtype) -> None:
        """Output and gradients have the dtype of the operands, and are computed from float32 codes or wider."""
        x, w, g = torch.randn(4, 8).to(dtype), torch.randn(6, 8).to(dtype), torch.randn(4, 6).to(dtype)
        setting = Setting(recipe=recipe_of(SYMMETRIC))

        y, grad_input, grad_weight = _gradients(lambda *t: functional.linear(*t, setting=setting), g, x, w)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x_hat, w_hat, g_hat = (_grid(t.to(wide), dims=(0, 1)) for t in (x, w, g))
        torch.testing.assert_close(y, (x_hat @ w_hat.t()).to(dtype))
        torch.testing.assert_close(grad_input, (g_hat @ w_hat).to(dtype))
        torch.testing.assert_close(grad_weight, (g_hat.t() @ x_hat).to(dtype))

    def test_autocast_gives_its_dtype_and_leaves_operands_on_their_grids(self, runs: list[ProductRun]) -> None:
        """Under autocast the output is bfloat16, of products of float32 codes that no bfloat16 rounding moved."""
        fmt = integer(bits=12, zero="symmetric")
        x, w = torch.randn(4, 8).requires_grad_(), torch.randn(6, 8).requires_grad_()

        with torch.autocast("cpu", torch.bfloat16):
            y = functional.linear(x, w, setting=Setting(recipe=recipe_of(fmt)))
        y.sum().backward()

        x_hat, w_hat = _grid(x.detach(), dims=(0, 1), bits=12), _grid(w.detach(), dims=(0, 1), bits=12)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x_hat, w_hat).bfloat16())
        assert torch.equal(runs[0].operands["input"].quantized, x_hat)
        assert not torch.equal(x_hat, x_hat.bfloat16().float())
        assert [run.result.dtype for run in runs] == [torch.float32] * 3
        assert x.grad.dtype == w.grad.dtype == torch.float32

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("zero", ["symmetric", "integer", "offset"])
    @pytest.mark.parametrize("operand", ["input", "weight", "grad_output"])
    def test_nan_and_inf_surface_as_nan(self, bad: float, zero: str, operand: str) -> None:
        """One bad value in an operand makes every value of each product with it nan."""
        tensors = {"input": torch.randn(4, 8), "weight": torch.randn(6, 8), "grad_output": torch.randn(4, 6)}
        tensors[operand][0, 0] = bad
        setting = Setting(recipe=recipe_of(integer(bits=8, zero=zero)))

        results = _gradients(
            lambda *t: functional.linear(*t, setting=setting),
            tensors["grad_output"],
            tensors["input"],
            tensors["weight"],
        )

        tainted = {"input": (0, 2), "weight": (0, 1), "grad_output": (1, 2)}[operand]
        assert [bool(r.isnan().all()) for r in results] == [i in tainted for i in range(3)]

    def test_stochastic_rounding_without_noise_is_refused(self) -> None:
        """A stochastic format and no noise raise a ValueError that names layer, operand and product."""
        setting = Setting(recipe=recipe_of(STOCHASTIC), layer="head")

        with pytest.raises(ValueError, match="head: input in output rounds stochastically"):
            functional.linear(torch.ones(2, 8), torch.ones(6, 8), setting=setting)

    def test_bf16_operands_are_rounded_to_bf16(self) -> None:
        """With the bf16 format a product is that of operands rounded to bfloat16, summed in float32."""
        x, w = torch.randn(4, 8), torch.randn(6, 8)

        y = functional.linear(x, w, setting=Setting(recipe=recipe_of(BF16)))

        assert torch.equal(y, F.linear(x.bfloat16().float(), w.bfloat16().float()))
        assert not torch.equal(y, F.linear(x, w))

    def test_memory_layout_does_not_change_the_noise(self) -> None:
        """A channels_last operand is rounded with the same noise as a contiguous one."""
        noise = CounterNoise(key=step_key(0, torch.tensor(1)), layer="a")
        setting = Setting(recipe=recipe_of(STOCHASTIC), noise=noise)
        x, w = _randn(2, 3, 5, 5), _randn(4, 3, 3, 3)
        geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
        g = _randn(2, 4, 5, 5)

        def call(*t: Tensor) -> Tensor:
            return functional.conv(*t, **geometry, setting=setting)

        plain = _gradients(call, g, x, w)
        moved = _gradients(call, *(t.to(memory_format=torch.channels_last) for t in (g, x, w)))

        _assert_same(moved, plain)
        assert not torch.allclose(plain[0], F.conv2d(x, w, padding=1))


class TestObservation:
    """What an observer is told of a product."""

    @pytest.mark.parametrize(
        ("op", "x", "w", "y", "macs"),
        [
            (Linear(), (2, 3, 8), (6, 8), (2, 3, 6), 6 * 8 * 6),
            (Matmul(), (2, 3, 8), (8, 6), (2, 3, 6), 6 * 8 * 6),
            (
                Convolution(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2),
                (2, 4, 8, 8),
                (6, 2, 3, 3),
                (2, 6, 4, 4),
                2 * 6 * 16 * 2 * 9,
            ),
            (
                Convolution(stride=(1,), padding=(1,), dilation=(1,), groups=4),
                (2, 4, 8),
                (4, 1, 3),
                (2, 4, 8),
                2 * 4 * 8 * 3,
            ),
            (
                Convolution(stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=2, transposed=True),
                (2, 4, 3, 3),
                (4, 3, 2, 2),
                (2, 6, 6, 6),
                2 * 4 * 9 * 3 * 4,
            ),
        ],
    )
    def test_macs_equal_a_count_by_hand(
        self, op: Op, x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], macs: int
    ) -> None:
        """Multiply-accumulates of linear, grouped, depthwise and transposed products equal a count by hand."""
        assert op.macs(torch.Size(x), torch.Size(w), torch.Size(y)) == macs

    def test_all_three_products_report_the_same_macs(self, runs: list[ProductRun]) -> None:
        """A convolution's backward products cost what its forward costs."""
        x, w = _randn(2, 4, 5, 5).requires_grad_(), _randn(6, 2, 3, 3).requires_grad_()

        functional.conv(x, w, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2, setting=PLAIN).sum().backward()

        assert [(run.product, run.macs) for run in runs] == [
            (product, 2 * 6 * 9 * 2 * 9) for product in ("output", "grad_input", "grad_weight")
        ]

    def test_an_observer_changes_no_value(self) -> None:
        """Products and gradients are bit for bit the same when watched."""
        noise = CounterNoise(key=step_key(0, torch.tensor(1)), layer="a")
        setting = Setting(recipe=recipe_of(STOCHASTIC), noise=noise)
        x, w, g = _randn(4, 8), _randn(6, 8), _randn(4, 6)

        alone = _gradients(lambda *t: functional.linear(*t, setting=setting), g, x, w)
        with watch.observed_by(lambda _: None):
            watched = _gradients(lambda *t: functional.linear(*t, setting=setting), g, x, w)

        assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))

    def test_a_failing_observer_is_removed(self) -> None:
        """After an exception in the context nobody watches and no product counts as running."""
        with pytest.raises(KeyError), watch.observed_by(lambda _: None):
            raise KeyError

        assert not watch.is_observed()
        assert not watch.is_inside()


# torch refuses a transposed result without places for fewer than 16 samples on one thread.
EMPTY: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a transposed result without places": (nn.ConvTranspose2d(3, 4, 1, padding=1), (16, 3, 2, 2)),
    "the same without bias": (nn.ConvTranspose2d(3, 4, 1, padding=1, bias=False), (16, 3, 2, 2)),
    "one axis without places": (nn.ConvTranspose2d(3, 4, (1, 3), padding=(1, 0)), (16, 3, 2, 2)),
    "a transposed result of one axis": (nn.ConvTranspose1d(3, 4, 3, stride=2, padding=2, output_padding=1), (16, 3, 1)),
    "a transposed convolution of no samples": (nn.ConvTranspose2d(3, 4, 3), (0, 3, 5, 4)),
    "no samples": (nn.Conv2d(3, 4, 3, padding=1), (0, 3, 5, 4)),
    "no samples in one axis": (nn.Conv1d(3, 4, 3), (0, 3, 5)),
    "no rows": (nn.Linear(3, 4), (0, 3)),
}
REFUSED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "too small for the kernel, no samples": (nn.Conv2d(3, 4, 3), (0, 3, 2, 2)),
    "too small for the kernel": (nn.Conv2d(3, 4, 3), (1, 3, 2, 2)),
    "samples without places": (nn.Conv2d(3, 4, 1, padding=1), (2, 3, 0, 2)),
    "transposed samples without places": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 0, 2)),
}


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("case", EMPTY | REFUSED)
def test_empty_tensors_are_torch_s(case: str, engine: str) -> None:
    """Where torch answers, shape, strides and all gradients are its own; where it refuses, so does the layer."""
    plain, shape = copy.deepcopy((EMPTY | REFUSED)[case])
    layer = copy.deepcopy(plain)
    lowbit.convert_(layer, "int8", engine=engine)
    leaves = [torch.ones(shape, requires_grad=True) for _ in range(2)]
    try:
        expected = plain(leaves[0])
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"cannot multiply shapes|zero batch|Kernel size"):
            layer(leaves[1])
        assert case in REFUSED
        return

    y = layer(leaves[1])

    assert case not in REFUSED
    assert y.numel() == 0
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
    expected.sum().backward()
    y.sum().backward()
    for ours, theirs in zip([leaves[1], *layer.parameters()], [leaves[0], *plain.parameters()], strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_result_without_places_is_refused_where_torch_refuses_it(engine: str) -> None:
    """Of one sample on one thread torch refuses what it answers for 16: the layer says the same in torch's words."""
    plain, x = nn.ConvTranspose2d(3, 4, 1, padding=1), torch.ones(1, 3, 2, 2)
    layer = copy.deepcopy(plain)
    lowbit.convert_(layer, "int8", engine=engine)

    with threads(1):
        with pytest.raises(RuntimeError, match="Output size is too small"):
            plain(x)
        with pytest.raises(RuntimeError, match="Output size is too small"):
            layer(x)
        assert layer(x.repeat(16, 1, 1, 1)).shape == (16, 4, 0, 0)
