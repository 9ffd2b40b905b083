import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcq.losses import _threshold

NUMBERS = [-np.inf, -3e38, -2.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, np.nextafter(np.float32(0.5), 1), 3e38, np.inf]


@jax.jit
def take(values, count):
    low = -3.4e38
    reach = jnp.sum(values >= low, axis=1, dtype=jnp.int32)
    low = jnp.full(len(values), low, jnp.float32)
    cut = _threshold.threshold(values, count, low=low, reach=reach, high=jnp.max(values, axis=1))
    return _threshold.select(values, cut), cut.value


def want(row, count):
    """Selects by sorting in Python: largest first, ties by column."""
    mask = np.zeros(len(row), bool)
    mask[sorted(range(len(row)), key=lambda j: (-row[j], j))[:count]] = True
    return mask


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_exactly_count_values_and_the_first_ties(data):
    width = data.draw(st.sampled_from([1, 2, 5, 8, 11, 19]))
    rows = st.lists(st.sampled_from(NUMBERS), min_size=width, max_size=width)
    values = np.array(data.draw(st.lists(rows, min_size=3, max_size=3)), np.float32)
    count = data.draw(st.integers(0, (values > -np.inf).sum(1).min()))
    mask, _ = take(values, count)
    for got, row in zip(np.asarray(mask), values, strict=True):
        np.testing.assert_array_equal(got, want(row, count))


@pytest.mark.parametrize("width", [7, 64, 1000, 5000])
@pytest.mark.parametrize("kind", ["normal", "two clumps", "few values", "powers"])
def test_long_rows(kind, width):
    random = np.random.RandomState(width)
    values = {
        "normal": lambda: random.randn(9, width),
        "two clumps": lambda: random.randn(9, width) * 1e-3 + random.randint(0, 2, (9, width)),
        "few values": lambda: np.round(random.randn(9, width)),
        "powers": lambda: 10.0 ** random.randint(-30, 37, (9, width)) * random.randn(9, width),
    }[kind]().astype(np.float32)
    values[:, 0] = -np.inf
    for count in sorted({0, 1, 2, width // 100, width // 4, width // 2, width - 2, width - 1}):
        mask, threshold = take(values, count)
        for row, got, t in zip(values, np.asarray(mask), np.asarray(threshold), strict=True):
            np.testing.assert_array_equal(got, want(row, count))
            assert t == np.inf if count == 0 else row[~got].max(initial=-np.inf) <= t <= row[got].min()


def test_rows_are_searched_a_few_at_a_time_and_their_number_does_not_matter(monkeypatch):
    values = np.random.RandomState(0).randn(24, 64).astype("f4")
    whole = take(values, 7)
    monkeypatch.setattr(_threshold, "CACHED", 64 * 4)
    jax.clear_caches()
    assert "f32[4,64]" in str(jax.make_jaxpr(take)(values, 7))
    for a, b in zip(whole, take(values, 7), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_search_always_ends():
    """Also for NaN, a `high` that is too low, and a count that is too large."""
    nan = jnp.full((2, 16), jnp.nan, "f4")
    few = jnp.ones((2, 16), "f4").at[:, 3:].set(-jnp.inf)
    for values, count in ((nan, 3), (few, 9)):
        cut = _threshold.threshold(
            values, count, low=jnp.full(2, -2.0, "f4"), reach=jnp.full(2, 16, jnp.int32), high=jnp.full(2, 0.5, "f4")
        )
        assert jax.block_until_ready(cut.value).shape == (2,)
