"""Random views of one image given a key; `vmap` makes them views of a batch. Runs on the device, inside the step.

Images are float32 (H, W, 3) in [0, 1], and so are views. Every strength is an argument; at strength 0 a piece returns its
input unchanged and costs nothing. The recipe follows SimCLR (Chen et al. 2020), with rotation and shift added.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Image = Float[Array, "H W 3"]


def random_view(key: Key[Array, ""], image: Image, strengths: Mapping[str, float]) -> Image:
    """One random view, float32 (H, W, 3) in [0, 1].

    Args:
      key: everything random in the view is drawn from it.
      image: float32 (H, W, 3) in [0, 1].
      strengths: `crop`: the largest share of the area cut away, 0 to below 1; `stretch`: log of the largest aspect-ratio
        change; `rotate`: degrees; `shift`: share of the side; `flip`: probability; `brightness`, `contrast`,
        `saturation`: factors drawn from 1 +- strength; `hue`: largest turn, 0 to 0.5 of the circle; `jitter`:
        probability that the colour changes happen; `grayscale`: probability; `blur`: probability of a Gaussian blur
        with sigma from 0.1 to 2 pixels (scaled by side / 224 above 224).
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
    """A random rectangle, perhaps turned, resized to the whole: resampled once, because every resampling blurs.

    The rectangle has an area of 1 - crop to 1 of the image and its aspect ratio times exp(+-stretch); it is turned by up
    to +-degrees about its centre and moved by up to +-shift of each side. What lies outside the image repeats its edge.
    Without turn and shift the resizing is antialiased.
    """
    if crop == stretch == degrees == shift == 0:
        return image
    area_key, ratio_key, place_key, angle_key, shift_key = jax.random.split(key, 5)
    area = jax.random.uniform(area_key, minval=1 - crop, maxval=1.0)
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-stretch, maxval=stretch))
    extent = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), 1.0)  # height and width as shares
    corner = jax.random.uniform(place_key, (2,)) * (1 - extent)
    size = jnp.array(image.shape[:2], jnp.float32)
    if degrees == shift == 0:
        scale, offset = 1 / extent, -corner * size / extent
        return jnp.clip(jax.image.scale_and_translate(image, image.shape, (0, 1), scale, offset, method="linear"), 0, 1)

    angle = jnp.deg2rad(jax.random.uniform(angle_key, minval=-degrees, maxval=degrees))
    moved = jax.random.uniform(shift_key, (2,), minval=-shift, maxval=shift)
    centre = (corner + extent / 2 + moved) * size
    y, x = jnp.meshgrid(*((jnp.arange(n) + 0.5) / n - 0.5 for n in image.shape[:2]), indexing="ij")
    y, x = y * extent[0] * size[0], x * extent[1] * size[1]  # pixels of the source, from the centre of the rectangle
    source_y = jnp.cos(angle) * y + jnp.sin(angle) * x + centre[0] - 0.5
    source_x = -jnp.sin(angle) * y + jnp.cos(angle) * x + centre[1] - 0.5

    def sample(plane: Float[Array, "H W"]) -> Float[Array, "H W"]:
        return jax.scipy.ndimage.map_coordinates(plane, [source_y, source_x], order=1, mode="nearest")

    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def random_flip(key: Key[Array, ""], image: Image, *, probability: float) -> Image:
    """Left and right exchanged with the given probability."""
    if probability == 0:
        return image
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


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
    """Brightness, contrast, saturation and hue changed in this order, all or none with the given probability."""
    if probability == 0 or brightness == contrast == saturation == hue == 0:
        return image
    happen_key, *keys = jax.random.split(key, 5)
    changed = image

    def factor(key: Key[Array, ""], strength: float) -> Float[Array, ""]:
        return jax.random.uniform(key, minval=max(0.0, 1 - strength), maxval=1 + strength)

    if brightness:
        changed = jnp.clip(changed * factor(keys[0], brightness), 0, 1)
    if contrast:
        mean = jnp.mean(luminance(changed))
        changed = jnp.clip(mean + (changed - mean) * factor(keys[1], contrast), 0, 1)
    if saturation:
        gray = luminance(changed)[..., None]
        changed = jnp.clip(gray + (changed - gray) * factor(keys[2], saturation), 0, 1)
    if hue:
        changed = turn_hue(changed, jax.random.uniform(keys[3], minval=-hue, maxval=hue))
    return jnp.where(jax.random.bernoulli(happen_key, probability), changed, image)


def random_grayscale(key: Key[Array, ""], image: Image, *, probability: float) -> Image:
    """Colour replaced by luminance with the given probability."""
    if probability == 0:
        return image
    gray = jnp.broadcast_to(luminance(image)[..., None], image.shape)
    return jnp.where(jax.random.bernoulli(key, probability), gray, image)


def random_blur(key: Key[Array, ""], image: Image, *, probability: float) -> Image:
    """Gaussian blur with the given probability; kernel about a tenth of the side and odd, edges repeated."""
    if probability == 0:
        return image
    happen_key, sigma_key = jax.random.split(key)
    side = min(image.shape[:2])
    radius = max(1, side // 20)
    sigma = jax.random.uniform(sigma_key, minval=0.1, maxval=2.0) * max(1.0, side / 224)
    taps = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / jnp.sum(taps)
    blurred = image
    for axis in (0, 1):  # a Gaussian is separable: shifted copies, weighted and added
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(blurred, padding, mode="edge")
        n = image.shape[axis]
        blurred = sum(
            (taps[i] * jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(2 * radius + 1)),
            start=jnp.zeros_like(image),
        )
    return jnp.where(jax.random.bernoulli(happen_key, probability), jnp.clip(blurred, 0, 1), image)


def luminance(image: Image) -> Float[Array, "H W"]:
    """ITU-R BT.601 luma."""
    return image @ jnp.array([0.299, 0.587, 0.114])


def turn_hue(image: Image, turn: Float[Array, ""]) -> Image:
    """Hue moved by `turn` of the circle (HSV), saturation and value kept."""
    value, low = jnp.max(image, -1), jnp.min(image, -1)
    spread = value - low
    safe = jnp.where(spread == 0, 1.0, spread)
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    hue = jnp.where(
        value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # in sixths of the circle
    hue = hue[..., None] + 6 * turn
    channel = jnp.array([5.0, 3.0, 1.0])  # formula with k = (n + hue) mod 6, n = 5, 3, 1 for red, green, blue
    k = jnp.mod(channel + hue, 6.0)
    return value[..., None] - spread[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)
