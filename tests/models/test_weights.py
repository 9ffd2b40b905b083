"""Published weights give the features of their authors' code, and are checked strictly."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from scipy import ndimage

import google_vit
import recorded
import small
from tcq import config as configs
from tcq import encode, index, train
from tcq.encode import backbone_from_weights
from tcq.models import retriever
from tcq.models import weights as published
from tcq.models.weights import positions

FAMILIES = recorded.families()
VIT = "timm ViT with registers"


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_library_that_defines_the_format(tmp_path, name):
    folder = recorded.write(FAMILIES[name], tmp_path / "weights")
    for side, want in FAMILIES[name]["features"].items():
        recorded.assert_close(recorded.ours(folder, int(side)), want)


@pytest.mark.parametrize("side", recorded.SIDES)
def test_weights_of_google_agree_with_the_layers_of_flax(tmp_path, side):
    family = FAMILIES["Google ViT, as timm reads it"]
    folder = recorded.write(family, tmp_path / "weights")
    recorded.assert_close(
        recorded.ours(folder, side), google_vit.features(recorded.tensors(family["shapes"]), recorded.images(side))
    )


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (5, 5), (1, 3), (6, 1)])
def test_linear_resampling_equals_scipy(old, new):
    grid = np.random.RandomState(0).randn(old, old, 3).astype("f4")
    want = ndimage.zoom(grid, (new / old, new / old, 1), order=1)
    got = positions.resample(grid.reshape(1, -1, 3), (new, new), rule="linear")
    np.testing.assert_allclose(got.reshape(new, new, 3), want, atol=1e-6)


def test_resampling_keeps_constants_and_refuses_other_grids():
    flat = np.ones((1, 25, 2), np.float32)
    for rule in positions.RULES:
        np.testing.assert_allclose(positions.resample(flat, (3, 8), rule=rule), 1, atol=1e-6)
    with pytest.raises(ValueError, match="24 positions"):
        positions.resample(flat[:, 1:], (3, 3), rule="linear")
    with pytest.raises(ValueError, match="use one of linear"):
        positions.resample(flat, (3, 3), rule="cubic")


def test_the_family_sets_keys_of_the_config(tmp_path):
    folder = recorded.write(FAMILIES["Hugging Face DINOv2 with registers"], tmp_path / "dinov2")
    c = configs.load("configs/digits.py", [f"model.weights={folder}", "data.image_size=32"])
    m = c.model
    assert (m.width, m.depth, m.heads, m.patch, m.mlp_ratio, m.registers) == (32, 2, 4, 8, 2.0, 4)
    assert (m.pooling, m.class_token, m.layer_scale, m.gelu, m.norm_eps) == ("cls", True, True, "erf", 1e-6)
    assert (m.mean, m.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (c.data.resize, c.data.interpolation, c.data.crop_share) == ("crop", "bicubic", 0.875)
    folder = recorded.write(FAMILIES["timm ViT"], tmp_path / "timm")
    c = configs.load("configs/digits.py", [f"model.weights={folder}", "data.image_size=32", "model.std=(1.0,1.0,2.0)"])
    assert (c.model.mean, c.model.std) == ((0.5, 0.4, 0.3), (1, 1, 2))
    assert (c.data.interpolation, c.data.crop_share) == ("bilinear", 0.95)
    folder = recorded.write(FAMILIES["Google ViT, as timm reads it"], tmp_path / "google")
    c = configs.load("configs/digits.py", [f"model.weights={folder}", "data.image_size=32", "data.resize=crop"])
    assert (c.model.gelu, c.data.resize, c.data.interpolation) == ("tanh", "crop", "bilinear")
    c = configs.load("configs/digits.py", [f"model.weights={folder}", "data.image_size=32", "model.pooling=mean"])
    assert c.model.pooling == "mean" and c.model.class_token
    folder = recorded.write(FAMILIES["ResNet-18, CIFAR stem"], tmp_path / "resnet")
    c = configs.load("configs/digits.py", [f"model.weights={folder}", "data.image_size=32"])
    assert (c.model.name, c.model.stem, c.model.std) == ("resnet18", "cifar", (0.25, 0.25, 0.25))


@pytest.mark.parametrize(("name", "eps"), [("Hugging Face ViT", 1e-12), ("Hugging Face DINOv2", 1e-6)])
def test_epsilon_is_that_of_the_family_unless_the_file_has_one(tmp_path, name, eps):
    family = FAMILIES[name]
    for facts, want in (({}, eps), ({"layer_norm_eps": 1e-4}, 1e-4)):
        folder = recorded.write(family | {"beside": {"config.json": {"num_attention_heads": 4} | facts}}, tmp_path)
        assert published.read(folder).model["norm_eps"] == want


def changed(tmp_path, change, name=VIT):
    folder = recorded.write(FAMILIES[name], tmp_path / "weights")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_every_missing_unexpected_and_misshaped_tensor_is_named(tmp_path):
    lost = ["blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "norm.weight"]
    with pytest.raises(configs.ConfigError) as error:
        recorded.ours(changed(tmp_path / "a", lambda t: [t.pop(k) for k in lost]), 32)
    missing = [line.strip().removeprefix("missing: ") for line in str(error.value).splitlines()[1:]]
    assert sorted(missing) == lost

    def more(t):
        t["dist_token"] = np.zeros((1, 1, 32), np.float32)
        t["blocks.0.mlp.fc2.bias"] = np.zeros(31, np.float32)
        t["norm.bias"] = np.zeros(5, np.float32)
        t["head.weight"] = np.zeros((7, 32), np.float32)  # a classifier may be of any size

    with pytest.raises(configs.ConfigError) as error:
        recorded.ours(changed(tmp_path / "b", more), 32)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["other shape", "unexpected", "other shape"]
    for words in (
        "dist_token (1, 1, 32)",
        "mlp.fc2.bias (31,) in the file, (32,)",
        "norm/bias (5,) in the file, (32,)",
    ):
        assert words in str(error.value)


PREFIXES = ["module.", "backbone.", "teacher.backbone.", "_orig_mod.", "module.encoder.", "state_dict.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", [VIT, "ResNet-18, CIFAR stem"])
def test_prefixes_of_training_frameworks(tmp_path, name, prefix):
    def prefixed(tensors):
        renamed = {prefix + k: v for k, v in tensors.items()}
        if prefix.startswith("teacher."):
            renamed |= {"student.backbone." + k: np.zeros_like(v) for k, v in tensors.items()}
            renamed["teacher.dino_head.last_layer.weight"] = np.zeros((3, 3), np.float32)
        tensors.clear()
        tensors |= renamed

    recorded.assert_close(recorded.ours(changed(tmp_path, prefixed, name), 32), FAMILIES[name]["features"]["32"])


def test_several_backbones_are_refused(tmp_path):
    def twice(tensors):
        tensors |= {f"{p}.{k}": v for k, v in list(tensors.items()) for p in ("online", "target")}
        for k in [k for k in tensors if not k.startswith(("online.", "target."))]:
            del tensors[k]

    with pytest.raises(configs.ConfigError, match=r"several backbones, below 'online.', 'target.'"):
        recorded.ours(changed(tmp_path, twice), 32)


@pytest.mark.parametrize("name", [VIT, "Hugging Face DINOv2"])
def test_weights_in_parts(tmp_path, name):
    folder = recorded.write(FAMILIES[name], tmp_path / "weights")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys, places = sorted(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {k: tensors[k] for k in keys[i::3]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (folder, index):
        recorded.assert_close(recorded.ours(path, 32), FAMILIES[name]["features"]["32"])
    index.write_text(json.dumps({"weight_map": places | {keys[0]: "model-00002-of-00003.safetensors"}}))
    with pytest.raises(configs.ConfigError, match="the files do not belong together"):
        recorded.ours(folder, 32)
    for wrong in ("../model-00001-of-00003.safetensors", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": places | {keys[0]: wrong}}))
        with pytest.raises(configs.ConfigError, match="not found beside it"):
            recorded.ours(folder, 32)


def original_dinov2(tensors):
    """Tensors of Hugging Face's DINOv2 by the names of the original, which fuses query, key and value."""
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    out = {new: tensors[old] for new, old in top.items() if old in tensors}
    out["mask_token"] = np.zeros((1, out["cls_token"].shape[-1]), np.float32)
    for i in range(2):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        for k in ("weight", "bias"):
            parts = [tensors[f"{old}.attention.attention.{part}.{k}"] for part in ("query", "key", "value")]
            out[f"{new}.attn.qkv.{k}"] = np.concatenate(parts)
            out[f"{new}.attn.proj.{k}"] = tensors[f"{old}.attention.output.dense.{k}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{new}.{part}.{k}"] = tensors[f"{old}.{part}.{k}"]
        for n in ("1", "2"):
            out[f"{new}.ls{n}.gamma"] = tensors[f"{old}.layer_scale{n}.lambda1"]
    return out


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["Hugging Face DINOv2", "Hugging Face DINOv2 with registers"])
def test_the_original_names_of_dinov2(tmp_path, name, chunked):
    def rename(tensors):
        renamed = original_dinov2(tensors)
        if chunked:
            renamed = {
                k.replace("blocks.", "blocks.0.") if k.startswith("blocks.") else k: v for k, v in renamed.items()
            }
        tensors.clear()
        tensors |= renamed

    folder = changed(tmp_path, rename, name)
    for side, want in FAMILIES[name]["features"].items():
        recorded.assert_close(recorded.ours(folder, int(side)), want)
    assert published.read(folder).family.name == name.replace("Hugging Face", "original")


def test_the_original_names_of_mae_with_its_decoder(tmp_path):
    def with_decoder(tensors):
        tensors["mask_token"] = np.zeros((1, 1, 16), np.float32)
        tensors["decoder_pos_embed"] = np.zeros((1, 17, 16), np.float32)
        tensors["decoder_embed.weight"] = np.zeros((16, 32), np.float32)
        tensors["decoder_blocks.0.attn.qkv.weight"] = np.zeros((48, 16), np.float32)

    folder = changed(tmp_path, with_decoder, "timm ViT")
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    recorded.assert_close(recorded.ours(folder, 32), FAMILIES["timm ViT"]["features"]["32"])
    assert published.read(folder).family.name == "original MAE"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_files_are_widened_before_anything_is_computed(tmp_path, dtype):
    def narrow(tensors):
        tensors |= {k: v.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for k, v in tensors.items()}

    def wide(tensors):
        narrow(tensors)
        tensors |= {k: v.astype("f4") for k, v in tensors.items()}

    got, want = (recorded.ours(changed(tmp_path / str(i), change), 48) for i, change in enumerate((narrow, wide)))
    np.testing.assert_array_equal(got, want)


def with_facts(tmp_path, name, facts, file="config.json"):
    folder = recorded.write(FAMILIES[name], tmp_path / "weights")
    (folder / file).write_text(facts if isinstance(facts, str) else json.dumps(facts))
    return folder


def test_any_length_of_header_is_safetensors(tmp_path):
    tensors = recorded.tensors(FAMILIES[VIT]["shapes"])
    starts = set()
    for length in range(0, 256, 8):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"x": "y" * length})
        starts.add((tmp_path / "model.safetensors").read_bytes()[0])
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[VIT]["beside"]["config.json"]))
        published.read(tmp_path)
    assert 0x80 in starts and len(starts) == 32


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_of_published_widths_are_known(tmp_path, width, heads):
    from tcq.models.weights import layouts

    assert layouts._heads(width, {}) == heads
    assert layouts._heads(width, {"num_attention_heads": 2}) == 2
    with pytest.raises(published.WeightsError, match="the number of attention heads for width 1408 is unknown"):
        layouts._heads(1408, {})
    with pytest.raises(published.WeightsError, match="width 192 cannot be 5"):
        layouts._heads(192, {"num_attention_heads": 5})


def test_a_distilled_deit_is_refused_with_its_second_token(tmp_path):
    def distil(tensors):
        tensors["dist_token"] = np.zeros((1, 1, 32), "f4")
        tensors["pos_embed"] = np.zeros((1, 18, 32), "f4")

    folder = changed(tmp_path, distil, "timm ViT")
    with pytest.raises(
        configs.ConfigError, match="unexpected: dist_token(.|\n)*17 positions do not form a square grid"
    ):
        recorded.ours(folder, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"norm.bias": np.full(32, np.nan, "f4")}), "not finite: params/norm/bias"),
        (lambda t: t.update({"norm.bias": np.full(32, 1e300)}), "not finite: params/norm/bias"),
        (lambda t: t.update({"norm.bias": np.zeros(32, "i4")}), "not floating-point: params/norm/bias int32"),
        (lambda t: t.update({"cls_token": np.zeros(32, "f4")}), r"other shape: cls_token \(32,\) .*\(1, 1, 32\) exp"),
        (lambda t: t.update({"pos_embed": np.zeros((32, 16, 1), "f4")}), "other shape: pos_embed"),
        (lambda t: t.update({"blocks.0.attn.proj.weight": np.zeros(9, "f4")}), "other shape: blocks.0.attn.proj"),
        (lambda t: t.update({"patch_embed.proj.weight": np.zeros(9, "f4")}), "must have 4 dimensions"),
        (lambda t: t.update({"blocks.3000.x": np.zeros(1, "f4")}), "missing: blocks.2.attn.qkv.weight"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("blocks")], "is not of a known family"),
    ],
)  # fmt: skip
def test_bad_tensors_are_named(tmp_path, change, words):
    with pytest.raises(configs.ConfigError, match=words):
        recorded.ours(changed(tmp_path, change), 32)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("{", "cannot be read"),
        ("[1]", "must be a JSON object"),
        ({"pretrained_cfg": "x"}, "must be a JSON object"),
        ({"model_args": [1]}, "model_args is"),
        ({"model_args": {"num_heads": True}}, "num_attention_heads is True"),
        ({"model_args": {"num_heads": 4.5}}, "width 32 cannot be 4.5"),
        ({"num_attention_heads": 4, "mean": 0.5}, "mean 0.5 must be three numbers"),
        ({"num_attention_heads": 4, "std": [1, 1, 0]}, "std is 0"),
        ({"num_attention_heads": 4, "interpolation": ["x"]}, "interpolation"),
        ({"num_attention_heads": 4, "crop_pct": "0.9"}, "crop_pct is '0.9'"),
        ({"num_attention_heads": 4, "crop_pct": 0.9, "crop_mode": "border"}, "crop_mode 'border'"),
        ({"num_attention_heads": 4, "do_resize": True, "do_center_crop": True, "crop_size": {}}, "a crop of"),
        ({"num_attention_heads": 4, "hidden_size": 768}, "describes another model: hidden_size 768, not 32"),
    ],
)
def test_bad_json_beside_the_weights_is_named(tmp_path, facts, words):
    with pytest.raises(published.WeightsError, match=words):
        published.read(with_facts(tmp_path, VIT, facts))


def test_json_of_hugging_face_and_other_architectures(tmp_path):
    def resizing(facts):
        family = published.read(with_facts(tmp_path, "Hugging Face ViT", facts, "preprocessor_config.json")).family
        return family.resize, family.interpolation, family.crop_share

    assert resizing({"do_resize": True, "size": 224, "resample": 2}) == ("squash", "bilinear", 1)
    assert resizing({"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 3}) == (
        "squash",
        "bicubic",
        1,
    )
    assert resizing({"do_resize": True, "size": {"shortest_edge": 256}, "resample": 3}) == ("crop", "bicubic", 1)
    cut = {"do_resize": True, "size": 256, "do_center_crop": True, "crop_size": 192}
    assert resizing(cut) == ("crop", "bilinear", 0.75)
    with pytest.raises(published.WeightsError, match="architecture 'resnetblur18' is unknown: must be one of resnet18"):
        published.read(with_facts(tmp_path, "ResNet-18", {"architecture": "resnetblur18"}))
    for name in ("resnet18", "resnet18.a1_in1k", "tv_resnet18"):
        published.read(with_facts(tmp_path, "ResNet-18", {"architecture": name}))


def test_a_workdir_without_a_run(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for text, words in (("[]", "is a list"), ("{", "cannot be read"), (b"\xff", "model.weights")):
        (tmp_path / "run" / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(configs.ConfigError, match=words):
            configs.load("configs/digits.py", [f"model.weights={tmp_path / 'run'}"])


class TestRefused:
    def test_pickles_are_refused_with_a_line_that_converts_them(self, tmp_path):
        import pickle

        (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}))
        import zipfile

        with zipfile.ZipFile(tmp_path / "new.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"x")
        for name in ("old.pth", "new.pt"):
            with pytest.raises(published.WeightsError, match=r"safetensors\.torch import save_file"):
                published.read(tmp_path / name)

    def test_object_arrays(self, tmp_path):
        np.savez(tmp_path / "vit.npz", a=np.array([{"b": 1}], dtype=object))
        with pytest.raises(published.WeightsError, match="cannot be read as .npz or safetensors"):
            published.read(tmp_path / "vit.npz")

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda p: (p / "a.safetensors").write_bytes(b"garbage" * 9), "cannot be read"),
            (lambda p: (p / "a.safetensors").write_bytes(b""), "cannot be read"),
            (lambda p: save_file({"x": np.zeros(1, "f4")}, p / "a.safetensors"), "is not of a known family"),
            (lambda p: None, "must hold one .npz or .safetensors file, it holds none"),
            (lambda p: [(p / n).write_bytes(b"") for n in ("a.npz", "b.npz")], "it holds a.npz, b.npz"),
        ],
    )
    def test_other_files(self, tmp_path, make, words):
        make(tmp_path)
        with pytest.raises(published.WeightsError, match=words):
            published.read(tmp_path)

    def test_a_missing_path_lists_the_files_of_its_folder(self, tmp_path):
        recorded.write(FAMILIES[VIT], tmp_path)
        with pytest.raises(configs.ConfigError, match="not found; its folder has model.safetensors"):
            configs.load("configs/digits.py", [f"model.weights={tmp_path}/b16.npz"])

    def test_another_named_size_and_a_contradiction(self, tmp_path):
        folder = recorded.write(FAMILIES["ResNet-50"], tmp_path / "resnet")
        for name in ("vit_b16", "resnet18"):
            with pytest.raises(configs.ConfigError, match=f"model.name is {name}.*which is resnet50"):
                configs.load("configs/digits.py", [f"model.weights={folder}", f"model.name={name}"])
        folder = recorded.write(FAMILIES[VIT], tmp_path / "vit")
        with pytest.raises(configs.ConfigError, match="'width': 32.*no name"):
            configs.load("configs/digits.py", [f"model.weights={folder}", "model.name=vit_b16"])
        with pytest.raises(configs.ConfigError, match="pooling attention has a learned query"):
            configs.load(
                "configs/digits.py", [f"model.weights={folder}", "data.image_size=32", "model.pooling=attention"]
            )
        with pytest.raises(configs.ConfigError, match="model.depth is 3, but 2 in the weights"):
            configs.load("configs/digits.py", [f"model.weights={folder}", "model.depth=3"])
        with pytest.raises(configs.ConfigError, match="20 is not divisible by model.patch 8: use for example 16"):
            configs.load("configs/digits.py", [f"model.weights={folder}", "data.image_size=20"])

    def test_another_activation(self, tmp_path):
        folder = recorded.write(FAMILIES["Hugging Face ViT"], tmp_path)
        facts = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(facts | {"hidden_act": "relu"}))
        with pytest.raises(published.WeightsError, match="activation 'relu'"):
            published.read(folder)


@pytest.mark.whole
@pytest.mark.parametrize("name", [VIT, pytest.param("ResNet-18, CIFAR stem", marks=pytest.mark.slow)])
def test_a_run_is_initialized_from_weights_and_another_from_that_run(tmp_path, name, images):
    folder = recorded.write(FAMILIES[name], tmp_path / "weights")
    side = 16 if name == VIT else 8
    flags = [
        f"data.image_size={side}",
        "train.total_steps=3",
        "checkpoint.every_steps=2",
        "checkpoint.keep=2",
        "eval.every_steps=0",
        "optim.warmup_steps=1",
    ]
    plain = [f for f in small.SMALL if not f.startswith("model.")]
    c = configs.load("configs/digits.py", [*plain, *flags, f"model.weights={folder}"])
    train.train(c, tmp_path / "run")
    shutil.rmtree(folder)  # a run can be resumed without its weights
    arguments = [*plain, *flags, f"model.weights={folder}"]
    with pytest.raises(configs.ConfigError, match="not found"):
        configs.load("configs/digits.py", arguments)
    assert configs.load("configs/digits.py", arguments, workdir=tmp_path / "run").to_dict() == c.to_dict()
    (newest,) = (p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name == "3")
    shutil.rmtree(newest)
    if name == VIT:
        with pytest.raises(published.WeightsError, match="not found"):
            backbone_from_weights(c, retriever.from_config(c))
    train.train(c, tmp_path / "run")
    first = encode.load(tmp_path / "run")
    again = configs.load("configs/digits.py", [*plain, *flags, f"model.weights={tmp_path / 'run'}"])
    keys = ("name", "width", "depth", "registers", "layer_scale", "mean", "std", "stem", "pooling")
    assert [again.model[k] for k in keys] == [c.model[k] for k in keys]
    model = retriever.from_config(again)
    got = traverse_util.flatten_dict(backbone_from_weights(again, model), sep="/")
    for collection, values in first.variables.items():
        if "backbone" in values:
            for key, value in traverse_util.flatten_dict(values["backbone"], sep="/").items():
                np.testing.assert_array_equal(got[f"{collection}/{key}"], value)
    assert len(got) == sum(len(jax.tree.leaves(v["backbone"])) for v in first.variables.values())

    index.build(tmp_path / "run", images, tmp_path / "index")  # an index also holds batch statistics
    opened = index.open_index(tmp_path / "index")
    query = next(p for p in opened.paths if p.endswith("017.png"))
    assert index.search(opened, index.read_queries(opened, [query]), k=3)[0][0].path
    for a, b in zip(jax.tree.leaves(first.variables), jax.tree.leaves(opened.encoder.variables), strict=True):
        np.testing.assert_array_equal(a, b)
