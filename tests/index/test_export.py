import faiss
import numpy as np

import small
from tcq import encode
from tcq import index as indexes
from tcq.index import export


def test_faiss_ranks_as_tcq(index, images, tmp_path):
    done = small.main("export", f"--index={index}", f"--out={tmp_path / 'x.faiss'}")
    assert done.returncode == 0, done.stderr
    peer, opened = faiss.read_index(str(tmp_path / "x.faiss")), indexes.open_index(index)
    query = indexes.read_queries(opened, [images / "class 5" / "005.png", images / "class 6" / "006.png"])
    features = encode.encode(opened.encoder, query).features
    distances, ids = peer.search(features, 9)
    ours, _ = indexes.search_features(opened, features, k=9)
    np.testing.assert_allclose(ours, -distances, rtol=1e-3, atol=1e-4)
    items = np.concatenate([opened.encoder.codebooks[m][opened.codes[:, m]] for m in range(2)], axis=1)
    own = ((features[:, None] - items[ids]) ** 2).sum(-1)  # FAISS orders ties in its own way
    np.testing.assert_allclose(own, distances, rtol=1e-3, atol=1e-4)


def test_npz_without_pickles(index, tmp_path):
    export.export(index, tmp_path / "x.npz", format="npz")
    opened = indexes.open_index(index)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as saved:
        np.testing.assert_array_equal(saved["codes"], opened.codes)
        np.testing.assert_array_equal(saved["codebooks"], opened.encoder.codebooks)
        assert saved["paths"][3].decode() == opened.paths[3]
    small.assert_refused(small.main("export", f"--index={index}", f"--out={tmp_path / 'x.npz'}"), "exists")


def test_a_folder_that_is_missing_is_one_message(index, tmp_path):
    for format in export.FORMATS:
        out = tmp_path / "no" / "such" / "x"
        done = small.main("export", f"--index={index}", f"--out={out}", f"--format={format}")
        small.assert_refused(done, "its folder does not exist")
