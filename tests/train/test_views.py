"""A frozen backbone embeds every view once, and the step trains on the stored features."""

import json

import jax
import numpy as np
import pytest

import small
from tcq import encode, train
from tcq.config import checks
from tcq.models import retriever
from tcq.train import run

PLAIN = ("optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip_norm=0", "optim.warmup_steps=0")
EMBEDDED = ("data.views=3", "optim.frozen_blocks=-1", "model.pooling=cls", "model.dropout=0.5")


def encoder(config):
    _, _, start = small.first_step(config)
    return encode.Encoder(config, retriever.from_config(config), {"params": start.params}, 0)


def test_an_image_has_that_many_views():
    c = small.config(*EMBEDDED, "data.augment.crop=0.5")
    images, _, _ = small.first_step(c)
    rows = encode.embed_views(encoder(c), images, np.array([5, 3, 60]))
    assert rows.shape == (3, 3, 16) and len(np.unique(rows.reshape(9, -1), axis=0)) == 9
    again = encode.embed_views(encoder(c), images, np.array([60, 5]))
    np.testing.assert_allclose(again, rows[[2, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.whole
def test_training_on_stored_features_equals_training_on_images():
    c = small.config(*PLAIN, *EMBEDDED, "data.augment.crop=0.5", "optim.learning_rate=0.5", "loss.clip=0.2")
    images, body, start = small.first_step(c)
    rows = encode.embed_views(encoder(c), images, np.arange(64))

    def steps(rows, n):
        batches = [small.batch(rows[16 * i : 16 * (i + 1)], n, 16 * i) for i in range(4)]
        results = small.run_steps(body, start, batches, n)
        return results[-1][0], [logs["loss"] for _, logs in results]

    def flops(rows):
        cost = small.compiled(body, 1).lower(start, (), small.batch(rows[:16], 1)).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    want = steps(images, 1)
    assert len({round(float(x), 3) for x in want[1]}) == 4
    for n in (1, 8):
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(steps(rows, n)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    assert flops(rows) < 0.5 * flops(images)


@pytest.mark.whole
def test_a_run_with_stored_features_equals_one_without(tmp_path, monkeypatch, logs):
    c = small.config(*EMBEDDED)
    train.train(c, tmp_path / "once")
    assert "views embedded once" in logs.text
    monkeypatch.setattr(run, "_training_rows", lambda config, model, source, split, state: (source.images, split.train))
    train.train(c, tmp_path / "each")
    lines = [
        [json.loads(x) for x in (tmp_path / w / "metrics.jsonl").read_text().splitlines()] for w in ("once", "each")
    ]
    for a, b in zip(*lines, strict=True):
        for key in a.keys() - {k for k in a if k.startswith("speed/")}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


def test_one_view_is_refused():
    with pytest.raises(checks.ConfigError, match="data.views 1"):
        small.config("data.views=1")
