import numpy as np
import pytest

from tcq import config as configs
from tcq import encode


def test_every_image_is_encoded_once_for_any_batch_size(run):
    encoder = encode.load(run)
    images = np.random.RandomState(0).randint(0, 256, (37, 8, 8, 3)).astype(np.uint8)
    whole = encode.encode(encoder, images)
    assert len(whole.features) == 37
    for size in (1, 5, 64):
        config = configs.from_json(configs.to_json(encoder.config))
        config.eval.batch_size = size
        part = encode.encode(encoder._replace(config=config), images)
        np.testing.assert_allclose(part.features, whole.features, atol=1e-5)
    np.testing.assert_array_equal(encode.codes(encoder, images), whole.codes)
    one = encode.encode(encoder, images[20:21])
    np.testing.assert_allclose(one.features[0], whole.features[20], atol=1e-5)
    assert len(encode.encode(encoder, images[:0]).codes) == 0
    with pytest.raises(ValueError, match=r"must be \(N, 8, 8, 3\)"):
        encode.encode(encoder, np.zeros((2, 9, 9, 3), np.uint8))
