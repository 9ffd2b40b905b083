"""Published formats against the libraries that define them: `make test-peers`."""

import importlib.util

import numpy as np
import pytest

import recorded

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        not importlib.util.find_spec("torch"), reason="needs PyTorch, transformers, timm: make test-peers"
    ),
    pytest.mark.filterwarnings("ignore"),
]
NAMES = [*recorded.families(), "ResNet-34", "ResNet-101"]


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_peers(tmp_path, name):
    import peer_models

    computed = peer_models.record(name)
    folder = recorded.write(computed, tmp_path / "weights")
    for side, want in computed["features"].items():
        recorded.assert_close(recorded.ours(folder, int(side)), want)
    stored = recorded.families().get(name)
    if stored:  # what `make test` compares with is still what the libraries compute
        assert (stored["shapes"], stored["file"]) == (computed["shapes"], computed["file"])
        for side, want in stored["features"].items():
            recorded.assert_close(computed["features"][side], want)


def test_every_family_of_the_peers_is_recorded_or_named_here():
    import peer_models

    assert set(peer_models.FAMILIES) == set(NAMES)


@pytest.mark.parametrize("kind", ["ViTImageProcessorPil", "BitImageProcessorPil"])
@pytest.mark.parametrize("size", [(300, 260), (500, 333), (256, 256)])
def test_images_are_prepared_as_transformers_does(kind, size):
    """Equal up to rounding: transformers resizes and then crops, tcq resizes the crop."""
    import transformers

    from tcq.data import images

    processor = {
        "ViTImageProcessorPil": lambda of: of(size={"height": 224, "width": 224}, resample=2),
        "BitImageProcessorPil": lambda of: of(
            size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3, do_convert_rgb=True
        ),
    }[kind](getattr(transformers, kind))
    resize = (
        images.Resize("squash", "bilinear", 1.0) if kind.startswith("ViT") else images.Resize("crop", "bicubic", 0.875)
    )
    picture, data = recorded.photo(size)
    want = np.asarray(processor(picture, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0])
    got = images.decode(data, size=224, resize=resize).transpose(2, 0, 1).astype(float)
    assert np.abs(got - want).mean() < 2.0
    worse = images.decode(data, size=224, resize=images.Resize("crop", "bicubic", 0.7)).transpose(2, 0, 1).astype(float)
    assert np.abs(worse - want).mean() > 4 * np.abs(got - want).mean()
