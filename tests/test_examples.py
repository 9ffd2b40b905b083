"""The shipped embedders with the libraries that they wrap, on small random models in the true formats."""

import numpy as np
import pytest

import small
from tcq.models import embedder

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # the libraries' own warnings
EXAMPLES = small.ROOT / "examples"
IMAGES = np.random.RandomState(0).randint(0, 256, (5, 32, 32, 3)).astype(np.uint8)


def run(name):
    """The embeddings of IMAGES, and of one image alone, by a fresh copy of an example."""
    embedder.load.cache_clear()
    spec = f"{EXAMPLES / name}:embed"
    rows = embedder.run(spec, IMAGES)
    np.testing.assert_allclose(embedder.run(spec, IMAGES[2:3])[0], rows[2], atol=1e-5)
    return rows


def scaled(mean, std):
    return ((IMAGES.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_hugging_face(tmp_path, monkeypatch, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision, text = shape | {"intermediate_size": 64}, {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99}
    text |= {"num_attention_heads": 2, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind in ("clip", "siglip"):
        name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
        options = {"projection_dim": 16} if kind == "clip" else {}
        config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **options)
        model = getattr(transformers, f"{name}Model")(config).eval()
        processor = getattr(transformers, f"{name}ImageProcessor")()
        width = 16 if kind == "clip" else 32
    else:
        name, width = {"dinov2": "Dinov2", "vit": "ViT"}[kind], 32
        config = getattr(transformers, f"{name}Config")(**shape)
        options = {"add_pooling_layer": False} if kind == "vit" else {}
        model = getattr(transformers, f"{name}Model")(config, **options).eval()
        processor = {"dinov2": transformers.BitImageProcessor, "vit": transformers.ViTImageProcessor}[kind]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setenv("HF_MODEL", str(tmp_path))
    rows = run("hugging_face.py")
    assert rows.shape == (len(IMAGES), width)
    processed = processor(list(IMAGES), do_resize=False, do_center_crop=False, return_tensors="pt")
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            expected = model.get_image_features(**processed).pooler_output
        else:
            output = model(**processed)  # a ViT's pooling layer is random here, as in published files without one
            expected = output.pooler_output if kind == "dinov2" else output.last_hidden_state[:, 0]
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-5)
    assert np.ptp(rows, axis=0).max() > 0.01


def test_timm(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import peer_models

    timm = peer_models.timm()
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv("TIMM_MODEL", "resnet18")
    monkeypatch.setenv("TIMM_WEIGHTS", str(tmp_path / "weights.pth"))
    model.reset_classifier(0)
    expected = model.eval()(torch.from_numpy(scaled((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))).detach().numpy()
    np.testing.assert_allclose(run("timm_model.py"), expected, atol=1e-4)


@pytest.mark.parametrize("form", ["float, planes", "uint8, one at a time"])
def test_onnx(tmp_path, monkeypatch, form):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    if form == "float, planes":
        given = helper.make_tensor_value_info("pixels", types.FLOAT, ["n", 3, 32, 32])
        nodes = [
            helper.make_node("GlobalMaxPool", ["pixels"], ["pooled"]),
            helper.make_node("Neg", ["pooled"], ["out"]),
        ]
        expected = -scaled((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)).max(axis=(2, 3))
        monkeypatch.setenv("ONNX_MEAN", "0.5,0.4,0.3")
        monkeypatch.setenv("ONNX_STD", "0.2,0.2,0.1")
    else:
        given = helper.make_tensor_value_info("pixels", types.UINT8, [1, 32, 32, 3])
        nodes = [
            helper.make_node("Cast", ["pixels"], ["floats"], to=types.FLOAT),
            helper.make_node("ReduceMean", ["floats"], ["pooled"], axes=[1, 2], keepdims=0),
            helper.make_node("Neg", ["pooled"], ["out"]),
        ]
        expected = IMAGES.mean(axis=(1, 2))
        monkeypatch.setenv("ONNX_OUTPUT", "pooled")
    outputs = [helper.make_tensor_value_info(name, types.FLOAT, None) for name in ("out", "pooled")]
    graph = helper.make_graph(nodes, "small", [given], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
    monkeypatch.setenv("ONNX_MODEL", str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(run("onnx_model.py"), expected, rtol=1e-4)


def test_litert(tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert")
    (tmp_path / "pool.tflite").write_bytes(pooling_model())
    monkeypatch.setenv("LITERT_MODEL", str(tmp_path / "pool.tflite"))
    monkeypatch.setenv("LITERT_TENSOR", "pooled")
    np.testing.assert_allclose(run("litert.py"), (IMAGES.mean(axis=(1, 2)) - 7) * 0.5, atol=0.26)  # uint8 rounds
    monkeypatch.setenv("LITERT_TENSOR", "nothing")
    with pytest.raises(embedder.EmbedderError, match="LITERT_TENSOR 'nothing' is not a tensor"):
        run("litert.py")


def pooling_model():
    """A .tflite file: uint8 pixels, their average, clipped below zero."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name, shape):
        t = schema.TensorT()
        t.name, t.shape, t.type = name, shape, schema.TensorType.UINT8
        t.quantization = schema.QuantizationParametersT()
        t.quantization.scale, t.quantization.zeroPoint = [0.5], [7]
        return t

    def operator(code, inputs, outputs):
        op = schema.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = code, inputs, outputs
        return op

    codes = [schema.OperatorCodeT(), schema.OperatorCodeT()]
    for code, builtin in zip(codes, ("AVERAGE_POOL_2D", "RELU"), strict=True):
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, builtin)
        code.version = 1
    pool = operator(0, [0], [1])
    pool.builtinOptionsType, pool.builtinOptions = schema.BuiltinOptions.Pool2DOptions, schema.Pool2DOptionsT()
    pool.builtinOptions.padding = schema.Padding.VALID
    for name, value in {"strideW": 32, "strideH": 32, "filterWidth": 32, "filterHeight": 32}.items():
        setattr(pool.builtinOptions, name, value)
    graph = schema.SubGraphT()
    graph.tensors = [tensor("in", [1, 32, 32, 3]), tensor("pooled", [1, 1, 1, 3]), tensor("out", [1, 1, 1, 3])]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [pool, operator(1, [1], [2])]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, codes, [graph], [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
