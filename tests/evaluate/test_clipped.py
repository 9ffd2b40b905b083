import numpy as np
import pytest
from PIL import Image

import small
from tcq import config as configs
from tcq import encode, quantizer, train
from tcq.data import splits
from tcq.data.sources import open_source
from tcq.evaluate import clipped


@pytest.mark.parametrize("scope", ["anchor", "batch"])
def test_the_mask_is_that_of_sorting(scope):
    similarity = np.random.RandomState(0).randn(9, 9).astype("f4")
    np.fill_diagonal(similarity, -np.inf)
    mask = clipped.clipped_pairs(similarity, 2.5, scope=scope)
    assert not mask.diagonal().any()
    if scope == "anchor":
        assert (mask.sum(axis=1) == 2).all()
        assert (np.where(mask, similarity, np.inf).min(1) > np.where(mask, -np.inf, similarity).max(1)).all()
    else:
        assert mask.sum() == 22 and similarity[mask].min() > similarity[~mask].max()


@pytest.mark.parametrize(("num_clipped", "shown"), [(0, 0), (3, 3), (5, 5), (12, 5), (17, 8), (19, 10)])
def test_clipped_and_kept_negatives_are_shown(num_clipped, shown):
    similarity = np.random.RandomState(0).randn(20).astype("f4")
    similarity[7] = -np.inf  # the anchor
    order = np.argsort(-similarity)
    clipped_ones = np.isin(np.arange(20), order[:num_clipped])
    columns = clipped.around_the_border(similarity, clipped_ones)
    kept = 10 - shown
    first = [order[0]] if shown else []
    border = order[num_clipped - shown + 1 : num_clipped] if shown else []
    np.testing.assert_array_equal(columns, [*first, *border, *order[num_clipped : num_clipped + kept]])


def test_similarities_are_those_of_features_and_decoded_codes(digits_run):
    encoder = encode.load(digits_run)
    images = open_source(encoder.config.data).images[:7]
    encoded = encode.encode(encoder, images)
    similarity = clipped.similarities(encoder, encoded)
    items = np.asarray(quantizer.decode(encoded.codes, encoder.codebooks))
    for i, j in ((0, 1), (5, 2)):
        x, y = encoded.features[i].astype("f8"), items[j].astype("f8")
        np.testing.assert_allclose(similarity[i, j], x @ y / np.linalg.norm(x) / np.linalg.norm(y), rtol=1e-5)


@pytest.mark.whole
def test_a_run_leaves_a_picture_if_it_clips(tmp_path, digits_run):
    train.train(small.config("loss.clip=0.1", "loss.clip_scope=batch", "train.total_steps=2"), tmp_path / "run")
    with Image.open(tmp_path / "run" / clipped.CLIPPED) as picture:
        assert min(picture.size) > 500
    encoder = encode.load(digits_run)
    encoder = encoder._replace(config=configs.with_eval(encoder.config, []))
    encoder.config.loss.clip = 0
    source = open_source(encoder.config.data)
    clipped.write(tmp_path, encoder, source, splits.of_source(source, encoder.config.data))
    assert not (tmp_path / clipped.CLIPPED).exists()
