"""Files and activations of the libraries that define the published formats, for the recipes of recorded.py.

`python tests/helpers/peer_models.py` records them in activations.json. It needs PyTorch, transformers and timm (`make
test-peers`).
"""

import json
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import recorded

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
TIMM_CONFIG = {
    "model_args": {"num_heads": 4},
    "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "crop_pct": 0.95, "interpolation": "bilinear"},
}


def timm():
    """timm, whose models import torchvision, which they do not need here."""

    class Any(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Any(name, (), {})

    class Absent(types.ModuleType):
        __path__ = ()
        __getattr__ = Any.__getattr__

    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in (
            "",
            ".datasets",
            ".datasets.folder",
            ".models",
            ".models.feature_extraction",
            ".ops",
            ".ops.misc",
            ".transforms",
            ".transforms.functional",
            ".transforms.v2",
        ):
            sys.modules[f"torchvision{name}"] = module = Absent(f"torchvision{name}")
            module.__spec__ = ModuleSpec(f"torchvision{name}", None)
            parent, _, child = f"torchvision{name}".rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    import timm.models

    return timm.models


def fill(model):
    """The recipe's values in every parameter and buffer of a PyTorch model."""
    state = model.state_dict()
    model.load_state_dict(
        {k: torch.from_numpy(np.asarray(recorded.tensor(k, tuple(v.shape)))) for k, v in state.items()}
    )
    return model.eval()


def images(side):
    return torch.from_numpy(recorded.images(side).transpose(0, 3, 1, 2).copy())


def hugging_face(kind):
    """A model whose SAVED tensors follow the recipe (transformers renames them on the way)."""
    if kind.startswith("ViT"):
        config = transformers.ViTConfig(intermediate_size=48, **SMALL)
        of = transformers.ViTForImageClassification if "classifier" in kind else transformers.ViTModel
    elif kind == "DINOv2":
        of, config = transformers.Dinov2Model, transformers.Dinov2Config(mlp_ratio=2, **SMALL)
    else:
        of = transformers.Dinov2WithRegistersModel
        config = transformers.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **SMALL)
    with tempfile.TemporaryDirectory() as folder:
        of(config).save_pretrained(folder)
        shapes = {k: list(v.shape) for k, v in load_file(f"{folder}/model.safetensors").items()}
        beside = {"config.json": json.loads(Path(folder, "config.json").read_text())}
        if kind.startswith("DINOv2"):
            beside["preprocessor_config.json"] = {
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "do_resize": True,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
                "resample": 3,
                "size": {"shortest_edge": 256},
            }
        family = {"file": "model.safetensors", "shapes": shapes, "beside": beside}
        recorded.write(family, Path(folder))
        for name in ("preprocessor_config.json",):
            Path(folder, name).unlink(missing_ok=True)
        model = of.from_pretrained(folder).eval()
    backbone = getattr(model, "vit", model)
    options = {"interpolate_pos_encoding": True} if kind.startswith("ViT") else {}
    return family, lambda side: backbone(images(side), **options).last_hidden_state[:, 0]


def timm_vit(**options):
    model = fill(timm().vision_transformer.VisionTransformer(**(TIMM | {"num_classes": 5} | options)))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}

    def features(side):
        model.set_input_size(img_size=32)
        model.load_state_dict({k: torch.from_numpy(v) for k, v in recorded.tensors(shapes).items()})
        if side != 32:
            model.set_input_size(img_size=side)
        return model.forward_features(images(side))[:, 0]

    return {"file": "model.safetensors", "shapes": shapes, "beside": {"config.json": TIMM_CONFIG}}, features


def timm_google():
    """Google's .npz, read by timm into its own ViT; at the native size only, as timm resamples by another rule."""
    shapes = google_shapes()
    model = timm().vision_transformer.VisionTransformer(**TIMM, num_classes=5, act_layer="gelu_tanh")
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/vit.npz", **recorded.tensors(shapes))
        model.load_pretrained(f"{folder}/vit.npz")
    model.eval()
    return {"file": "vit.npz", "shapes": shapes, "beside": {}}, lambda side: model.forward_features(images(side))[:, 0]


def google_shapes(width=32, heads=4, patch=8, tokens=17, mlp=64, depth=2, classes=5):
    each = width // heads
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, tokens, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
        for part in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_1/{part}/kernel"] = (width, heads, each)
            shapes[f"{block}/MultiHeadDotProductAttention_1/{part}/bias"] = (heads, each)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = (heads, each, width)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = (width,)
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (width, mlp), f"{block}/MlpBlock_3/Dense_0/bias": (mlp,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_1/kernel": (mlp, width), f"{block}/MlpBlock_3/Dense_1/bias": (width,)}
    return {k: list(v) for k, v in shapes.items()}


def timm_resnet(name, cifar=False):
    model = timm().create_model(name, num_classes=5)
    if cifar:
        model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = torch.nn.Identity()
    model = fill(model)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    beside = {"config.json": {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}}
    family = {"file": "model.safetensors", "shapes": shapes, "beside": beside}
    return family, lambda side: model.forward_features(images(side)).mean(dim=(2, 3))


FAMILIES = {
    "Hugging Face ViT": lambda: hugging_face("ViT"),
    "Hugging Face ViT with a classifier": lambda: hugging_face("ViT with a classifier"),
    "Hugging Face DINOv2": lambda: hugging_face("DINOv2"),
    "Hugging Face DINOv2 with registers": lambda: hugging_face("DINOv2 with registers"),
    "timm ViT": lambda: timm_vit(),
    "timm ViT without a head": lambda: timm_vit(num_classes=0),
    "timm ViT with layer scale": lambda: timm_vit(init_values=0.5),
    "timm ViT with registers": lambda: timm_vit(reg_tokens=4, no_embed_class=True, init_values=0.5),
    "Google ViT, as timm reads it": timm_google,
    "ResNet-18": lambda: timm_resnet("resnet18"),
    "ResNet-18, CIFAR stem": lambda: timm_resnet("resnet18", cifar=True),
    "ResNet-34": lambda: timm_resnet("resnet34"),
    "ResNet-50": lambda: timm_resnet("resnet50"),
    "ResNet-101": lambda: timm_resnet("resnet101"),
}
RECORDED = [name for name in FAMILIES if name not in ("ResNet-34", "ResNet-101")]  # the deepest are left to test-peers


def sides(name):
    return recorded.SIDES[:1] if name.startswith(("Google", "ResNet")) else recorded.SIDES


def record(name):
    family, features = FAMILIES[name]()
    with torch.no_grad():
        features_by_side = {str(side): features(side).numpy() for side in sides(name)}
    digits = {side: [[float(f"{x:.8g}") for x in row] for row in rows] for side, rows in features_by_side.items()}
    return family | {"features": digits}


if __name__ == "__main__":
    timm_version = timm() and sys.modules["timm"].__version__
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm_version}"
    text = {name: record(name) for name in RECORDED}
    recorded.PATH.write_text(json.dumps({"versions": versions, "families": text}, separators=(",", ":")) + "\n")
    print(versions, f"{recorded.PATH.stat().st_size:,} bytes")
