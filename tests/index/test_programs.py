"""The encoder as a program that runs without tcq."""

import json
import subprocess
import sys

import numpy as np
import pytest

import small
from tcq import config as configs
from tcq import encode
from tcq import index as indexes
from tcq.index import programs
from tcq.models import retriever

READER = """
import json, sys
import numpy as np
from jax import export
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert program.platforms == ("cpu", "cuda", "tpu")
features, codes = program.call(np.load(sys.argv[2]))
np.savez(sys.argv[3], features=features, codes=codes)
assert not [m for m in sys.modules if m.startswith(("tcq", "flax"))]
"""


def test_stablehlo_runs_without_tcq(index, images, tmp_path):
    done = small.main("export", f"--index={index}", f"--out={tmp_path / 'encoder.bin'}", "--format=stablehlo")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "encoder.bin.json").read_text())
    assert about["encoder"]["input"] == "uint8" and about["encoder"]["image_size"] == 8
    opened = indexes.open_index(index)
    assert np.shape(about["codebooks"]) == opened.encoder.codebooks.shape
    for count in (1, 5):  # any number of images
        queries = indexes.read_queries(opened, list(opened.paths)[:count])
        np.save(tmp_path / "images.npy", queries)
        files = [tmp_path / "encoder.bin", tmp_path / "images.npy", tmp_path / "out.npz"]
        environment = small.environment() | {"PYTHONPATH": ""}
        subprocess.run([sys.executable, "-c", READER, *files], check=True, cwd=tmp_path, env=environment)
        features, codes = encode.encode(opened.encoder, queries)
        with np.load(tmp_path / "out.npz") as found:
            np.testing.assert_allclose(found["features"], features, atol=1e-5)
            np.testing.assert_array_equal(found["codes"], codes)
            assert found["codes"].dtype == np.uint8


@pytest.mark.parametrize("fault", ["features", "codes", "nan"])
def test_a_program_that_differs_is_refused(index, fault):
    encoder = indexes.open_index(index).encoder

    def run(images):
        features, codes = encode.encode(encoder, images)
        if fault == "codes":
            return features, (codes + (np.arange(len(codes)) % 5 == 0)[:, None]).astype(codes.dtype)
        return features * (1.001 if fault == "features" else np.nan), codes

    with pytest.raises(programs.ProgramError, match="differs from the encoder"):
        programs.check(encoder, run)
    programs.check(encoder, lambda images: encode.encode(encoder, images))


def test_onnx_without_its_library_is_one_message(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    done = small.main("export", f"--index={index}", f"--out={tmp_path / 'x.onnx'}", "--format=onnx")
    small.assert_refused(done, "pip install jax2onnx onnxruntime")
    assert list(tmp_path.iterdir()) == []


def test_a_resnet_is_refused_as_onnx(index, tmp_path):
    encoder = indexes.open_index(index).encoder
    config = configs.from_json(configs.to_json(encoder.config))
    config.model.name = "resnet18"
    other = encoder._replace(config=config, model=retriever.from_config(config))
    with pytest.raises(programs.ProgramError, match="model resnet18: jax2onnx cannot write ResNets"):
        programs.write_onnx(other, tmp_path / "x.onnx")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_onnx_runs_in_onnxruntime(index, tmp_path):
    pytest.importorskip("jax2onnx")
    import onnxruntime

    done = small.main("export", f"--index={index}", f"--out={tmp_path / 'x.onnx'}", "--format=onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    opened = indexes.open_index(index)
    for count in (1, 5):
        queries = indexes.read_queries(opened, list(opened.paths)[:count])
        features, codes = session.run(None, {session.get_inputs()[0].name: queries})
        expected = encode.encode(opened.encoder, queries)
        np.testing.assert_allclose(features, expected.features, atol=1e-4)
        np.testing.assert_array_equal(codes, expected.codes)
