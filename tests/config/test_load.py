from pathlib import Path

import numpy as np
import pytest

import recorded
import small
from tcq import config as configs
from tcq.config import checks


def refused(overrides, file="configs/digits.py"):
    with pytest.raises(configs.ConfigError) as caught:
        configs.load(file, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.tempreture=1", "--config.loss.tempreture is unknown: did you mean loss.temperature?"),
        ("train.batch_size=1", "is unknown: did you mean data.batch_size or eval.batch_size?"),
        ("lr=1", "--config.lr is unknown"),
        (
            "optim.warmup_steps=soon",
            "--config.optim.warmup_steps=soon: must be a count such as 64 or a share such as 0.1",
        ),
        ("optim.warmup_steps=2.5", "optim.warmup_steps 2.5 is a share of the run and must be in [0, 1)"),
        ("optim.warmup_steps=-1", "optim.warmup_steps -1 must be at least 0"),
        ("train.seed=2.5", "--config.train.seed=2.5: must be int"),
        ("model.scan=maybe", "--config.model.scan=maybe: must be bool"),
        ("model.mean=x", "--config.model.mean=x: must be tuple"),
        ("loss.temperature=hot", "--config.loss.temperature=hot: must be float"),
        ("loss.temperature=0", "loss.temperature 0.0 must be from 0.0001 to 10000.0"),
        ("loss.temperature=nan", "loss.temperature nan must be a finite number"),
        (
            "loss.clip=254",
            "loss.clip 254 must be from 0 to 253: a batch of 128 has 2 x 128 - 2 = 254 negatives per anchor",
        ),
        ("loss.clip=1.0", "loss.clip 1.0 is a share and must be in [0, 1); write a count without a decimal point"),
        ("loss.clip=many", "--config.loss.clip=many: must be a count such as 64 or a share such as 0.1"),
        ("loss.clip=-1", "loss.clip -1 must be from 0 to 253"),
        ("loss.debias=1.0", "loss.debias 1.0 must be in [0, 1)"),
        ("loss.queue=-1", "loss.queue -1 must be at least 0"),
        ("loss.clip_ramp=exp", "loss.clip_ramp 'exp' is unknown: use one of 'linear', 'cosine'"),
        ("loss.gather=none", "loss.gather 'none' is unknown: use one of 'all', 'ring'"),
        ("train.microbatches=0", "train.microbatches 0 must be at least 1"),
        ("quantizer.num_codewords=24", "24 must be a power of two: use for example 32"),
        ("quantizer.num_codewords=131072", "131072 must be from 2 to 65536"),
        ("quantizer.bits=16", "8 codebooks x 4 bits (16 codewords) = 32; set quantizer.num_codebooks=4"),
        ("quantizer.metric=cos", "quantizer.metric 'cos' is unknown: use one of 'l2', 'ip'"),
        ("model.heads=3", "model.width 64 is not divisible by model.heads 3"),
        ("model.std=(1.0,0.0,1.0)", "model.std (1.0, 0.0, 1.0) must be three finite numbers, above 0"),
        ("model.mean=('a','b','c')", "model.mean ('a', 'b', 'c') must be three finite numbers"),
        ("model.mlp_ratio=0.001", "leaves the MLP no hidden unit"),
        ("data.crop_share=0.0", "data.crop_share 0.0 must be in (0, 1]"),
        ("model.attention=cudnn", "model.attention cudnn needs model.dtype bfloat16"),
        ("model.patch=3", "data.image_size 8 is not divisible by model.patch 3"),
        ("model.name=XL", "model.name 'XL' is unknown"),
        ("data.augment.crop=1.0", "data.augment.crop 1.0 must be in [0, 1)"),
        ("data.batch_size=1", "data.batch_size 1 must be at least 2"),
        ("train.total_epochs=3", "train.total_steps (4500) and train.total_epochs (3.0): one must be set"),
        ("data.source=", "data.source is not set"),
        ("train.seed=-1", "train.seed -1 must be from 0"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps 0 must be at least 1"),
        ("loss.clip", "--config.loss.clip has no value: write --config.loss.clip=..."),
        ("--noconfig.loss.clip=0.5", "--noconfig is for switches, without a value"),
        ("--noconfig.model.remat=true", "--noconfig is for switches, without a value"),
        ("optim.weight_decay=inf", "optim.weight_decay inf must be a finite number"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(override, message):
    assert message in refused([override])


def test_a_clip_of_no_pair_or_of_the_whole_batch_is_refused():
    message = refused(["loss.clip=kinds=100000", "loss.clip_scope=batch"])
    assert "is less than one of the 65024 negative pairs of a batch" in message
    message = refused(["loss.clip=254", "loss.queue=384"])
    assert "all of the 254 negatives that an anchor has until loss.queue is filled" in message


def test_a_convolutional_stem_is_for_a_vit_with_a_patch_that_is_a_power_of_two():
    given = ["data.image_size=12", "model.stem=conv"]
    assert "model.patch 12 must be a power of two" in refused([*given, "model.patch=12"])
    assert "model.stem conv is for a ViT: use imagenet or cifar with resnet18" in refused(
        [*given, "model.name=resnet18"]
    )


def test_all_problems_are_listed_at_once():
    message = refused(["quantizer.metric=x", "loss.pairing=y", "data.batch_size=1"])
    assert message.count("\n  - ") == 3


def test_files_that_do_not_work(tmp_path):
    assert "not found; tcq comes with base.py, cifar10.py" in refused([], str(tmp_path / "none.py"))
    head = "from tcq.config import base\ndef get_config():\n  c = base.get_config()\n"
    for text, message in {
        "def get_config(: pass": "SyntaxError",
        "def get_config(): return 3": "returned int, must be an ml_collections.ConfigDict",
        f"{head}  c.loss.clipp = 3\n  return c": "loss.clipp is unknown: did you mean loss.clip?",
        f"{head}  c.loss.temperature = '3'\n  return c": "TypeError",
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()": "data.source is missing",
    }.items():
        (tmp_path / "mine.py").write_text(text)
        assert message in refused([], str(tmp_path / "mine.py"))


def test_overrides_and_arguments():
    c = configs.load(
        "configs/cifar10.py:bits=64", ["loss.clip=64", "--config.optim.learning_rate=1", "data.augment.crop=0"]
    )
    assert configs.bits(c) == 64
    assert (c.loss.clip, type(c.loss.clip)) == (64, int)
    assert (c.optim.learning_rate, type(c.optim.learning_rate)) == (1.0, float)
    assert "bits=13 must be a multiple of 4" in refused([], "configs/cifar10.py:bits=13")
    assert "argument 'bit=32' is unknown: use bits=..., backbone=..., weights=..." in refused(
        [], "configs/cifar10.py:bit=32"
    )
    assert "argument 'bakbone=x' is unknown" in refused([], "configs/folder.py:/a,b,bakbone=x")
    assert "model.name 'vit_x16' is unknown: use one of" in refused([], "configs/flickr25k.py:backbone=vit_x16")
    assert "model.weights: weights '/nowhere/b16.npz' not found" in refused(
        [], "configs/nus_wide.py:weights=/nowhere/b16.npz"
    )


@pytest.mark.parametrize("name", ["cifar10", "flickr25k", "nus_wide", "folder"])
def test_configs_take_bits_backbone_and_weights(name, tmp_path):
    path = f"{tmp_path}/a,b" if name == "folder" else ""
    c = configs.load(f"configs/{name}.py:{path}{',' if path else ''}bits=64,backbone=resnet50", ["loss.clip=5"])
    assert (configs.bits(c), c.model.name, c.model.weights) == (64, "resnet50", "")
    assert not path or c.data.source == f"folder:{path}"
    weights = recorded.write(recorded.families()["timm ViT"], tmp_path / "weights")
    c = configs.load(f"configs/{name}.py:{path}{',' if path else ''}weights={weights}")
    assert (c.model.weights, c.model.width, c.data.image_size, c.quantizer.init) == (str(weights), 32, 224, "kmeans")
    assert configs.from_json(configs.to_json(c)).to_dict() == c.to_dict()
    assert configs.load("configs/folder.py:/a/b").data.source == "folder:/a/b"
    assert configs.load("configs/folder.py:photos").data.source == f"folder:{Path.cwd() / 'photos'}"
    assert "not found" in refused([], "experiments/digits.py")
    assert configs.load("digits").data.source == "digits"  # by name, from anywhere


@pytest.mark.parametrize(
    ("arg", "clip", "scope", "temperature"),
    [
        ("", 0.02, "batch", 0.7),
        (",kinds=10", "kinds=10", "anchor", 0.2),
        (",kinds=170", "kinds=170", "anchor", 0.2),
        (",kinds=171", "kinds=171", "batch", 0.2),
    ],
)
def test_kinds_set_clip_scope_and_temperature(tmp_path, arg, clip, scope, temperature):
    np.save(tmp_path / "rows.npy", np.random.RandomState(0).randn(40, 6).astype("f4"))
    tiny = small.ROOT / "tests" / "helpers" / "tiny_embedder.py"
    for config in (f"configs/embeddings.py:{tmp_path}", f"configs/folder.py:{tmp_path},embedder={tiny}:embed"):
        loss = configs.load(config + arg).loss
        assert (loss.clip, loss.clip_scope, loss.temperature) == (clip, scope, temperature)
    assert "kinds=1 must be a whole number" in refused([], f"configs/embeddings.py:{tmp_path},kinds=1")
    weights = recorded.write(recorded.families()["timm ViT"], tmp_path / "weights")
    tuned = configs.load(f"configs/folder.py:{tmp_path},weights={weights}{arg}").loss
    assert (tuned.clip, tuned.clip_scope, tuned.temperature) == (clip, scope, temperature if arg else 0.3)
    assert "kinds= goes with embedder= or weights=" in refused([], f"configs/folder.py:{tmp_path},kinds=9")
    assert configs.load(f"configs/folder.py:{tmp_path}").loss.clip == 0


def test_spq_and_mecoq_are_as_their_papers_describe():
    c = configs.load("configs/spq.py:bits=64")
    assert (configs.bits(c), c.loss.pairing, c.quantizer.metric, c.quantizer.scale) == (64, "cross", "l2", 5.0)
    assert (c.loss.temperature, c.loss.clip, c.loss.debias, c.loss.queue) == (0.5, 0, 0.0, 0)
    c = configs.load("configs/mecoq.py:bits=16", ["loss.clip=0.1"])
    assert (configs.bits(c), c.loss.pairing, c.quantizer.metric, c.loss.temperature) == (16, "quantized", "ip", 0.25)
    assert (c.loss.debias, c.loss.queue, c.loss.queue_from, c.quantizer.num_codewords) == (0.1, 384, 0.06, 256)
    assert configs.clip_rule(c, 1).count(queued=384) == 63
    assert "bits=24 must be one of 16, 32, 64" in refused([], "configs/mecoq.py:bits=24")


def test_json_round_trip_keeps_types():
    for clip in ("3", "0.25"):
        c = configs.load("configs/digits.py", [f"loss.clip={clip}"])
        again = configs.from_json(configs.to_json(c))
        assert again.to_dict() == c.to_dict()
        assert type(again.loss.clip) is type(c.loss.clip)
        assert configs.differences(c, again) == []
    other = configs.load("configs/digits.py", ["loss.clip=4", "data.threads=9"])
    assert configs.differences(c, other) == ["loss.clip: 0.25 stored, 4 given"]
    with pytest.raises(configs.ConfigError, match="cannot be read"):
        configs.from_json("{")


def test_run_checks_carry_the_numbers():
    c = configs.load("configs/digits.py")
    with pytest.raises(configs.ConfigError, match="128 is not divisible by the 3 devices: use 126 or 129"):
        configs.check_run(c, num_devices=3, num_train=1000, num_validation=0)
    with pytest.raises(configs.ConfigError, match="128 is above the 100 training images .*use at most 96"):
        configs.check_run(c, num_devices=8, num_train=100, num_validation=0)


def test_a_config_file_finds_base_in_any_directory(tmp_path, monkeypatch):
    """Also in one with a package of the same name."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('another package')")
    text = "from tcq.config import base\ndef get_config():\n  c = base.get_config()\n  c.data.source = 'digits'\n"
    (tmp_path / "mine.py").write_text(text + "  c.train.total_steps = 7\n  return c")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert configs.load("mine.py").train.total_steps == 7
    assert configs.load("configs/digits.py").data.source == "digits"


def test_a_config_file_may_hold_a_dataclass(tmp_path):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom tcq.config import base\n"
    body = "@dataclass\nclass Size:\n  steps: int = 7\n\ndef get_config():\n  c = base.get_config()\n"
    (tmp_path / "mine.py").write_text(
        f"{head}{body}  c.data.source = 'digits'\n  c.train.total_steps = Size().steps\n  return c\n"
    )
    assert configs.load(str(tmp_path / "mine.py")).train.total_steps == 7


def test_all_keys_with_a_range_or_choices_are_in_one_table():
    """Those that are not are bools, or texts and numbers that another rule checks."""
    other = {"data.source", "data.tfds_dir", "data.cache_dir", "model.weights", "model.mean", "model.std"}
    other |= {"model.embedder", "model.embedder_output", "data.labels", "data.exclude"}
    other |= {"loss.clip", "optim.warmup_steps"}
    known = configs.flatten(configs.base.get_config())
    assert set(checks.ALLOWED) <= set(known)
    assert {k for k in known if k not in checks.ALLOWED and not isinstance(known[k], bool)} == other


def test_every_shipped_config_is_valid_and_says_its_command(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((3, 5), "f4"))
    for path in sorted(Path("configs").glob("*.py")):
        argument = {"folder.py": ":/images", "embeddings.py": f":{tmp_path}"}.get(path.name, "")
        if path.name != "base.py":
            configs.load(f"{path}{argument}")
            assert f"python -m tcq train --config=configs/{path.name}" in path.read_text()


def test_every_problem_is_named_once():
    broken = ["model.patch=3", "model.heads=5", "optim.frozen_blocks=9", "model.std=(1.0,0.0,1.0)", "data.views=1"]
    for overrides in (broken, ["model.name=resnet18", "model.scan=true", "model.dropout=0.1", "optim.frozen_blocks=9"]):
        lines = refused(overrides).splitlines()[1:]
        assert len(lines) == len(set(lines)) == (5 if overrides is broken else 3)
