"""The quantizers and Range BN against vectors from the SBM authors' two codes."""

import math

import pytest
import torch
from conftest import Vectors
from torch import Tensor

from lowbit.formats import Integer
from lowbit.nn.norm import KAPPA, NormSetting, range_batch_norm, range_statistics
from lowbit.quantizer import encode, quantize
from lowbit.ranges import extremes
from lowbit.recipe import Recipe
from lowbit.rounding import RecordedNoise

VECTORS = "static/sbm_quantizer_v2.npz"
HOFFER = Recipe.from_name("sbm8-hoffer")
BITS = (2, 3, 4, 6, 8, 16)


def _with_bits(fmt: object, bits: int, **changes: object) -> Integer:
    assert isinstance(fmt, Integer)
    fields = {f: getattr(fmt, f) for f in fmt.__dataclass_fields__} | {"bits": bits} | changes
    return Integer(**fields)


@pytest.mark.parametrize("rule", ["mean", "extreme"])
@pytest.mark.parametrize("bits", BITS)
def test_activations_equal_the_authors(vectors: Vectors, rule: str, bits: int) -> None:
    """Dequantised activations equal the authors' under both range rules, at every width."""
    fmt = _with_bits(HOFFER.output.input, bits, range="sample-mean" if rule == "mean" else "minmax")

    values = quantize(vectors["act_x"], fmt).values

    torch.testing.assert_close(values, vectors[f"act_{rule}_b{bits}"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(values, vectors["act_x"])


@pytest.mark.parametrize("rule", ["mean", "extreme"])
def test_activation_codes_and_ranges_equal_the_authors(vectors: Vectors, rule: str) -> None:
    """8-bit codes are identical, and lo and hi are the authors' zero point and range."""
    fmt = _with_bits(HOFFER.output.input, 8, range="sample-mean" if rule == "mean" else "minmax")
    x = vectors["act_x"]

    codes = encode(x, fmt)
    lo, hi = extremes(x, rule=fmt.range, dims=(0, 1, 2, 3))

    assert torch.equal(codes.q, vectors[f"act_{rule}_codes"])
    torch.testing.assert_close(lo.flatten(), vectors[f"act_{rule}_zp"].flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close((hi - lo).flatten(), vectors[f"act_{rule}_range"].flatten(), rtol=1e-6, atol=0)


def test_signed_codes_stand_for_the_same_values(vectors: Vectors) -> None:
    """The authors' signed variant is the same grid: our unsigned codes reproduce its values."""
    values = quantize(vectors["act_x"], _with_bits(HOFFER.output.input, 8)).values

    torch.testing.assert_close(values, vectors["act_mean_b8_signed"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_weights_per_output_channel_equal_the_authors(vectors: Vectors, bits: int) -> None:
    """Weights with one range per output channel equal the authors' at every width."""
    values = quantize(vectors["w_x"], _with_bits(HOFFER.output.weight, bits), dims=(1, 2, 3)).values

    torch.testing.assert_close(values, vectors[f"w_perchan_b{bits}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 16])
def test_biases_equal_the_authors(vectors: Vectors, bits: int) -> None:
    """A bias with one range for all equals the authors'."""
    values = quantize(vectors["bias_x"], _with_bits(HOFFER.bias, bits)).values

    torch.testing.assert_close(values, vectors[f"bias_b{bits}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rounding", ["sr", "det"])
def test_gradients_equal_the_authors(vectors: Vectors, bits: int, rounding: str) -> None:
    """Gradients equal the authors' with their own noise replayed, and with nearest rounding."""
    stochastic = rounding == "sr"
    fmt = _with_bits(HOFFER.grad_input.grad_output, bits, rounding="stochastic" if stochastic else "nearest")

    values = quantize(
        vectors["grad_x"], fmt, noise=0.5 - vectors["grad_noise_sr"] if stochastic else None
    ).values

    torch.testing.assert_close(values, vectors[f"grad_q_b{bits}_{rounding}"], rtol=1e-6, atol=1e-9)


def test_linear_gradients_equal_the_authors(vectors: Vectors) -> None:
    """The gradient of a linear layer's output equals the authors'."""
    values = quantize(
        vectors["gradlin_x"], HOFFER.grad_input.grad_output, noise=0.5 - vectors["gradlin_noise"]
    ).values

    torch.testing.assert_close(values, vectors["gradlin_sr_b8"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["const", "zero"])
def test_degenerate_tensors_stay_themselves_where_the_authors_give_nan(vectors: Vectors, name: str) -> None:
    """A constant and an all-zero tensor return themselves; the authors' code returns nan."""
    x = vectors[f"{name}_x"]

    values = quantize(x, _with_bits(HOFFER.output.weight, 8)).values

    assert torch.equal(values, x)
    assert vectors[f"{name}_out"].isnan().all()


class TestRangeNorm:
    """Range BN against both codes; `vectors` of the quantizer give way to those of the normalisation."""

    @pytest.fixture
    def vectors(self, request: pytest.FixtureRequest) -> Vectors:
        """The vectors of the normalisation."""
        from conftest import ORACLES

        path = ORACLES / "static" / "sbm_rangebn.npz"
        if not path.exists():
            pytest.skip(f"the reference vectors {path} are not here")
        return Vectors(path)

    @pytest.mark.parametrize("i", [0, 1])
    def test_without_quantizers(self, vectors: Vectors, i: int) -> None:
        """In float64 and without quantizers, output, gradients, mean and sigma equal the authors' second code to 1e-12."""
        fp32 = Recipe.from_name("fp32").output.input
        norm = HOFFER.normalization
        assert norm is not None
        plain = NormSetting(
            norm=type(norm)(input=fp32, grad_output=fp32, constant="authors", epsilon="outside"), eps=1e-5
        )
        x, gamma, beta = (vectors[k].double().requires_grad_() for k in (f"x{i}", "gamma", "beta"))

        y, mean, sigma = range_batch_norm(x, gamma, beta, setting=plain)
        y.backward(vectors["g"].double())

        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(y, vectors[f"v2_core_y{i}"], **close)
        torch.testing.assert_close(x.grad, vectors[f"v2_core_dx{i}"], **close)
        torch.testing.assert_close(gamma.grad, vectors[f"v2_core_dgamma{i}"], **close)
        torch.testing.assert_close(beta.grad, vectors[f"v2_core_dbeta{i}"], **close)
        running = (torch.zeros(4).double(), torch.zeros(4).double()) if i == 0 else self._running(vectors, 0)
        torch.testing.assert_close(0.1 * running[0] + 0.9 * mean, vectors[f"v2_core_rmean{i}"], **close)
        torch.testing.assert_close(0.1 * running[1] + 0.9 * sigma, vectors[f"v2_core_rvar{i}"], **close)

    def _running(self, vectors: Vectors, i: int) -> tuple[Tensor, Tensor]:
        return vectors[f"v2_core_rmean{i}"], vectors[f"v2_core_rvar{i}"]

    def test_evaluation(self, vectors: Vectors) -> None:
        """With the running statistics after two steps, evaluation equals the authors' second code."""
        fp32 = Recipe.from_name("fp32").output.input
        norm = HOFFER.normalization
        assert norm is not None
        plain = NormSetting(
            norm=type(norm)(input=fp32, grad_output=fp32, constant="authors", epsilon="outside"), eps=1e-5
        )

        y, _, _ = range_batch_norm(
            vectors["x2"].double(),
            vectors["gamma"].double(),
            vectors["beta"].double(),
            setting=plain,
            fixed=self._running(vectors, 1),
        )

        torch.testing.assert_close(y, vectors["v2_core_eval_y2"], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("i", [0, 1])
    def test_with_quantizers(self, vectors: Vectors, i: int) -> None:
        """With 8-bit input and replayed 8-bit stochastic gradient, all equals the authors' second code in float32."""
        assert HOFFER.normalization is not None
        noise = RecordedNoise(
            draws={("normalization", "grad_output"): 0.5 - vectors[f"v2_full_gradnoise{i}"]}
        )
        setting = NormSetting(norm=HOFFER.normalization, eps=1e-5, noise=noise)
        x, gamma, beta = (vectors[k].requires_grad_() for k in (f"x{i}", "gamma", "beta"))

        y, _, _ = range_batch_norm(x, gamma, beta, setting=setting)
        y.backward(vectors["g"])

        torch.testing.assert_close(y, vectors[f"v2_full_y{i}"], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(x.grad, vectors[f"v2_full_dx{i}"], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(gamma.grad, vectors[f"v2_full_dgamma{i}"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(beta.grad, vectors[f"v2_full_dbeta{i}"], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("chunks", [1, 2, 4, 16, 64])
    def test_any_number_of_chunks(self, vectors: Vectors, chunks: int) -> None:
        """sigma and the gradient of x equal the authors' for 1 to 64 chunks."""
        fp32 = Recipe.from_name("fp32").output.input
        assert HOFFER.normalization is not None
        norm = type(HOFFER.normalization)(
            input=fp32, grad_output=fp32, constant="authors", chunks=chunks, epsilon="outside"
        )
        x = vectors["x0"].double().requires_grad_()

        y, _, sigma = range_batch_norm(x, None, None, setting=NormSetting(norm=norm, eps=1e-5))
        y.backward(vectors["g"].double())

        torch.testing.assert_close(sigma, vectors[f"v2_core_nc{chunks}_scale"], rtol=1e-12, atol=0)
        torch.testing.assert_close(x.grad.float(), vectors[f"v2_core_nc{chunks}_dx"], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["core", "full"])
    @pytest.mark.parametrize("i", [0, 1])
    def test_first_code_of_the_authors_is_made_of_the_same_pieces(
        self, vectors: Vectors, kind: str, i: int
    ) -> None:
        """The authors' first code, which also quantises 1/sigma, gamma and beta, follows from our statistics and quantizers."""
        dtype = torch.float64 if kind == "core" else torch.float32
        x, gamma, beta = (vectors[k].to(dtype).requires_grad_() for k in (f"x{i}", "gamma", "beta"))
        channel_fmt = Integer(bits=8, zero="offset", floor=1e-8)
        values: Tensor = x
        if kind == "full":
            fmt = _with_bits(HOFFER.output.input, 8, rounding="stochastic")
            values = _straight_through(
                x, quantize(x.detach(), fmt, noise=0.5 - vectors[f"v1_full_actnoise{i}"]).values
            )

        mean, inverse = _differentiable_statistics(values)
        y = (
            (values - _channel(mean))
            * _channel(_rounded(inverse, channel_fmt))
            * _channel(_rounded(gamma, channel_fmt))
        )
        y = y + _channel(_rounded(beta, channel_fmt))
        g = vectors["g"].to(dtype)
        if kind == "full":
            g = quantize(
                g, HOFFER.grad_input.grad_output, noise=0.5 - vectors[f"v1_full_gradnoise{i}"]
            ).values
        y.backward(g)

        tight = {"rtol": 1e-10, "atol": 1e-10} if kind == "core" else {"rtol": 1e-5, "atol": 5e-6}
        torch.testing.assert_close(y, vectors[f"v1_{kind}_y{i}"], **tight)
        torch.testing.assert_close(x.grad, vectors[f"v1_{kind}_dx{i}"], **tight)
        torch.testing.assert_close(gamma.grad, vectors[f"v1_{kind}_dgamma{i}"], **tight)
        torch.testing.assert_close(beta.grad, vectors[f"v1_{kind}_dbeta{i}"], **tight)


def _straight_through(x: Tensor, values: Tensor) -> Tensor:
    return x + (values - x).detach()


def _rounded(x: Tensor, fmt: Integer) -> Tensor:
    return _straight_through(x, quantize(x.detach(), fmt).values)


def _channel(v: Tensor) -> Tensor:
    return v.reshape(1, -1, 1, 1)


def _differentiable_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / (sigma + eps) as functions of x that autograd can follow through the chosen extremes."""
    stats = range_statistics(x.detach(), constant="authors", chunks=16)
    rows = x.transpose(0, 1).reshape(x.shape[1], -1)
    spread = rows.gather(1, stats.argmax).mean(1) - rows.gather(1, stats.argmin).mean(1)
    length = rows.shape[1] // 16
    return rows.mean(1), 1 / (KAPPA["authors"] * spread / math.sqrt(2 * math.log(length)) + 1e-5)
