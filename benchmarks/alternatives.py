"""Other rules of which negatives are clipped, beside the two scopes of tcq, on the same embedded views.

    python benchmarks/alternatives.py --config=configs/folder.py:caltech101,embedder=examples/litert.py:embed \\
        --workdir=runs/alternatives --rules batch=0.03 positive=0.8 quantile=0.1 codewords=4 mixture=0.03 \\
        --seeds 0 1 2 -- --config.data.query=0.2 --config.loss.temperature=0.2

A rule is a name and a number:

    anchor=SHARE      the most similar negatives of each anchor
    batch=SHARE       the most similar pairs of the batch
    mixture=SHARE     half of the share by each of the two
    positive=FACTOR   negatives more similar than FACTOR times the anchor's own positive
    mean=FACTOR       negatives more similar than FACTOR times the mean positive of the batch
    quantile=Q        negatives more similar than the Q-quantile of all positives of the batch, at most CAP of the pairs
    codewords=COUNT   negatives that share at least COUNT codewords of the hard code with the anchor

Every rule is a mask of the dense similarities, in the place of tcq's loss; the rest is `tcq train` and `tcq evaluate`.
The score is that of the best checkpoint by validation: mAP of the validation images / of the test queries.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tcq import config as configs
from tcq import evaluate, quantizer
from tcq.runtime import log
from tcq.train import step, train

CAP = 0.2


def masked(rule: str, s: Any, negative: Any, positive: Any, codes: Any) -> Any:
    """Which pairs (2B, 2B) are clipped; s are similarities, `negative` says which pairs are negatives."""
    name, _, text = rule.partition("=")
    value, low = float(text), jnp.where(negative, s, -jnp.inf)

    def most(values: Any, share: float) -> Any:
        """The smallest of the `share` largest of the negatives in each row."""
        ordered = jnp.sort(values, axis=-1)
        count = jnp.floor(share * jnp.sum(values > -jnp.inf, axis=-1, dtype=jnp.float32)).astype(int)
        return jnp.take_along_axis(ordered, (values.shape[-1] - jnp.maximum(count, 1))[..., None], axis=-1)

    if name == "anchor":
        return low >= most(low, value)
    if name == "batch":
        return low >= most(low.reshape(1, -1), value)
    if name == "mixture":
        return (low >= most(low, value / 2)) | (low >= most(low.reshape(1, -1), value / 2))
    if name == "positive":
        return low > value * positive[:, None]
    if name == "mean":
        return low > value * jnp.mean(positive)
    if name == "quantile":
        return low > jnp.maximum(jnp.quantile(positive, value), most(low.reshape(1, -1), CAP))
    assert name == "codewords", rule
    return negative & (jnp.sum(codes[:, None] == codes[None], axis=-1) >= value)


def loss_by(rule: str) -> Any:
    """The loss of `tcq.train.step`, for one device, with a rule of clipping; the pairing is "cross"."""

    def loss(trainer: Any, state: Any, params: Any, embedded: Any) -> Any:
        config, model, b = trainer.config, trainer.model, embedded.shape[1]
        assert config.loss.pairing == "cross" and jax.device_count() == 1
        stopped = step._stop_frozen_gradients(params, config)
        out: Any = model.apply({"params": stopped}, embedded.reshape(2 * b, -1), method="head")
        codes = quantizer.hard_assign(out.features, out.codebooks, metric=model.metric)
        features, recons = (jnp.split(x, 2) for x in (out.features, out.reconstructions))
        parts = [one_pair(features[i], recons[1 - i], codes, config.loss.temperature) for i in (0, 1)]
        value, logs = jax.tree.map(lambda *x: sum(x) / 2, *parts)
        share = quantizer.codeword_share(codes, num_codewords=model.num_codewords)
        return value, (logs | {"loss": value}, share, out.weights.reshape(2, b, *out.weights.shape[1:]))

    def one_pair(first: Any, second: Any, codes: Any, temperature: float) -> Any:
        b, place = len(first), jnp.arange(2 * len(first))
        rows = jnp.concatenate([first, second])
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        s = rows @ rows.T
        positive = jnp.tile(jnp.sum(rows[:b] * rows[b:], axis=1), 2)
        negative = (place[:, None] % b) != (place[None] % b)
        clipped = masked(rule, *jax.lax.stop_gradient((s, negative, positive, codes)))
        kept = jnp.where(negative & ~clipped, s / temperature, -jnp.inf)
        every = jnp.concatenate([positive[:, None] / temperature, kept], axis=1)
        logs = {
            "positive_similarity": jnp.mean(positive),
            "negative_similarity": jnp.mean(s, where=negative),
            "accuracy": jnp.mean(positive > jnp.max(jnp.where(negative, s, -1), axis=1), dtype=jnp.float32),
            "clipped": jnp.sum(clipped, dtype=jnp.float32) / jnp.sum(negative, dtype=jnp.float32),
        }
        return jnp.mean(jax.nn.logsumexp(every, axis=1) - every[:, 0]), logs

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args()
    log.show(logging.WARNING)
    print("| rule | validation / test | clipped at the end |\n|---|---|---|")
    for rule in a.rules:
        scores, shares = [], []
        for seed in a.seeds:
            workdir = a.workdir / f"{rule}-{seed}"
            if not (workdir / "results.json").is_file():
                step.loss = loss_by(rule)
                overrides = [o.removeprefix("--config.") for o in a.overrides]
                train(configs.load(a.config, [*overrides, f"train.seed={seed}"]), workdir)
                evaluate.evaluate(workdir)
            results = json.loads((workdir / "results.json").read_text())
            scores.append((results["validation"]["mAP"], results["mAP"]["asymmetric"]))
            lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
            shares.append([line["train/clipped"] for line in lines if "train/clipped" in line][-1])
        (validation, test), spread = np.mean(scores, axis=0), np.std([s[0] for s in scores])
        print(f"| {rule} | {validation:.3f} +- {spread:.3f} / {test:.3f} | {np.mean(shares):.1%} |", flush=True)


if __name__ == "__main__":
    main()
