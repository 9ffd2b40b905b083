"""Values computed from a config: bits, steps, the clip rule, the scoring conventions."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array
from ml_collections import ConfigDict

from tcq import quantizer

ROUNDING = 1 + 1e-6  # a share of 0.29 of 100 negatives is 29, although 0.29 * 100 is below it in floats
SHORT_WARMUP = 0.1  # share of a run for the warm-up if the configured one does not fit


def bits(config: ConfigDict) -> int:
    """Bits per image: M * log2(K)."""
    return config.quantizer.num_codebooks * quantizer.code_bits(config.quantizer.num_codewords)


def total_steps(config: ConfigDict, num_train: int) -> int:
    """Steps of the run: `train.total_steps`, or those of `train.total_epochs`, rounded up.

    An epoch has `num_train` images.
    """
    if config.train.total_steps:
        return config.train.total_steps
    return max(1, -int(-config.train.total_epochs * num_train // config.data.batch_size))


def warmup_steps(config: ConfigDict, steps: int) -> int:
    """Steps of warm-up, from `optim.warmup_steps`.

    It is a count, or a share (float) of the `steps` of the run. A count that does not fit the run is replaced by a
    tenth of the run.
    """
    warmup = config.optim.warmup_steps
    if isinstance(warmup, float):
        return round(warmup * steps)
    return warmup if warmup < steps else round(SHORT_WARMUP * steps)


def clip_amount(clip: int | float | str) -> int | float:
    """`loss.clip` as a count (int) or a share of the negatives (float).

    "kinds=N" is the share 1 / N. Raises ValueError for another text or N below 2.
    """
    if not isinstance(clip, str):
        return clip
    name, _, kinds = clip.partition("=")
    if name != "kinds" or not kinds.isdecimal() or int(kinds) < 2:
        raise ValueError(
            f"loss.clip {clip!r} must be a count such as 25, a share such as 0.1, or kinds=N with N from 2"
        )
    return 1 / int(kinds)


@dataclass(frozen=True)
class ClipRule:
    """How many negatives of each anchor are clipped: the meaning of the keys `loss.clip*`.

    With scope "batch" the count is the mean over the anchors, and a float.
    """

    clip: int | float  # a count, or as a float a fraction of the negatives
    negatives: int  # of each anchor in the global batch, 2B - 2
    start: float  # step after which the count grows from 0
    full: float  # step from which it is complete; 0: from the first step on
    ramp: str  # how it grows in between: "linear" or "cosine"
    scope: str = "anchor"  # `losses.nt_xent`'s clip_scope

    def count(self, step: ArrayLike | None = None, *, queued: ArrayLike = 0) -> float | Array:
        """The count at a step (from 0), or when it is complete if no step is given.

        `queued` further negatives of each anchor are in the queue; a fraction is also one of these.
        A Python number if it is constant during the run, else an array that may be traced.
        """
        if step is None:
            if not isinstance(self.clip, float):
                return self.clip
            count: Any = self.clip * (self.negatives + queued)
            return float(count) if self.scope == "batch" else int(count * ROUNDING)
        if not self.clip or not (self.full or self._grows_with(queued)):
            return self.count()
        complete: ArrayLike = self.count()
        if self._grows_with(queued):
            complete = self._whole(jnp.float32(self.clip) * (self.negatives + queued))
        count = self._whole(complete * self._share(step))
        return jnp.asarray(count) if self.scope == "batch" else jnp.asarray(count).astype(jnp.int32)

    def _whole(self, count: ArrayLike) -> ArrayLike:
        return count if self.scope == "batch" else jnp.floor(count * ROUNDING)

    def _grows_with(self, queued: ArrayLike) -> bool:
        return isinstance(self.clip, float) and not isinstance(queued, int)

    def _share(self, step: ArrayLike) -> Array:
        """The share of the complete count at a step, float32."""
        if not self.full:
            return jnp.ones((), jnp.float32)
        step = jnp.asarray(step, jnp.float32)
        share = jnp.clip((step - self.start + 1) / max(self.full - self.start, 1), 0, 1)
        return (1 - jnp.cos(jnp.pi * share)) / 2 if self.ramp == "cosine" else share

    def of_negatives(self, negatives: int, *, queue: int) -> float:
        """The count for a batch with another number of negatives and no queue: the same share.

        A count is one of the training batch and its `queue`. In scope "anchor" the result is rounded down.
        """
        share = self.clip if isinstance(self.clip, float) else self.clip / (self.negatives + queue)
        count = min(share * negatives, float(negatives))
        return count if self.scope == "batch" else int(count * ROUNDING)

    def text(self, *, queued: int = 0) -> str:
        """The complete count and what it is a count of, for the log."""
        count, negatives = self.count(queued=queued), self.negatives + queued
        if self.scope == "batch":
            return f"the most similar {count / negatives:.2%} of all negative pairs clipped"
        return f"{count} of {negatives} negatives clipped"


def clip_rule(config: ConfigDict, steps: int) -> ClipRule:
    """The rule of the keys `loss.clip*` for a run of some steps."""
    c, negatives = config.loss, 2 * config.data.batch_size - 2
    start, full = c.clip_from * steps, c.clip_full * steps
    return ClipRule(clip_amount(c.clip), negatives, start, full, c.clip_ramp, c.clip_scope)


class Conventions(NamedTuple):
    """How a ranking is scored; see `metrics`."""

    ties: str = "expected"
    denominator: str = "hits"
    empty: str = "zero"


def conventions(config: ConfigDict) -> Conventions:
    """The conventions of `config.eval`."""
    return Conventions(config.eval.ties, config.eval.denominator, config.eval.empty)


def query_norm(config: ConfigDict) -> str:
    """The normalization of queries: `eval.normalize`, with "auto" resolved.

    It is an argument of `ranking.lookup_table`. "auto" is what the training loss compares: with pairing "quantized" and
    metric "ip" it is reconstructions, which depend on unit subvectors only; otherwise the features as they are.
    """
    if config.eval.normalize != "auto":
        return str(config.eval.normalize)
    return "subvectors" if (config.loss.pairing, config.quantizer.metric) == ("quantized", "ip") else "none"
