"""Training a part of the model, at rates of its own, on features computed once, from codewords by k-means."""

import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

import small
from tcq import encode, train
from tcq.config import checks
from tcq.models import kmeans as clusters
from tcq.models import retriever
from tcq.runtime import devices as parallel
from tcq.train import optimizer

PLAIN = ("optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip_norm=0", "optim.warmup_steps=0")


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run(config, rows=None, steps=2, devices=1):
    """Some steps: what they change, the state before and after, the losses, and the cost of one in FLOPs."""
    images, body, start = small.step(config)
    rows = images if rows is None else rows
    step = jax.pmap(
        body, parallel.AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=jax.devices()[:devices]
    )
    step = step.lower(start, (), small.batch(rows[:16], devices)).compile()
    state, losses = parallel.replicate(start) if devices == jax.device_count() else start, []
    for i in range(steps):
        state, logs = step(state, (), small.batch(rows[16 * i : 16 * (i + 1)], devices, 16 * i))
        losses.append(float(jax.block_until_ready(logs["loss"])))
    after = parallel.fetch(state)
    old, new = named(start.params), named(after.params)
    cost = step.cost_analysis()
    flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
    return {name for name in old if not np.array_equal(old[name], new[name])}, start, after, losses, flops


class TestRates:
    WANT: ClassVar = {  # of a ViT of two blocks, with layer_decay 0.5 and the rates 0.1, 2 and 3
        "block_1": 0.1 * 0.5,
        "block_0": 0.1 * 0.25,
        "embed": 0.1 * 0.125,
        "positions": 0.1 * 0.125,
        "cls": 0.1 * 0.125,
        "['backbone']['norm']": 0.1,
        "projection": 2,
        "codebooks": 3,
    }

    @pytest.mark.parametrize("name", checks.OPTIMIZERS)
    def test_each_part_moves_at_its_own(self, name):
        rates = ["optim.layer_decay=0.5", "optim.backbone_rate=0.1", "optim.head_rate=2", "optim.codebooks_rate=3"]
        shared = [
            "model.depth=2",
            "model.pooling=cls",
            f"optim.name={name}",
            "optim.warmup_steps=0",
            "optim.clip_norm=0",
        ]
        _, _, start = small.step(small.config(*shared))
        gradient = jax.tree.map(lambda p: jnp.ones_like(p) * 0.1, start.params)
        updates = []
        for overrides in ([], rates):
            rule = optimizer.make(small.config(*shared, *overrides), 10)
            updates.append(named(rule.update(gradient, rule.init(start.params), start.params)[0]))
        for leaf, plain in updates[0].items():
            (want,) = [rate for part, rate in self.WANT.items() if part in leaf]
            np.testing.assert_allclose(updates[1][leaf], plain * want, rtol=1e-5, err_msg=leaf)
            assert float(jnp.abs(plain).max()) > 0

    def test_blocks_of_a_resnet_count_over_its_stages(self):
        c = small.config("model.name=resnet34", "model.stem=cifar", "optim.layer_decay=0.9")
        key = jax.tree_util.DictKey
        for name, behind in {"stem": 17, "stage_0_block_0": 16, "stage_1_block_0": 13, "stage_3_block_2": 1}.items():
            rate = optimizer.rate_of((key("backbone"), key(name), key("kernel")), c)
            assert rate == pytest.approx(0.9**behind), name


class TestFrozen:
    def test_only_what_is_not_frozen_moves_has_state_and_a_backward_pass(self):
        shared = ("model.depth=4", "model.pooling=cls", "optim.learning_rate=0.1", "optim.warmup_steps=0")
        names, sizes, flops = {}, {}, {}
        for frozen in (0, 3, -1):
            names[frozen], start, _, _, flops[frozen] = run(small.config(*shared, f"optim.frozen_blocks={frozen}"))
            sizes[frozen] = sum(np.size(x) for x in jax.tree.leaves(start.opt_state))
        assert names[0] == set(named(start.params))
        last = {n for n in names[0] if "block_3" in n or "'norm'" in n}
        head = {n for n in names[0] if "backbone" not in n}
        assert names[-1] == head and names[3] == head | last
        assert sizes[-1] < sizes[3] < 0.5 * sizes[0]
        assert flops[-1] < flops[3] < 0.8 * flops[0]

    def test_a_frozen_resnet_keeps_its_statistics(self):
        c = small.config("model.name=resnet18", "model.stem=cifar", "optim.frozen_blocks=-1", "optim.warmup_steps=0")
        names, start, after, _, _ = run(c, steps=1)
        jax.tree.map(np.testing.assert_array_equal, start.batch_stats, after.batch_stats)
        assert names and not any("backbone" in n for n in names)

    def test_too_many_blocks_are_refused(self):
        with pytest.raises(checks.ConfigError, match="frozen_blocks 3 is above the 1 blocks"):
            small.config("optim.frozen_blocks=3")


class TestViews:
    CACHED = (
        "data.views=3",
        "optim.frozen_blocks=-1",
        "model.pooling=cls",
        "model.dropout=0.5",
        "data.augment.flip=0.5",
    )

    def test_an_image_has_so_many_views_and_no_more(self):
        c = small.config(*self.CACHED[:2])
        images, _, start = small.step(c)
        model = retriever.from_config(c)
        encoder = encode.Encoder(c, model, {"params": start.params}, 0)
        rows = encode.embed_views(encoder, images, np.array([5, 3, 60]))
        assert rows.shape == (3, 3, 64) and len(np.unique(rows.reshape(9, -1), axis=0)) == 9
        again = encode.embed_views(encoder, images, np.array([60, 5]))
        np.testing.assert_allclose(again, rows[[2, 0]], rtol=1e-4, atol=1e-5)

    def test_training_on_features_computed_once_is_training_on_images(self):
        c = small.config(*PLAIN, *self.CACHED, "optim.learning_rate=0.5", "loss.clip=0.2")
        images, _, start = small.step(c)
        encoder = encode.Encoder(c, retriever.from_config(c), {"params": start.params}, 0)
        rows = encode.embed_views(encoder, images, np.arange(64))
        want = run(c, images, steps=4)
        assert len({round(x, 3) for x in want[3]}) == 4
        for devices in (1, 8):
            got = run(c, rows, steps=4, devices=devices)
            for a, b in zip(jax.tree.leaves(want[1:4]), jax.tree.leaves(got[1:4]), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
            assert got[4] < 0.5 * want[4]

    def test_the_same_run_with_and_without(self, tmp_path, monkeypatch, capsys):
        c = small.config(*self.CACHED)
        train.train(c, tmp_path / "once")
        assert "views embedded once" in capsys.readouterr().err
        monkeypatch.setattr(
            train, "_training_rows", lambda config, model, source, split, state: (source.images, split.train)
        )
        train.train(c, tmp_path / "each")
        lines = [
            [json.loads(x) for x in (tmp_path / w / "metrics.jsonl").read_text().splitlines()] for w in ("once", "each")
        ]
        for a, b in zip(*lines, strict=True):
            for key in a.keys() - {k for k in a if "speed" in k or "time" in k}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key

    def test_one_view_is_refused(self):
        with pytest.raises(checks.ConfigError, match="data.views 1"):
            small.config("data.views=1")


class TestClusters:
    def points(self):
        random = np.random.RandomState(0)
        centres = random.randn(2, 8, 5) * 3
        return (centres[:, random.randint(0, 8, 400)] + random.randn(2, 400, 5)).swapaxes(0, 1).astype("f4")

    def spread(self, points, centres):
        return ((points[:, :, None] - centres[None]) ** 2).sum(-1).min(-1).mean(0)

    def test_centres_are_as_close_as_scikit_learns(self):
        points = self.points()
        got = clusters.kmeans(points, 8, spherical=False)
        assert got.shape == (2, 8, 5) and got.dtype == np.float32
        want = [KMeans(8, n_init=10, random_state=0).fit(points[:, m]).inertia_ / 400 for m in range(2)]
        assert (self.spread(points, got) < 1.3 * np.array(want)).all()
        np.testing.assert_array_equal(got, clusters.kmeans(points, 8, spherical=False))

    def test_spherical_centres_are_directions(self):
        points = self.points()
        got = clusters.kmeans(
            points * np.random.RandomState(1).uniform(0.1, 9, (400, 2, 1)).astype("f4"), 8, spherical=True
        )
        np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-5)
        np.testing.assert_allclose(got, clusters.kmeans(points, 8, spherical=True), atol=1e-4)

    @pytest.mark.parametrize("metric", ["l2", "ip"])
    def test_a_retriever_begins_with_less_distortion_than_from_drawn_features(self, metric):
        error = {}
        for init in ("data", "kmeans"):
            c = small.config(f"quantizer.init={init}", f"quantizer.metric={metric}")
            images, _, start = small.step(c)
            encoder = encode.Encoder(c, retriever.from_config(c), {"params": start.params}, 0)
            features, codes = encode.encode(encoder, images)
            parts = features.reshape(64, 2, 4)
            if metric == "ip":
                parts = parts / np.linalg.norm(parts, axis=-1, keepdims=True)
            error[init] = np.mean((parts - encoder.codebooks[np.arange(2), codes]) ** 2)
        assert error["kmeans"] < 0.95 * error["data"]

    def test_too_few_images_are_refused(self):
        with pytest.raises(ValueError, match="9 codewords needs at least as many images, got 5"):
            clusters.kmeans(self.points()[:5], 9, spherical=False)
        c = small.config("quantizer.init=kmeans", "quantizer.init_images=3")
        with pytest.raises(checks.ConfigError, match="cannot make 4 codewords of 3 images"):
            checks.check_run(c, num_devices=1, num_train=100, num_validation=0)
