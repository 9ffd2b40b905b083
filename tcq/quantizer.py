"""The differentiable product quantizer.

It has soft and hard assignment, reconstruction and codeword usage.

A feature x of width D is split into M subvectors of width d = D / M. Codebook m holds K codewords of width d.
Soft assignment lets gradients reach features and codebooks; hard assignment gives the stored code.

Two metrics, both from the literature:

* ``"l2"``: softmax of ``-scale * ||x_m - c_mk||^2``; nothing is normalized (SPQ, Jang & Cho 2021).
* ``"ip"``: softmax of ``scale * <x_m, c_mk>`` of unit subvectors and unit codewords (MeCoQ, Wang et al. 2022).
  Pass ``unit_codewords(codebooks)`` to `reconstruct` and `decode`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt

METRICS = ("l2", "ip")
MAX_CODEWORDS = 65_536


def soft_assign(
    x: Float[ArrayLike, "N D"], codebooks: Float[ArrayLike, "M K d"], *, scale: float, metric: str
) -> Float[Array, "N M K"]:
    """Soft codes: for each subvector a distribution over the K codewords.

    Args:
      x: features, (N, D) with D = M * d.
      codebooks: (M, K, d).
      scale: inverse temperature, a factor of the logits (SPQ has 5, MeCoQ 10). As it grows, soft tends to hard.
      metric: "l2" or "ip", see the module's docstring.

    Returns:
      float32 weights (N, M, K) that sum to 1 over the codewords.

    Raises:
      ValueError: the metric is unknown, or D is not M * d.
    """
    return jax.nn.softmax(scale * _logits(x, codebooks, metric=metric), axis=-1)


def hard_assign(x: Float[ArrayLike, "N D"], codebooks: Float[ArrayLike, "M K d"], *, metric: str) -> UInt[Array, "N M"]:
    """Codes: the index of the closest codeword of each codebook; the lowest index among ties.

    Returns uint8 (N, M) for K <= 256, else uint16. Raises ValueError as `soft_assign`, and for K > 65,536.
    """
    codes = jnp.argmax(_logits(x, codebooks, metric=metric), axis=-1)
    return codes.astype(code_dtype(jnp.asarray(codebooks).shape[1]))


def reconstruct(weights: Float[ArrayLike, "N M K"], codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, "N D"]:
    """Soft reconstructions: weighted sums of codewords, concatenated. float32 (N, D).

    Raises ValueError if the shapes do not fit.
    """
    weights, codebooks = jnp.asarray(weights, jnp.float32), jnp.asarray(codebooks, jnp.float32)
    if weights.ndim != 3 or weights.shape[1:] != codebooks.shape[:2]:
        raise ValueError(
            f"weights {weights.shape} do not fit codebooks {codebooks.shape}: must be (N, M, K) and (M, K, d)"
        )
    z = jnp.einsum("nmk,mkd->nmd", weights, codebooks, precision="highest")
    return z.reshape(z.shape[0], -1)


def decode(codes: UInt[ArrayLike, "N M"], codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, "N D"]:
    """Hard reconstructions: the codewords of each code, concatenated. float32 (N, D).

    Raises ValueError if the shapes do not fit.
    """
    codes, codebooks = jnp.asarray(codes), jnp.asarray(codebooks, jnp.float32)
    if codes.ndim != 2 or codes.shape[1] != codebooks.shape[0]:
        raise ValueError(f"codes {codes.shape} do not fit codebooks {codebooks.shape}: must be (N, M) and (M, K, d)")
    z = codebooks[jnp.arange(codebooks.shape[0])[None], codes.astype(jnp.int32)]  # (N, M, d)
    return z.reshape(z.shape[0], -1)


def unit_codewords(codebooks: Float[ArrayLike, "M K d"]) -> Float[Array, "M K d"]:
    """Codewords scaled to unit length, float32; a zero codeword stays zero."""
    return unit(jnp.asarray(codebooks, jnp.float32))


def codeword_share(codes: UInt[ArrayLike, "N M"], *, num_codewords: int) -> Float[Array, "M K"]:
    """The share of the N items that each codeword is assigned to, float32.

    The shares sum to 1 over the codewords.
    """
    codes = jnp.asarray(codes).astype(jnp.int32)
    books = jnp.arange(codes.shape[1])[None]
    return jnp.zeros((codes.shape[1], num_codewords), jnp.float32).at[books, codes].add(1.0 / codes.shape[0])


def codeword_usage(share: Float[ArrayLike, "M K"]) -> Float[Array, " M"]:
    """Perplexity of each codebook's shares: 1 (one codeword used) to K (all used equally)."""
    share = jnp.asarray(share)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1))


def code_dtype(num_codewords: int) -> jnp.dtype:
    """uint8 for up to 256 codewords, uint16 up to 65,536. Raises ValueError for more."""
    if num_codewords > MAX_CODEWORDS:
        raise ValueError(f"{num_codewords} codewords per codebook: must be at most {MAX_CODEWORDS}")
    return jnp.dtype(jnp.uint8 if num_codewords <= 256 else jnp.uint16)


def code_bits(num_codewords: int) -> int:
    """log2(K): bits for one codebook's part of a code. K is a power of two."""
    return num_codewords.bit_length() - 1


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x scaled to unit length along its last axis.

    A zero vector stays zero, with a finite gradient.
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _logits(x: ArrayLike, codebooks: ArrayLike, *, metric: str) -> Float[Array, "N M K"]:
    """The logits of soft assignment for scale 1, for "l2" up to a constant of each subvector."""
    x, codebooks = jnp.asarray(x, jnp.float32), jnp.asarray(codebooks, jnp.float32)
    num_codebooks, _, d = codebooks.shape
    if x.ndim != 2 or x.shape[1] != num_codebooks * d:
        raise ValueError(f"features {x.shape} do not fit codebooks {codebooks.shape}: must be (N, {num_codebooks * d})")
    x = x.reshape(x.shape[0], num_codebooks, d)
    if metric == "ip":
        return jnp.einsum("nmd,mkd->nmk", unit(x), unit(codebooks), precision="highest")
    if metric == "l2":
        # ||x_m||^2 is the same for all K codewords: it cancels in softmax and argmax, and leaving it out is more exact.
        inner = jnp.einsum("nmd,mkd->nmk", x, codebooks, precision="highest")
        return 2 * inner - jnp.sum(codebooks * codebooks, axis=-1)[None]
    raise ValueError(f"metric {metric!r} is unknown: use one of {', '.join(METRICS)}")
