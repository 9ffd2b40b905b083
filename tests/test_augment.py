import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tcq import augment

OFF = dict.fromkeys(
    [
        "crop",
        "stretch",
        "rotate",
        "shift",
        "flip",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "jitter",
        "grayscale",
        "blur",
    ],
    0.0,
)


@pytest.fixture
def image():
    return jnp.asarray(np.random.RandomState(0).rand(16, 16, 3), jnp.float32)


def test_identity_at_strength_zero(image):
    np.testing.assert_array_equal(augment.random_view(jax.random.key(0), image, OFF), image)


@pytest.mark.parametrize("name", [n for n in OFF if n not in ("jitter", "brightness", "contrast", "saturation", "hue")])
def test_each_piece_changes_the_image_and_stays_in_range(image, name):
    strength = {"rotate": 20.0, "stretch": 0.3, "shift": 0.2, "crop": 0.7}.get(name, 1.0)
    view = augment.random_view(jax.random.key(1), image, OFF | {name: strength})
    assert view.shape == image.shape and view.dtype == jnp.float32
    assert float(jnp.abs(view - image).max()) > 0.01
    assert float(view.min()) >= 0 and float(view.max()) <= 1


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_needs_jitter(image, name):
    strengths = OFF | {name: 0.4}
    np.testing.assert_array_equal(augment.random_view(jax.random.key(1), image, strengths), image)
    view = augment.random_view(jax.random.key(1), image, strengths | {"jitter": 1.0})
    assert float(jnp.abs(view - image).max()) > 0.01


def test_a_view_is_a_function_of_its_key(image):
    strong = OFF | {"crop": 0.5, "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "hue": 0.1, "blur": 0.5, "rotate": 10.0}
    one = augment.random_view(jax.random.key(5), image, strong)
    batch = jax.vmap(lambda k, x: augment.random_view(k, x, strong))(
        jax.random.split(jax.random.key(9), 3).at[1].set(jax.random.key(5)), jnp.stack([image] * 3)
    )
    np.testing.assert_allclose(batch[1], one, atol=1e-6)
    assert float(jnp.abs(batch[0] - batch[2]).max()) > 0.01


def test_crop_takes_a_part_of_the_image():
    """Of a horizontal ramp every crop is a shorter ramp, as long as the share of the width that it takes."""
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 32)[None, :, None], (32, 32, 3))
    spans = []
    for seed in range(40):
        view = augment.random_warp(jax.random.key(seed), ramp, crop=0.75, stretch=0.0, degrees=0.0, shift=0.0)
        steps = np.diff(np.asarray(view)[16, 2:-2, 0])
        assert np.ptp(steps) < 2e-2
        spans.append(steps.mean() * 31)
    assert 0.5 <= min(spans) < 0.6 and 0.9 < max(spans) <= 1.01  # widths from sqrt(0.25) to 1


def test_rotation_turns_ramps_by_at_most_its_degrees():
    """Ramps along x and y (red and green), rotated by one angle: each rises by its cosine and +- its sine."""
    ramp = jnp.linspace(0.25, 0.75, 17)
    image = jnp.stack(jnp.broadcast_arrays(ramp[None, :], ramp[:, None], jnp.float32(0)), axis=-1)
    angles = []
    for seed in range(30):
        view = augment.random_warp(jax.random.key(seed), image, crop=0.0, stretch=0.0, degrees=30.0, shift=0.0)
        middle = np.asarray(view)[6:11, 6:11]
        rise = [
            [np.diff(middle[..., c], axis=a).mean() * 32 for a in (1, 0)] for c in (0, 1)
        ]  # by channel, along x and y
        angle = np.arctan2(-rise[0][1], rise[0][0])
        cos, sin = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(rise, [[cos, -sin], [sin, cos]], atol=1e-3)
        np.testing.assert_allclose(middle[2, 2, :2], 0.5, atol=1e-3)  # the centre stays
        angles.append(np.degrees(angle))
    assert np.abs(angles).max() <= 30.1
    assert min(angles) < -15
    assert max(angles) > 15


def test_shift_moves_by_at_most_its_share():
    dot = jnp.zeros((16, 16, 3)).at[8, 8].set(1.0)
    offsets = []
    for seed in range(30):
        view = np.asarray(
            augment.random_warp(jax.random.key(seed), dot, crop=0.0, stretch=0.0, degrees=0.0, shift=0.125)
        )
        weight = view[..., 0] / view[..., 0].sum()
        offsets.append([(weight.sum(1 - a) * np.arange(16)).sum() - 8 for a in (0, 1)])
    assert np.abs(offsets).max() <= 2.01 and np.abs(offsets).max() > 1.5
    assert np.min(offsets) < -1 and np.max(offsets) > 1


def test_flip_is_a_mirror(image):
    np.testing.assert_array_equal(augment.random_flip(jax.random.key(0), image, probability=1.0), image[:, ::-1])
    flips = [bool(jnp.all(augment.random_flip(jax.random.key(s), image, probability=0.5) == image)) for s in range(200)]
    assert 70 < sum(flips) < 130


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.2, 0.5])
def test_hue_equals_colorsys(image, turn):
    ours = np.asarray(augment.rotate_hue(image, jnp.float32(turn)))
    for y, x in [(0, 0), (3, 7), (15, 15)]:
        h, s, v = colorsys.rgb_to_hsv(*np.asarray(image[y, x], np.float64))
        np.testing.assert_allclose(ours[y, x], colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=1e-5)
    gray = jnp.full((2, 2, 3), 0.3)
    np.testing.assert_allclose(augment.rotate_hue(gray, jnp.float32(turn)), gray, atol=1e-6)


def test_blur_keeps_the_mean_of_a_flat_image_and_smooths_noise(image):
    flat = jnp.full((16, 16, 3), 0.4)
    np.testing.assert_allclose(augment.random_blur(jax.random.key(0), flat, probability=1.0), flat, atol=1e-6)
    smooth = [float(augment.random_blur(jax.random.key(s), image, probability=1.0).std()) for s in range(8)]
    assert max(smooth) <= float(image.std()) + 1e-6 and min(smooth) < 0.7 * float(image.std())


def test_grayscale_has_equal_channels(image):
    gray = augment.random_grayscale(jax.random.key(0), image, probability=1.0)
    np.testing.assert_allclose(gray[..., 0], image @ jnp.array([0.299, 0.587, 0.114]), atol=1e-6)
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])


def test_views_of_embeddings_are_drops_and_noise():
    random = np.random.RandomState(0)
    rows = jnp.asarray(random.randn(400, 50), jnp.float32)
    mean, std = jnp.full(50, 9.0), jnp.linspace(0, 2, 50)
    keys = jax.random.split(jax.random.key(0), 400)
    same = augment.noisy_views(rows, mean, std, keys, {"noise": 0.0, "drop": 0.0})
    np.testing.assert_array_equal(same, [rows, rows])
    first, second = augment.noisy_views(rows, mean, std, keys, {"noise": 0.5, "drop": 0.0})
    np.testing.assert_allclose(np.std(first - rows, axis=0), 0.5 * std, rtol=0.15)
    assert abs(np.mean((first - rows) * (second - rows))) < 0.05  # the two views differ
    dropped = np.stack(augment.noisy_views(rows, mean, std, keys, {"noise": 0.0, "drop": 0.2}))
    gone = dropped == 9
    np.testing.assert_array_equal(dropped[~gone], np.stack([rows, rows])[~gone])
    assert 0.19 < gone.mean() < 0.21 and 0.03 < gone.all(axis=0).mean() < 0.05  # and so do their drops
