import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from tcq import quantizer


@pytest.fixture
def x_and_codebooks():
    random = np.random.RandomState(0)
    return random.randn(7, 12).astype("f4"), random.randn(3, 8, 4).astype("f4")


@pytest.mark.parametrize("metric", quantizer.METRICS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 50.0])
def test_soft_assign_equals_the_oracle(x_and_codebooks, metric, scale):
    x, codebooks = x_and_codebooks
    weights = quantizer.soft_assign(x, codebooks, scale=scale, metric=metric)
    np.testing.assert_allclose(weights, oracle.soft_assign(x, codebooks, scale, metric), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_reconstruct_equals_the_oracle(x_and_codebooks):
    x, codebooks = x_and_codebooks
    weights = oracle.soft_assign(x, codebooks, 1.0, "l2").astype("f4")
    np.testing.assert_allclose(
        quantizer.reconstruct(weights, codebooks), oracle.reconstruct(weights, codebooks), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("metric", quantizer.METRICS)
def test_soft_tends_to_hard(x_and_codebooks, metric):
    x, codebooks = x_and_codebooks
    used = quantizer.unit_codewords(codebooks) if metric == "ip" else codebooks
    hard = quantizer.decode(quantizer.hard_assign(x, codebooks, metric=metric), used)
    errors = [
        np.abs(quantizer.reconstruct(quantizer.soft_assign(x, codebooks, scale=s, metric=metric), used) - hard).max()
        for s in (1.0, 30.0, 10_000.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("metric", quantizer.METRICS)
def test_hard_assign_is_the_nearest_codeword(x_and_codebooks, metric):
    x, codebooks = x_and_codebooks
    codes = np.asarray(quantizer.hard_assign(x, codebooks, metric=metric))
    np.testing.assert_array_equal(codes, oracle.soft_assign(x, codebooks, 3.0, metric).argmax(-1))


def test_decode_picks_codewords_and_is_a_fixed_point(x_and_codebooks):
    _, codebooks = x_and_codebooks
    codes = np.random.RandomState(1).randint(0, 8, (5, 3)).astype(np.uint8)
    decoded = quantizer.decode(codes, codebooks)
    np.testing.assert_array_equal(decoded[2], np.concatenate([codebooks[m, codes[2, m]] for m in range(3)]))
    np.testing.assert_array_equal(quantizer.hard_assign(decoded, codebooks, metric="l2"), codes)


@pytest.mark.parametrize(
    ("num_codewords", "dtype"), [(2, np.uint8), (256, np.uint8), (512, np.uint16), (65_536, np.uint16)]
)
def test_code_dtype(num_codewords, dtype):
    codebooks = np.random.RandomState(0).randn(1, num_codewords, 2).astype("f4")
    last = codebooks[:, -1] * 1.0
    code = quantizer.hard_assign(last, codebooks, metric="l2")
    assert code.dtype == dtype
    assert int(code[0, 0]) == num_codewords - 1
    np.testing.assert_array_equal(quantizer.decode(code, codebooks)[0], codebooks[0, -1])


def test_gradients_reach_features_and_codebooks_and_are_finite_at_zero(x_and_codebooks):
    x, codebooks = x_and_codebooks
    for metric in quantizer.METRICS:
        for features in (x, np.zeros_like(x)):

            def total(x, c, metric=metric):
                return jnp.sum(quantizer.reconstruct(quantizer.soft_assign(x, c, scale=2.0, metric=metric), c) ** 2)

            gx, gc = jax.grad(total, (0, 1))(features, codebooks)
            assert np.isfinite(gx).all() and np.isfinite(gc).all()
            assert np.abs(gc).max() > 0
        assert np.abs(jax.grad(total)(x, codebooks)).max() > 0


def test_codeword_usage_counts_perplexity():
    codes = np.array([[0, 0], [1, 0], [2, 0], [3, 0]], np.uint8)
    share = quantizer.codeword_share(codes, num_codewords=4)
    np.testing.assert_allclose(share, [[0.25] * 4, [1, 0, 0, 0]])
    np.testing.assert_allclose(quantizer.codeword_usage(share), [4, 1], rtol=1e-6)
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(quantizer.codeword_usage(np.array([[0.75, 0.25, 0, 0]])), [expected], rtol=1e-6)


def test_errors_carry_the_numbers(x_and_codebooks, untyped):
    x, codebooks = x_and_codebooks
    with pytest.raises(ValueError, match=r"\(7, 11\) do not fit codebooks \(3, 8, 4\): must be \(N, 12\)"):
        quantizer.soft_assign(x[:, :11], codebooks, scale=1.0, metric="l2")
    with pytest.raises(ValueError, match="'cos' is unknown: use one of l2, ip"):
        quantizer.hard_assign(x, codebooks, metric="cos")
    with pytest.raises(ValueError, match="131072 codewords"):
        quantizer.hard_assign(x[:, :1], np.zeros((1, 131_072, 1), "f4"), metric="l2")
