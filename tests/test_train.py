import json
import random
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from tcq import config as configs
from tcq import encode, evaluate, train
from tcq.config import checks
from tcq.data import protocols
from tcq.evaluate import held_out as validation
from tcq.runtime import devices as parallel
from tcq.train import loop, optimizer
from tcq.train import step as learner
from tcq.workdir import checkpoint


def final_params(workdir):
    return jax.tree.leaves(encode.load(workdir, which="latest").variables)


def assert_same_bits(a, b):
    for x, y in zip(final_params(a), final_params(b), strict=True):
        np.testing.assert_array_equal(x, y)


class TestStep:
    @pytest.mark.parametrize(
        "overrides",
        [
            ["loss.clip=0.2"],
            [
                "loss.clip=3",
                "quantizer.metric=ip",
                "loss.pairing=quantized",
                "loss.entropy_weight=0.1",
                "loss.diversity_weight=0.1",
            ],
        ],
    )
    def test_three_steps_are_the_same_on_1_2_and_8_devices(self, overrides):
        # SGD: Adam would blow rounding up to a whole step wherever a gradient is 0 but for rounding.
        c = small.config(
            *overrides, "data.augment.flip=0.5", "optim.name=sgd", "optim.learning_rate=0.3", "optim.warmup_steps=0"
        )
        images, body, start = small.step(c)
        results = {}
        for devices in (1, 2, 8):
            batches = [small.batch(images[16 * i : 16 * (i + 1)], devices) for i in range(3)]
            state, logs = small.steps(body, start, batches, devices)[-1]
            results[devices] = state.params, logs
        for devices in (2, 8):
            for one, many in zip(jax.tree.leaves(results[1]), jax.tree.leaves(results[devices]), strict=True):
                np.testing.assert_allclose(many, one, rtol=1e-4, atol=2e-6)
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), results[1][0], start.params)
        assert max(jax.tree.leaves(moved)) > 1e-2

    def test_pmap_and_shard_map_give_the_same_bits(self):
        c = small.config()
        images, body, start = small.step(c)
        batch = small.batch(images[:16], 8)
        outcomes = []
        for compile in (parallel.pmap_step, parallel.shard_map_step):
            step, state = compile(body), parallel.replicate(start)
            for _ in range(3):
                state, logs = step(state, (), batch)
                jax.block_until_ready(logs)
            outcomes.append(parallel.fetch((state, logs)))
        for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_state_is_donated_and_has_no_device_axis(self):
        c = small.config()
        images, body, start = small.step(c)
        state = parallel.replicate(start)
        after, _ = parallel.pmap_step(body)(state, (), small.batch(images[:16], 8))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, start)
        assert all(x.is_deleted() for x in jax.tree.leaves(state.params))

    def test_codebooks_and_every_other_parameter_learn(self):
        c = small.config("quantizer.metric=ip", "loss.temperature=0.2")
        images, body, start = small.step(c)
        state = parallel.replicate(start)
        step = parallel.pmap_step(body)
        for _ in range(3):
            state, logs = step(state, (), small.batch(images[:16], 8))
            jax.block_until_ready(logs)
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), parallel.fetch(state.params), start.params)
        still = [jax.tree_util.keystr(p) for p, m in jax.tree_util.tree_leaves_with_path(moved) if m == 0]
        assert still == []

    @pytest.mark.parametrize("name", checks.OPTIMIZERS)
    def test_optimizers_decay_kernels_only(self, name):
        c = small.config(f"optim.name={name}", "optim.weight_decay=0.5", "optim.warmup_steps=0")
        _, _, start = small.step(c)
        rule = optimizer.make(c, 10)
        zero = jax.tree.map(jnp.zeros_like, start.params)
        updates, _ = rule.update(zero, rule.init(start.params), start.params)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            assert bool(jnp.any(update != 0)) == (path[-1].key == "kernel"), jax.tree_util.keystr(path)

    def test_learning_rate_warms_up_and_falls_to_zero(self):
        rate = optimizer.learning_rate(small.config("optim.learning_rate=0.1"), 12)
        np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(7), rate(12)], [0, 0.05, 0.1, 0.05, 0], atol=1e-7)

    def test_clipping_is_off_then_grows_then_full(self):
        c = small.config("loss.clip=8", "loss.clip_from=0.25", "loss.clip_full=0.75")
        clip = learner.clip_schedule(c, 16)
        counts = [int(clip(jnp.int32(step))) for step in range(16)]
        assert counts == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
        constant = small.config("loss.clip=8", "loss.clip_from=0", "loss.clip_full=0")
        assert learner.clip_schedule(constant, 16)(jnp.int32(3)) == 8

    def test_a_cosine_ramp_and_a_fraction_with_a_queue(self):
        c = small.config("loss.clip=9", "loss.clip_from=0.25", "loss.clip_full=0.75", "loss.clip_ramp=cosine")
        counts = [int(learner.clip_schedule(c, 16)(jnp.int32(step))) for step in range(16)]
        assert counts == [0, 0, 0, 0] + [int(9 * (1 - np.cos(np.pi * i / 8)) / 2) for i in range(1, 8)] + [9] * 5
        c = small.config(
            "loss.clip=0.5",
            "loss.clip_from=0",
            "loss.clip_full=0",
            "loss.queue=50",
            "loss.queue_from=0.125",
            "data.batch_size=8",
        )
        filled, clip = learner.queue_filled(c, 16), learner.clip_schedule(c, 16)
        assert [int(filled(jnp.int32(step))) for step in range(6)] == [0, 0, 32, 48, 50, 50]
        assert [int(clip(jnp.int32(step))) for step in range(6)] == [7, 7, 23, 31, 32, 32]  # half of 14 + filled
        assert int(learner.queue_filled(c, 16)(jnp.int32(2**31 - 2))) == 50

    def test_the_clip_changes_without_compiling_again(self):
        c = small.config("loss.clip=8", "loss.clip_full=1.0")
        images, body, start = small.step(c)
        traced = []
        step = parallel.pmap_step(lambda *arguments: traced.append(1) or body(*arguments))
        state, seen = parallel.replicate(start), set()
        for _ in range(4):
            state, logs = step(state, (), small.batch(images[:16], 8))
            seen.add(float(logs["clip_similarity"]))
        assert traced == [1] and len(seen) == 4

    def test_gradients_are_clipped_by_norm(self):
        c = small.config(
            "optim.name=sgd", "optim.clip_norm=0.5", "optim.weight_decay=0", "optim.warmup_steps=0", "optim.momentum=0"
        )
        rule = optimizer.make(c, 10)
        params = {"kernel": jnp.zeros(4)}
        updates, _ = rule.update({"kernel": jnp.full(4, 100.0)}, rule.init(params), params)
        np.testing.assert_allclose(jnp.linalg.norm(updates["kernel"]), 0.5 * c.optim.learning_rate, rtol=1e-5)


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


class TestMicrobatches:
    SHARED = (
        "optim.name=sgd",
        "optim.momentum=0",
        "optim.clip_norm=0",
        "optim.warmup_steps=0",
        "optim.learning_rate=1",
        "data.augment.flip=0.5",
        "loss.clip=0.2",
    )

    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            pytest.param(
                ["model.depth=2", "optim.frozen_blocks=1", "loss.queue=7", "data.views=3"], marks=pytest.mark.slow
            ),
        ],
    )
    def test_the_gradients_are_those_of_the_whole_batch(self, overrides):
        results = {}
        for n, devices in ((1, 1), (4, 1), (2, 2)):
            c = small.config(*self.SHARED, *overrides, f"train.microbatches={n}")
            images, body, start = small.step(c)
            batches = [small.batch(images[16 * i : 16 * (i + 1)], devices, 16 * i) for i in range(2)]
            results[n, devices] = small.steps(body, start, batches, devices)
        want = results[1, 1]
        largest = max(float(np.abs(a - b).max()) for a, b in _pairs(want[0][0].params, start.params))
        assert largest > 1e-2
        for run, got in results.items():
            for one, other in _pairs(want[0], got[0]):  # the rate is 1: a step is the gradient
                np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * largest, err_msg=str(run))
            for one, other in _pairs(want[1], got[1]):  # whose rounding a second step carries on
                np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4 * largest, err_msg=str(run))

    def test_activations_take_less_memory(self):
        found = {}
        for n in (1, 8):
            c = small.config("model.width=64", "model.depth=3", "data.batch_size=256", f"train.microbatches={n}")
            images, body, start = small.step(c, 256)
            step = jax.pmap(body, axis_name=parallel.AXIS, in_axes=(None, None, 0), devices=jax.devices()[:1])
            compiled = step.lower(start, (), small.batch(images, 1)).compile()
            found[n] = compiled.memory_analysis().temp_size_in_bytes
        assert found[8] < 0.25 * found[1]

    def test_a_resnet_is_refused_unless_it_is_frozen(self):
        resnet = ("model.name=resnet18", "model.stem=cifar", "train.microbatches=2")
        with pytest.raises(configs.ConfigError, match="batch statistics of resnet18 would be those of a piece"):
            small.config(*resnet)
        small.config(*resnet, "optim.frozen_blocks=-1")
        c = small.config("train.microbatches=3")
        with pytest.raises(configs.ConfigError, match="microbatches 3 does not divide the 8 images of each device"):
            configs.check_run(c, num_devices=2, num_train=100, num_validation=0)


class TestQueue:
    def test_holds_the_newest_codes_of_all_devices_and_pulls_at_the_codebooks(self):
        c = small.config("loss.queue=40", "loss.pairing=quantized", "data.batch_size=8", "optim.learning_rate=1e-6")
        images, body, start = small.step(c)
        states = {}
        for devices in (1, 4):
            batches = [small.batch(images[8 * i : 8 * (i + 1)], devices) for i in range(4)]
            states[devices] = [state for state, _ in small.steps(body, start, batches, devices)]
        for one, four in zip(states[1], states[4], strict=True):
            np.testing.assert_allclose(four.queue, one.queue, rtol=1e-4, atol=1e-5)
        before, after = states[1][1].queue, states[1][2].queue
        assert (before[32:] == 0).all() and (before[:32].sum(-1) > 0.99).all()
        np.testing.assert_array_equal(after[16:], before[:24])
        assert np.abs(after[:16] - before[:16]).max() > 1e-3

    @pytest.mark.slow
    def test_a_run_goes_on_with_it(self, tmp_path, monkeypatch):
        flags = ("loss.queue=40", "loss.pairing=quantized", "loss.debias=0.1", "loss.clip=0.1", "train.microbatches=2")
        c = small.config(*flags)
        train.train(c, tmp_path / "whole")
        real = loop._look

        def dies(job, step, logs):
            if step > 8:
                raise KeyboardInterrupt
            return real(job, step, logs)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_look", dies)
            with pytest.raises(KeyboardInterrupt):
                train.train(c, tmp_path / "parts")
        train.train(c, tmp_path / "parts")
        assert_same_bits(tmp_path / "whole", tmp_path / "parts")
        with pytest.raises(configs.ConfigError, match="loss.queue 5 holds reconstructions"):
            small.config("loss.queue=5", "loss.pairing=float")


class TestRun:
    def test_leaves_everything_and_the_best_beside_the_newest(self, tmp_path):
        c = small.config("loss.clip=0.1")
        last = train.train(c, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
        assert [line["step"] for line in lines if "validation/mAP" in line] == [6, 12]
        for key in (
            "loss",
            "accuracy",
            "codeword_usage",
            "positive_similarity",
            "negative_similarity",
            "clip_similarity",
        ):
            assert np.isfinite([line[f"train/{key}"] for line in lines if "train/loss" in line]).all(), key
        assert {"mAP", "clip_precision", "clip_recall", "false_negative_rate"} <= last.keys()
        assert 0.05 < last["false_negative_rate"] < 0.15
        assert list((tmp_path / "tensorboard").iterdir())
        assert configs.from_json((tmp_path / "config.json").read_text()).to_dict() == c.to_dict()
        assert encode.load(tmp_path, which="latest").step == 12
        scores = {line["step"]: line["validation/mAP"] for line in lines if "validation/mAP" in line}
        assert encode.load(tmp_path).step == max(scores, key=scores.get)

    def test_nothing_is_compiled_after_the_first_validation(self, tmp_path, monkeypatch):
        compiled, after = [], []
        real = validation.held_out

        def held_out(*rest):
            found = real(*rest)
            after.append(len(compiled))
            return found

        monkeypatch.setattr(validation, "held_out", held_out)

        def listen(event, seconds, **_):
            if "backend_compile" in event:
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            train.train(small.config("quantizer.num_codebooks=3"), tmp_path)  # a shape of its own
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert len(after) == 2 and after[0] == after[1] > 0

    def test_going_on_gives_the_bits_of_an_uninterrupted_run(self, tmp_path, monkeypatch):
        c = small.config()
        train.train(c, tmp_path / "whole")

        real = loop._look

        def dies(job, step, logs):
            if step > 8:
                raise KeyboardInterrupt
            return real(job, step, logs)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_look", dies)
            with pytest.raises(KeyboardInterrupt):
                train.train(c, tmp_path / "parts")
        assert 0 < encode.load(tmp_path / "parts", which="latest").step < 12
        train.train(c, tmp_path / "parts")
        assert_same_bits(tmp_path / "whole", tmp_path / "parts")
        read = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")]
        steps = [[(json.loads(x)["step"], json.loads(x).get("train/loss")) for x in lines] for lines in read]
        assert steps[0] == steps[1]

    def test_training_twice_is_a_quick_no_op(self, tmp_path):
        train.train(small.config(), tmp_path)
        before = (tmp_path / "metrics.jsonl").read_text()
        train.train(small.config(), tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == before

    def test_another_config_is_refused(self, tmp_path):
        train.train(small.config(), tmp_path)
        with pytest.raises(configs.ConfigError, match=r"another config(.|\n)*loss.temperature: 1.0 there, 0.3 now"):
            train.train(small.config("loss.temperature=0.3"), tmp_path)

    def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(self, tmp_path):
        c = small.config("optim.learning_rate=1e30", "optim.name=sgd", "optim.clip_norm=0", "optim.warmup_steps=4")
        with pytest.raises(train.TrainError, match=r"not finite|is (nan|inf) at step \d+"):
            train.train(c, tmp_path)
        try:
            saved = final_params(tmp_path)
        except checkpoint.CheckpointError:
            return  # it went wrong before the first checkpoint
        assert all(np.isfinite(x).all() for x in saved)

    def test_no_labels_and_no_validation(self, tmp_path):
        from test_data import write_images

        write_images(tmp_path / "images", [f"{i:02}.png" for i in range(30)])
        flags = [f"data.source=folder:{tmp_path / 'images'}", "train.total_steps=4", "data.batch_size=16"]
        assert "mAP" not in train.train(small.config(*flags), tmp_path / "a")
        assert train.train(small.config(*flags, "data.validation=0"), tmp_path / "b") == {}
        assert encode.load(tmp_path / "b").step == 4

    def test_changes_are_allowed_where_asked_for_and_told(self, tmp_path, capsys):
        first = small.config("train.total_steps=4", "eval.every_steps=0")
        train.train(first, tmp_path)
        before = (tmp_path / "config.json").read_text()
        with pytest.raises(checkpoint.CheckpointError, match="does not fit the model"):
            train.train(small.config("model.width=24"), tmp_path, allow_changes=True)
        assert (tmp_path / "config.json").read_text() == before and not (tmp_path / "changes.jsonl").exists()
        later = small.config("train.total_steps=6", "eval.every_steps=0", "loss.temperature=0.5")
        with pytest.raises(configs.ConfigError, match="or --allow_changes"):
            train.train(later, tmp_path)
        train.train(later, tmp_path, allow_changes=True)
        assert "CHANGED config:" in capsys.readouterr().err and encode.load(tmp_path, which="latest").step == 6
        assert encode.read_config(tmp_path).loss.temperature == 0.5
        changes = [json.loads(line)["changes"] for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
        assert len(changes) == 1 and any("loss.temperature" in c for c in changes[0])

    def test_images_that_changed_are_refused(self, tmp_path):
        from test_data import write_images

        write_images(tmp_path / "images", [f"{c}/{i:02}.png" for c in "ab" for i in range(12)])
        c = small.config(f"data.source=folder:{tmp_path / 'images'}", "data.batch_size=8", "train.total_steps=3")
        train.train(c, tmp_path / "run")
        write_images(tmp_path / "images", ["a/new.png"])
        for job in (lambda: train.train(c, tmp_path / "run"), lambda: evaluate.evaluate(tmp_path / "run")):
            with pytest.raises(protocols.ProtocolError, match="have changed since this run began: 24 then, 25 now"):
                job()

    def test_skipped_files_are_listed(self, tmp_path):
        from test_data import write_images

        write_images(tmp_path / "images", [f"{c}/{i:02}.png" for c in "ab" for i in range(12)])
        (tmp_path / "images" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        train.train(small.config(f"data.source=folder:{tmp_path / 'images'}", "data.batch_size=8"), tmp_path / "run")
        skipped = [json.loads(x) for x in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
        assert [s["path"] for s in skipped] == ["a/broken.png"]


def train_and_kill(workdir, flags, devices, kill_after):
    """Trains in a process that gets SIGKILL some seconds after its first new checkpoint, or ends; returns its last words."""
    process = subprocess.Popen(
        small.command("train", "--config=configs/digits.py", f"--workdir={workdir}", *flags),
        env=small.environment(devices),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = workdir / checkpoint.FOLDER
    before = set(folder.iterdir()) if folder.exists() else set()
    while kill_after is not None and process.poll() is None:
        if folder.exists() and {p for p in folder.iterdir() if p.name.isdecimal()} - before:
            time.sleep(kill_after)
            process.kill()
            break
        time.sleep(0.01)
    _, error = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode, error


def kills_change_nothing(tmp_path, devices, steps, kills):
    flags = small.small_flags(f"train.total_steps={steps}", "checkpoint.every_steps=20", "eval.every_steps=0")
    assert train_and_kill(tmp_path / "whole", flags, devices, None)[0] == 0
    chance = random.Random(devices)
    codes = [train_and_kill(tmp_path / "killed", flags, devices, chance.uniform(0, 0.3))[0] for _ in range(kills)]
    code, error = train_and_kill(tmp_path / "killed", flags, devices, None)
    assert code == 0
    assert -signal.SIGKILL in codes
    assert "going on from step" in error
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


def test_kill_9_and_going_on_ends_with_the_same_bits(tmp_path):
    kills_change_nothing(tmp_path, 2, steps=400, kills=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("devices", [1, 8])
def test_kill_9_twenty_times(tmp_path, devices):
    kills_change_nothing(tmp_path, devices, steps=10_000, kills=20)
