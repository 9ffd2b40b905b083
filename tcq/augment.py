"""Random views of one image from a key; `vmap` them over a batch.

They run on the device, inside the training step. Images and views are float32 (H, W, 3) in [0, 1]. Every strength is an
argument; at strength 0 a function returns its input and costs nothing. The recipe follows SimCLR (Chen et al. 2020),
with rotation and shift added.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

Image = Float[Array, "H W 3"]


def noisy_views(
    rows: Float[Array, "b F"],
    mean: Float[Array, " F"],
    std: Float[Array, " F"],
    keys: Key[Array, " b"],
    strengths: Mapping[str, float],
) -> tuple[Float[Array, "b F"], Float[Array, "b F"]]:
    """Two views of each embedding, in feature space (our choice).

    A view has each number at its `mean` instead with probability `drop`, and then normal noise of `noise` times `std`.
    """

    def pair(key: Key[Array, ""], row: Float[Array, " F"]) -> Float[Array, "2 F"]:
        both = jnp.stack([row, row])
        if strengths["drop"]:
            dropped = jax.random.bernoulli(jax.random.fold_in(key, 1), jnp.float32(strengths["drop"]), both.shape)
            both = jnp.where(dropped, mean[None], both)
        return both + strengths["noise"] * std[None] * jax.random.normal(key, both.shape, jnp.float32)

    pairs = jax.vmap(pair)(keys, rows)
    return pairs[:, 0], pairs[:, 1]


def random_view(key: Key[Array, ""], image: Image, strengths: Mapping[str, float]) -> Image:
    """One random view, float32 (H, W, 3) in [0, 1].

    Args:
      key: the only source of randomness.
      image: float32 (H, W, 3) in [0, 1].
      strengths: `crop`: largest share of the area that is cut away, in [0, 1); `stretch`: log of the largest change of
        the aspect ratio; `rotate`: degrees; `shift`: share of the side; `flip`: probability; `brightness`, `contrast`,
        `saturation`: factors are drawn from 1 +- strength; `hue`: largest rotation, 0 to 0.5 of the circle; `jitter`:
        probability of the four colour changes; `grayscale`: probability; `blur`: probability of a Gaussian blur with
        sigma from 0.1 to 2 pixels (times side / 224 above 224 pixels).
    """
    warp_key, flip_key, jitter_key, gray_key, blur_key = jax.random.split(key, 5)
    s = strengths
    image = random_warp(warp_key, image, crop=s["crop"], stretch=s["stretch"], degrees=s["rotate"], shift=s["shift"])
    image = random_flip(flip_key, image, probability=s["flip"])
    image = color_jitter(
        jitter_key,
        image,
        brightness=s["brightness"],
        contrast=s["contrast"],
        saturation=s["saturation"],
        hue=s["hue"],
        probability=s["jitter"],
    )
    image = random_grayscale(gray_key, image, probability=s["grayscale"])
    return random_blur(blur_key, image, probability=s["blur"])


def random_warp(
    key: Key[Array, ""], image: Image, *, crop: float, stretch: float, degrees: float, shift: float
) -> Image:
    """Returns a random rectangle of the image, rotated, shifted and resized in one resampling.

    Its area is 1 - crop to 1 of the image, its aspect ratio that of the image times exp(+-stretch); it is rotated by up
    to +-degrees about its centre and shifted by up to +-shift of each side. Outside the image the edge is repeated.
    Without rotation and shift the resizing is antialiased.
    """
    if crop == stretch == degrees == shift == 0:
        return image
    area_key, ratio_key, place_key, angle_key, shift_key = jax.random.split(key, 5)
    area = _uniform(area_key, 1 - crop, 1.0)
    ratio = jnp.exp(_uniform(ratio_key, -stretch, stretch))
    extent = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), 1.0)  # height and width as shares
    corner = _uniform(place_key, 0.0, 1.0, (2,)) * (1 - extent)
    size = jnp.array(image.shape[:2], jnp.float32)
    if degrees == shift == 0:
        scale, offset = 1 / extent, -corner * size / extent
        return jnp.clip(jax.image.scale_and_translate(image, image.shape, (0, 1), scale, offset, method="linear"), 0, 1)

    angle = jnp.deg2rad(_uniform(angle_key, -degrees, degrees))
    move = _uniform(shift_key, -shift, shift, (2,))
    centre = (corner + extent / 2 + move) * size
    y, x = jnp.meshgrid(*((jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 0.5 for n in image.shape[:2]), indexing="ij")
    y, x = y * extent[0] * size[0], x * extent[1] * size[1]  # in pixels of the image, from the centre of the rectangle
    source_y = jnp.cos(angle) * y + jnp.sin(angle) * x + centre[0] - 0.5
    source_x = -jnp.sin(angle) * y + jnp.cos(angle) * x + centre[1] - 0.5

    def sample(plane: Float[Array, "H W"]) -> Float[Array, "H W"]:
        return jax.scipy.ndimage.map_coordinates(plane, [source_y, source_x], order=1, mode="nearest")

    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def random_flip(key: Key[Array, ""], image: Image, *, probability: float) -> Image:
    """The image or, with the given probability, its mirror image."""
    if probability == 0:
        return image
    return jnp.where(_bernoulli(key, probability), image[:, ::-1], image)


def color_jitter(
    key: Key[Array, ""],
    image: Image,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float = 1.0,
) -> Image:
    """Changes brightness, contrast, saturation and hue, in this order.

    With the given probability all changes are made, otherwise none.
    """
    if probability == 0 or brightness == contrast == saturation == hue == 0:
        return image
    apply_key, *keys = jax.random.split(key, 5)
    changed = image

    def factor(key: Key[Array, ""], strength: float) -> Float[Array, ""]:
        return _uniform(key, max(0.0, 1 - strength), 1 + strength)

    if brightness:
        changed = jnp.clip(changed * factor(keys[0], brightness), 0, 1)
    if contrast:
        mean = jnp.mean(luminance(changed))
        changed = jnp.clip(mean + (changed - mean) * factor(keys[1], contrast), 0, 1)
    if saturation:
        gray = luminance(changed)[..., None]
        changed = jnp.clip(gray + (changed - gray) * factor(keys[2], saturation), 0, 1)
    if hue:
        changed = rotate_hue(changed, _uniform(keys[3], -hue, hue))
    return jnp.where(_bernoulli(apply_key, probability), changed, image)


def random_grayscale(key: Key[Array, ""], image: Image, *, probability: float) -> Image:
    """The image or, with the given probability, its luminance as gray."""
    if probability == 0:
        return image
    gray = jnp.broadcast_to(luminance(image)[..., None], image.shape)
    return jnp.where(_bernoulli(key, probability), gray, image)


def random_blur(key: Key[Array, ""], image: Image, *, probability: float) -> Image:
    """Applies a Gaussian blur with the given probability.

    The kernel is about a tenth of the side wide; edges are repeated.
    """
    if probability == 0:
        return image
    apply_key, sigma_key = jax.random.split(key)
    side = min(image.shape[:2])
    radius = max(1, side // 20)
    sigma = _uniform(sigma_key, 0.1, 2.0) * max(1.0, side / 224)
    taps = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1, dtype=jnp.float32) / sigma) ** 2)
    taps = taps / jnp.sum(taps)
    blurred = image
    for axis in (0, 1):  # a Gaussian is separable: one axis after the other, as a weighted sum of shifted copies
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(blurred, padding, mode="edge")
        n = image.shape[axis]
        blurred = sum(
            (taps[i] * jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(2 * radius + 1)),
            start=jnp.zeros_like(image),
        )
    return jnp.where(_bernoulli(apply_key, probability), jnp.clip(blurred, 0, 1), image)


def luminance(image: Image) -> Float[Array, "H W"]:
    """ITU-R BT.601 luma of an image."""
    return image @ jnp.array([0.299, 0.587, 0.114], jnp.float32)


def rotate_hue(image: Image, turn: Float[Array, ""]) -> Image:
    """The image with its hue rotated by `turn` of the circle (HSV); saturation and value stay."""
    value, low = jnp.max(image, -1), jnp.min(image, -1)
    spread = value - low
    safe = jnp.where(spread == 0, 1.0, spread)
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    hue = jnp.where(
        value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # in sixths of the circle
    hue = hue[..., None] + 6 * turn
    n = jnp.array([5.0, 3.0, 1.0], jnp.float32)[None, None]  # for red, green, blue
    k = jnp.mod(n + hue, 6.0)
    return value[..., None] - spread[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


def _bernoulli(key: Key[Array, ""], probability: float) -> Bool[Array, ""]:
    """True with the given probability; the same draws also where JAX's default is float64."""
    return jax.random.bernoulli(key, jnp.float32(probability))


def _uniform(key: Key[Array, ""], low: float, high: float, shape: tuple[int, ...] = ()) -> Float[Array, "*shape"]:
    """Uniform in [low, high), float32 also where JAX's default is float64."""
    return jax.random.uniform(key, shape, jnp.float32, low, high)
