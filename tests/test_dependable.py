"""What may go wrong silently: flipped bits, numbers that are not finite, replicas that differ."""

import json
import random
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from tcq import encode, losses, train
from tcq import index as indexes
from tcq.runtime import devices as parallel
from tcq.runtime import signals
from tcq.train import loop
from tcq.workdir import checkpoint


def files(folder):
    """All but the few that Orbax does without."""
    return [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 200 and "metrics" not in p.parts]


def flip(folder, chance):
    """One random bit of the files of a folder."""
    found = sorted(files(folder))
    path = chance.choices(found, [p.stat().st_size for p in found])[0]
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with three checkpoints, at steps 6, 9 and 12."""
    workdir = tmp_path_factory.mktemp("kept") / "run"
    train.train(small.config("checkpoint.keep=3", "loss.queue=8"), workdir)
    return workdir


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax, of reads beside the one that failed
class TestBits:
    @pytest.mark.parametrize("flips", [15, pytest.param(300, marks=pytest.mark.slow)])
    def test_flipped_bits_never_give_other_numbers(self, kept, tmp_path, capsys, flips):
        want = encode.load(kept, which="12").variables
        chance, noticed = random.Random(flips), 0
        for i in range(flips):
            shutil.copytree(kept, tmp_path / "run")
            flip(tmp_path / "run" / checkpoint.FOLDER / "12" / "variables", chance)
            found = encode.load(tmp_path / "run", which="latest")
            if found.step == 12:  # a bit that nothing depends on, such as a timestamp
                jax.tree.map(np.testing.assert_array_equal, found.variables, want)
            else:
                noticed += 1
                assert found.step == 9
                assert re.search(
                    r"DAMAGED: checkpoint 12 (.|\n)*GOING BACK to checkpoint 9", capsys.readouterr().err
                ), i
                with pytest.raises(checkpoint.DamagedError, match="checkpoint 12 "):
                    encode.load(tmp_path / "run", which="12")
            shutil.rmtree(tmp_path / "run")
        assert noticed > flips / 3

    def test_training_goes_on_from_the_last_good_one(self, kept, tmp_path, capsys):
        shutil.copytree(kept, tmp_path / "run")
        for step in (12, 9):
            for file in files(tmp_path / "run" / checkpoint.FOLDER / str(step) / "training"):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        train.train(small.config("checkpoint.keep=3", "loss.queue=8"), tmp_path / "run")
        said = capsys.readouterr().err
        assert (
            said.count("DAMAGED: ") == 2
            and "GOING BACK to checkpoint 6" in said
            and "going on from step 6 of 12" in said
        )
        again, want = (encode.load(w, which="12").variables for w in (tmp_path / "run", kept))
        jax.tree.map(np.testing.assert_array_equal, again, want)
        damaged = tmp_path / "run" / f"{checkpoint.FOLDER}_damaged"
        assert sorted(p.name.partition("-")[0] for p in damaged.iterdir()) == [
            "12",
            "9",
            "README",
        ]  # nothing is thrown away
        logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [s for s in range(1, 13) if s not in logged] == []

    def test_a_stop_while_it_is_read_leaves_it(self, kept, tmp_path, monkeypatch):
        shutil.copytree(kept, tmp_path / "run")
        real = checkpoint.restore

        def asked(*rest):
            signals._handle(signal.SIGTERM, None)
            return real(*rest)

        monkeypatch.setattr(signals, "_asked", [])
        monkeypatch.setattr(signals, "_received", [])
        monkeypatch.setattr(checkpoint, "restore", asked)
        with pytest.raises(signals.Stopped):
            train.train(small.config("checkpoint.keep=3", "loss.queue=8"), tmp_path / "run")
        assert (tmp_path / "run" / checkpoint.FOLDER / "12").is_dir()
        assert not (tmp_path / "run" / f"{checkpoint.FOLDER}_damaged").exists()

    def test_what_was_to_be_replaced_is_put_back(self, kept, tmp_path, capsys):
        shutil.copytree(kept, tmp_path / "run")
        place = tmp_path / "run" / f"{checkpoint.FOLDER}_replaced"
        place.mkdir()
        (tmp_path / "run" / checkpoint.FOLDER / "12").rename(place / "12")
        train.train(small.config("checkpoint.keep=3", "loss.queue=8"), tmp_path / "run")
        assert "going on from step 12 of 12" in capsys.readouterr().err
        assert encode.load(tmp_path / "run", which="latest").step == 12 and not place.exists()

    def test_nothing_good_is_refused(self, kept, tmp_path):
        shutil.copytree(kept, tmp_path / "run")
        for file in files(tmp_path / "run" / checkpoint.FOLDER):
            file.write_bytes(b"")
        with pytest.raises(checkpoint.DamagedError, match=r"checkpoint 12(.|\n)*checkpoint 6"):
            encode.load(tmp_path / "run", which="latest")

    def test_a_poisoned_state_is_never_saved(self, tmp_path):
        manager = checkpoint.open_manager(tmp_path, writable=True)
        tree = {"variables": {"a": np.array([1.0, np.nan], "f4")}}
        with pytest.raises(checkpoint.CheckpointError, match=r"variables\['a'\] is not finite at step 3: not saved"):
            checkpoint.save(manager, 3, tree, score=None)
        assert manager.all_steps() == []
        manager.close()

    def test_a_damaged_index_falls_back_to_the_one_before_the_last_change(self, run, images, tmp_path, capsys):
        indexes.build(run, images / "class 3", tmp_path / "index")
        before = indexes.open_index(tmp_path / "index")
        indexes.add(tmp_path / "index", images / "class 4")
        whole = indexes.open_index(tmp_path / "index")
        assert len(whole.paths) > len(before.paths)
        for name in ("codes.npy", "encoder.npz", "paths.json", "config.json", "meta.json"):
            shutil.copytree(tmp_path / "index", tmp_path / "copy" / "index")
            previous = tmp_path / ".index.previous"
            shutil.copytree(previous, tmp_path / "copy" / previous.name)
            (tmp_path / "copy" / "index" / name).unlink()
            found = indexes.open_index(tmp_path / "copy" / "index")
            assert found.paths == before.paths
            assert f"DAMAGED: '{tmp_path / 'copy' / 'index'}" in (said := capsys.readouterr().err)
            assert f"GOING BACK to the index before its last change, with {len(before.paths)} images" in said
            shutil.rmtree(tmp_path / "copy")


class TestFinite:
    def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(self):
        c = small.config("data.views=2", "optim.frozen_blocks=-1", "loss.queue=8", "optim.warmup_steps=0")
        _, body, start = small.step(c)
        good = np.random.RandomState(0).randn(16, 2, 64).astype("f4")
        bad = good.copy()
        bad[3, 1, 5] = np.inf
        batches = [small.batch(rows, 4) for rows in (good, bad, bad, good)]
        (first, _), (second, logs), (third, more), (fourth, after) = small.steps(body, start, batches, 4)
        for state in (second, third):
            changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), state, first)
            assert not any(jax.tree.leaves(changed._replace(step=False, opt_state=False)))
        assert (logs["skipped"], logs["skipped_in_a_row"]) == (1, 1) and not np.isfinite(logs["loss"])
        assert (more["skipped"], more["skipped_in_a_row"]) == (2, 2)
        assert (after["skipped"], after["skipped_in_a_row"]) == (2, 0) and int(fourth.step) == 4
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(fourth))
        want = small.steps(body, start, [batches[0], batches[3]], 4)[-1][0]
        for a, b in zip(jax.tree.leaves(fourth.params), jax.tree.leaves(want.params), strict=True):
            assert a.shape == b.shape  # the views differ with the step, the counts of the optimizer do not
        counts = [
            [int(x) for x in jax.tree.leaves(s.opt_state.inner_state) if np.asarray(x).dtype.kind == "i"]
            for s in (fourth, want)
        ]
        assert counts[0] == counts[1] and set(counts[0]) == {2}

    def test_a_loss_that_is_not_finite_is_enough(self, monkeypatch):
        real = losses.contrastive_loss

        def infinite(*views, **options):
            loss, logs = real(*views, **options)
            return loss + jnp.inf, logs

        monkeypatch.setattr(losses, "contrastive_loss", infinite)
        images, body, start = small.step(small.config("optim.warmup_steps=0"))
        state, logs = small.steps(body, start, [small.batch(images[:16], 2)], 2)[0]
        assert logs["skipped"] == 1 and np.isfinite(logs["gradient_norm"])
        jax.tree.map(np.testing.assert_array_equal, state.params, jax.device_get(start.params))

    def test_a_run_goes_back_once_and_then_stops_with_a_diagnosis(self, tmp_path, capsys):
        flags = (
            "optim.name=sgd",
            "optim.clip_norm=0",
            "optim.warmup_steps=8",
            "train.max_skipped=2",
            "train.total_steps=40",
        )
        c = small.config(*flags, "optim.learning_rate=1e30", "checkpoint.every_steps=1")
        with pytest.raises(loop.TrainError) as caught:
            train.train(c, tmp_path)
        assert re.search(r"loss is (nan|inf) at step \d+, and so were the 2 steps up to it, again", str(caught.value))
        assert re.search(r"the checkpoint of step \d+ stands. A lower optim.learning_rate", str(caught.value))
        said = capsys.readouterr().err
        assert said.count("skipped, nothing was changed (1 in all, 1 in a row)") == 2
        assert said.count("GOING BACK to the last checkpoint, once") == 1
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(encode.load(tmp_path, which="latest").variables))


class TestReplicas:
    def test_a_device_with_other_bits_is_named(self):
        _, _, start = small.step(small.config())
        state = parallel.replicate(start)
        loop._compare(7, state)
        found = parallel.checksums(state)
        assert len(found) == 8 and len(set(found.values())) == 1
        kernel = state.params["projection"]["kernel"]
        for place in ((0, 0), (3, 5)):
            copies = [np.array(s.data) for s in kernel.addressable_shards]
            bits = copies[5].view(np.uint32)
            bits[place] ^= 1  # the lowest
            shards = [jax.device_put(x, s.device) for x, s in zip(copies, kernel.addressable_shards, strict=True)]
            odd = jax.make_array_from_single_device_arrays(kernel.shape, kernel.sharding, shards)
            params = {**state.params, "projection": {**state.params["projection"], "kernel": odd}}
            device = kernel.addressable_shards[5].device.id
            with pytest.raises(
                loop.TrainError, match=rf"at step 7 the state on device {device} \(cpu of process 0\) differs"
            ):
                loop._compare(7, state._replace(params=params))

    def test_numbers_that_change_places_are_noticed(self):
        a = jnp.arange(8.0)
        sums = {
            next(iter(set(parallel.checksums(parallel.replicate(x)).values()))) for x in (a, a[::-1], a.at[0].set(-0.0))
        }
        assert len(sums) == 3

    def test_a_run_compares_them(self, tmp_path, monkeypatch):
        compared = []
        real = loop._compare
        monkeypatch.setattr(loop, "_compare", lambda step, state: (compared.append(step), real(step, state)))
        train.train(small.config("train.compare_every_steps=4", "eval.every_steps=0"), tmp_path)
        assert compared == [1, 4, 8, 12]


class TestCollectives:
    """What the compiled step asks devices to do together."""

    def found(self, *overrides):
        images, body, start = small.step(small.config("loss.clip=0.2", *overrides))
        step = parallel.pmap_step(body)
        program = step.lower(start, (), small.batch(images[:16], 8)).compile().as_text()
        kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
        return sorted(re.findall(rf"= (?:\(.*?\)|\S+) ({kinds})(?:-start)?\(", program))

    def test_one_gather_its_transpose_and_one_reduction(self):
        for overrides in ([], ["train.microbatches=2"], ["loss.pairing=quantized", "loss.debias=0.1"]):
            assert self.found(*overrides) == ["all-gather", "all-reduce", "reduce-scatter"], overrides

    def test_a_queue_gathers_its_codes_and_a_ring_hands_round(self):
        assert self.found("loss.queue=8") == ["all-gather", "all-gather", "all-reduce", "reduce-scatter"]
        assert set(self.found("loss.gather=ring")) == {"all-reduce", "collective-permute"}


class TestResident:
    def test_images_on_the_devices_and_a_stream_of_them_give_the_same_bits(self, tmp_path, capsys):
        for name, overrides in {"here": [], "stream": ["data.resident=0"]}.items():
            train.train(small.config(*overrides, "data.augment.flip=0.5"), tmp_path / name)
        assert capsys.readouterr().err.count("the training images lie on every device (0.2 MiB)") == 1
        a, b = (encode.load(tmp_path / name, which="latest").variables for name in ("here", "stream"))
        jax.tree.map(np.testing.assert_array_equal, a, b)

    def test_batches_arrive_in_order_and_on_the_devices(self):
        batches = [{"index": np.full((8, 2), i, np.int32)} for i in range(5)]
        found = list(parallel.prefetch(iter(batches)))
        assert [int(b["index"][3, 1]) for b in found] == [0, 1, 2, 3, 4]
        assert len(found[0]["index"].addressable_shards) == 8


def test_a_trace_begins_and_ends_where_the_run_does(tmp_path, capsys):
    train.train(small.config("train.total_steps=4", "eval.every_steps=0"), tmp_path, profile=(3, 20))
    longer = small.config("train.total_steps=7", "eval.every_steps=0")
    train.train(longer, tmp_path, profile=(2, 6), allow_changes=True)
    assert capsys.readouterr().err.count("\ntrace: ") == 2
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2
    refused = small.tcq("train", "--config=configs/digits.py", f"--workdir={tmp_path}", "--profile=6:3")
    assert refused.returncode == 2 and "is not of the form 10:20" in refused.stderr
