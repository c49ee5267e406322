"""Range BN against vectors from the SBM authors' two codes."""

import math

import pytest
import torch
from torch import Tensor

from helpers import Vectors
from lowbit.methods.recipe import Recipe
from lowbit.nn.norm import KAPPA, NormSetting, range_batch_norm, range_statistics
from lowbit.numerics.formats import Format, integer
from lowbit.numerics.quantizer import quantize
from lowbit.numerics.ranges import new_running_range, observed_extremes
from lowbit.numerics.rounding import RecordedNoise

VECTORS = "static/sbm_rangebn.npz"
HOFFER = Recipe.from_name("sbm8-hoffer")


@pytest.mark.parametrize("i", [0, 1])
def test_without_quantizers(vectors: Vectors, i: int) -> None:
    """In float64, output, gradients, mean and sigma equal the authors' second code to 1e-12."""
    fp32 = Recipe.from_name("fp32").output.input
    norm = HOFFER.normalization
    assert norm is not None
    plain = NormSetting(norm=type(norm)(input=fp32, grad_output=fp32, constant="authors", epsilon="outside"), eps=1e-5)
    x, gamma, beta = (vectors[k].double().requires_grad_() for k in (f"x{i}", "gamma", "beta"))

    y, mean, sigma = range_batch_norm(x, gamma, beta, setting=plain)
    y.backward(vectors["g"].double())

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, vectors[f"v2_core_y{i}"], **close)
    torch.testing.assert_close(x.grad, vectors[f"v2_core_dx{i}"], **close)
    torch.testing.assert_close(gamma.grad, vectors[f"v2_core_dgamma{i}"], **close)
    torch.testing.assert_close(beta.grad, vectors[f"v2_core_dbeta{i}"], **close)
    running = (torch.zeros(4).double(), torch.zeros(4).double()) if i == 0 else _running(vectors, 0)
    torch.testing.assert_close(0.1 * running[0] + 0.9 * mean, vectors[f"v2_core_rmean{i}"], **close)
    torch.testing.assert_close(0.1 * running[1] + 0.9 * sigma, vectors[f"v2_core_rvar{i}"], **close)


def _running(vectors: Vectors, i: int) -> tuple[Tensor, Tensor]:
    return vectors[f"v2_core_rmean{i}"], vectors[f"v2_core_rvar{i}"]


def test_evaluation(vectors: Vectors) -> None:
    """With the running statistics after two steps, evaluation equals the authors' second code."""
    fp32 = Recipe.from_name("fp32").output.input
    norm = HOFFER.normalization
    assert norm is not None
    plain = NormSetting(norm=type(norm)(input=fp32, grad_output=fp32, constant="authors", epsilon="outside"), eps=1e-5)

    y, _, _ = range_batch_norm(
        vectors["x2"].double(),
        vectors["gamma"].double(),
        vectors["beta"].double(),
        setting=plain,
        fixed=_running(vectors, 1),
    )

    torch.testing.assert_close(y, vectors["v2_core_eval_y2"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("i", [0, 1])
def test_with_quantizers(vectors: Vectors, i: int) -> None:
    """With 8-bit input and replayed 8-bit stochastic gradient, all equals the authors' second code in float32."""
    assert HOFFER.normalization is not None
    noise = RecordedNoise(draws={("normalization", "grad_output"): 0.5 - vectors[f"v2_full_gradnoise{i}"]})
    setting = NormSetting(norm=HOFFER.normalization, eps=1e-5, noise=noise)
    x, gamma, beta = (vectors[k].requires_grad_() for k in (f"x{i}", "gamma", "beta"))

    y, mean, sigma = range_batch_norm(x, gamma, beta, setting=setting)
    y.backward(vectors["g"])

    torch.testing.assert_close(y, vectors[f"v2_full_y{i}"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(x.grad, vectors[f"v2_full_dx{i}"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gamma.grad, vectors[f"v2_full_dgamma{i}"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beta.grad, vectors[f"v2_full_dbeta{i}"], rtol=1e-5, atol=1e-5)
    before = [vectors[f"v2_full_{name}0"] if i else torch.zeros(4) for name in ("rmean", "rvar")]
    torch.testing.assert_close(0.1 * before[0] + 0.9 * mean, vectors[f"v2_full_rmean{i}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(0.1 * before[1] + 0.9 * sigma, vectors[f"v2_full_rvar{i}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 2, 4, 16, 64])
def test_any_number_of_chunks(vectors: Vectors, chunks: int) -> None:
    """Sigma and the gradient of x equal the authors' for 1 to 64 chunks."""
    fp32 = Recipe.from_name("fp32").output.input
    assert HOFFER.normalization is not None
    norm = type(HOFFER.normalization)(
        input=fp32, grad_output=fp32, constant="authors", chunks=chunks, fewest_per_chunk=2, epsilon="outside"
    )
    x = vectors["x0"].double().requires_grad_()

    y, _, sigma = range_batch_norm(x, None, None, setting=NormSetting(norm=norm, eps=1e-5))
    y.backward(vectors["g"].double())

    torch.testing.assert_close(sigma, vectors[f"v2_core_nc{chunks}_scale"], rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad.float(), vectors[f"v2_core_nc{chunks}_dx"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["core", "full"])
@pytest.mark.parametrize("i", [0, 1])
def test_first_code_of_the_authors_is_made_of_the_same_pieces(vectors: Vectors, kind: str, i: int) -> None:
    """The first code, which also quantises 1/sigma, gamma and beta, follows from our statistics and quantizers."""
    dtype = torch.float64 if kind == "core" else torch.float32
    x, gamma, beta = (vectors[k].to(dtype).requires_grad_() for k in (f"x{i}", "gamma", "beta"))
    channel_fmt = integer(bits=8, zero="offset", floor=1e-8)
    values: Tensor = x
    if kind == "full":
        fmt = _stochastic(HOFFER.output.input)
        values = _straight_through(x, quantize(x.detach(), fmt, noise=0.5 - vectors[f"v1_full_actnoise{i}"]).values)

    mean, inverse = _differentiable_statistics(values)
    y = (values - _channel(mean)) * _channel(_rounded(inverse, channel_fmt)) * _channel(_rounded(gamma, channel_fmt))
    y = y + _channel(_rounded(beta, channel_fmt))
    g = vectors["g"].to(dtype)
    if kind == "full":
        g = quantize(g, HOFFER.grad_input.grad_output, noise=0.5 - vectors[f"v1_full_gradnoise{i}"]).values
    y.backward(g)

    tight = {"rtol": 1e-10, "atol": 1e-10} if kind == "core" else {"rtol": 1e-5, "atol": 5e-6}
    torch.testing.assert_close(y, vectors[f"v1_{kind}_y{i}"], **tight)
    torch.testing.assert_close(x.grad, vectors[f"v1_{kind}_dx{i}"], **tight)
    torch.testing.assert_close(gamma.grad, vectors[f"v1_{kind}_dgamma{i}"], **tight)
    torch.testing.assert_close(beta.grad, vectors[f"v1_{kind}_dbeta{i}"], **tight)


def test_evaluation_with_quantizers(vectors: Vectors) -> None:
    """With the authors' running statistics and input range after two steps, evaluation equals their second code."""
    assert HOFFER.normalization is not None
    fmt = HOFFER.normalization.input
    assert fmt.has_width
    setting = NormSetting(
        norm=HOFFER.normalization, eps=1e-5, input_range=_running_extremes([vectors["x0"], vectors["x1"]], fmt)
    )

    y, _, _ = range_batch_norm(
        vectors["x2"],
        vectors["gamma"],
        vectors["beta"],
        setting=setting,
        fixed=(vectors["v2_full_rmean1"], vectors["v2_full_rvar1"]),
    )

    torch.testing.assert_close(y, vectors["v2_full_eval_y2"], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", ["core", "full"])
def test_running_statistics_and_evaluation_of_the_first_code(vectors: Vectors, kind: str) -> None:
    """The authors' first code averages mu and 1 / (sigma + eps); its evaluation follows from our quantizers."""
    dtype = torch.float64 if kind == "core" else torch.float32
    channel_fmt = integer(bits=8, zero="offset", floor=1e-8)
    fmt = _stochastic(HOFFER.output.input)
    mean, inverse = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    for i in range(2):
        values = vectors[f"x{i}"].to(dtype)
        if kind == "full":
            values = quantize(values, fmt, noise=0.5 - vectors[f"v1_full_actnoise{i}"]).values
        batch_mean, batch_inverse = _differentiable_statistics(values)
        mean, inverse = 0.1 * mean + 0.9 * batch_mean, 0.1 * inverse + 0.9 * batch_inverse
    x = vectors["x2"].to(dtype)
    if kind == "full":
        observed = _running_extremes([vectors["x0"], vectors["x1"]], fmt)
        x = quantize(x, fmt, noise=0.5 - vectors["v1_full_eval_actnoise2"], observed=observed).values
    gamma, beta = (_rounded(vectors[k].to(dtype), channel_fmt) for k in ("gamma", "beta"))
    y = (x - _channel(mean)) * _channel(_rounded(inverse, channel_fmt)) * _channel(gamma) + _channel(beta)

    tight = {"rtol": 1e-10, "atol": 1e-10} if kind == "core" else {"rtol": 1e-5, "atol": 5e-6}
    torch.testing.assert_close(mean, vectors[f"v1_{kind}_rmean1"], **tight)
    torch.testing.assert_close(inverse, vectors[f"v1_{kind}_rvar1"], **tight)
    torch.testing.assert_close(y, vectors[f"v1_{kind}_eval_y2"], **tight)


def _running_extremes(batches: list[Tensor], fmt: Format) -> tuple[Tensor, Tensor]:
    """The running range of a format after these batches, shaped to broadcast against a batch."""
    running = new_running_range()
    for x in batches:
        observed_extremes(x, fmt, running, training=True)
    return running[0].reshape(1, 1, 1, 1), running[1].reshape(1, 1, 1, 1)


def _straight_through(x: Tensor, values: Tensor) -> Tensor:
    return x + (values - x).detach()


def _rounded(x: Tensor, fmt: Format) -> Tensor:
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


def _stochastic(fmt: object) -> Format:
    assert fmt.has_width
    return fmt.replace(rounding="stochastic")
