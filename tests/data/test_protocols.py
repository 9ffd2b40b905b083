import hashlib
from pathlib import Path

import numpy as np
import pytest

from tcq.data import protocols

# In official order: 5,000 of each class, then 1,000 of each.
CIFAR10 = np.concatenate(
    [np.random.RandomState(i).permutation(np.repeat(np.arange(10), n)) for i, n in enumerate((5000, 1000))]
)
FLICKR = np.random.RandomState(0).rand(25_000, 38) < 0.1


def nus_wide():
    random = np.random.RandomState(0)
    labels = random.rand(195_834, 21) < 0.1
    labels[np.arange(195_834), random.randint(0, 21, 195_834)] = True
    return labels


def labels_of(name):
    if name.startswith("cifar10"):
        return CIFAR10
    return {"nus_wide_21": nus_wide, "folder": lambda: CIFAR10[:1000]}.get(
        name, lambda: FLICKR[:, : protocols.PROTOCOLS[name].num_labels]
    )()


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_parts_are_of_the_published_sizes_and_disjoint(name):
    protocol, labels = protocols.PROTOCOLS[name], labels_of(name)
    parts = protocols.split(name, labels, validation=0.1)
    for part in parts:
        assert part.dtype == np.int64 and part.min() >= 0 and part.max() < len(labels)
        assert len(np.unique(part)) == len(part)
    assert not np.isin(parts.query, parts.database).any()
    assert not np.isin(parts.query, np.concatenate([parts.train, parts.validation])).any()
    assert not np.isin(parts.train, parts.validation).any()
    if protocol.sizes:
        sizes = len(parts.query), len(parts.database), len(parts.train) + len(parts.validation)
        assert sizes == protocol.sizes
    assert len(parts.validation) == round(0.1 * (len(parts.train) + len(parts.validation)))
    whole = protocols.split(name, labels, validation=0)
    assert len(whole.validation) == 0
    np.testing.assert_array_equal(np.sort(np.concatenate([parts.train, parts.validation])), np.sort(whole.train))
    np.testing.assert_array_equal(whole.query, parts.query)
    if protocol.sha256:
        assert protocols.digest(whole) == protocol.sha256
    other = protocols.split(name, labels, seed=77)
    assert protocols.digest(other) != protocols.digest(parts) == protocols.digest(protocols.split(name, labels))


def test_numpys_generator_gives_the_permutations_of_the_reference():
    """MeCoQ's, with the seed 2021 of its code."""
    random = np.random.RandomState(2021)
    by_class = np.concatenate([random.permutation(6000) for _ in range(10)]).astype("<i8")
    assert hashlib.md5(by_class.tobytes()).hexdigest() == "7ac13ff9ef0d2ff1984bcbefa17ab686"
    flickr = np.random.RandomState(2021).permutation(25_000).astype("<i8")
    assert hashlib.md5(flickr.tobytes()).hexdigest() == "f710231a013f75179db0b0932226f500"


def test_mecoq_splits_are_those_permutations():
    parts = protocols.split("cifar10_I", CIFAR10, validation=0)
    again = protocols.split("cifar10_II", CIFAR10, validation=0)
    first = np.flatnonzero(CIFAR10 == 0)
    np.testing.assert_array_equal(parts.query[:5], first[[4827, 1775, 4027, 1623, 2398]])
    np.testing.assert_array_equal(CIFAR10[parts.query], np.repeat(np.arange(10), 1000))
    np.testing.assert_array_equal(CIFAR10[parts.database], np.repeat(np.arange(10), 5000))
    np.testing.assert_array_equal(parts.train, parts.database)
    np.testing.assert_array_equal(again.query, parts.query)
    np.testing.assert_array_equal(again.database, parts.database)
    np.testing.assert_array_equal(again.train, parts.database.reshape(10, 5000)[:, :500].ravel())
    places = np.argsort(np.argsort(CIFAR10, kind="stable"), kind="stable") % 6000  # of each image within its class
    orders = [np.concatenate([parts.query[1000 * c :][:1000], parts.database[5000 * c :][:5000]]) for c in range(10)]
    drawn = places[np.concatenate(orders)].astype("<i8")
    assert hashlib.md5(drawn.tobytes()).hexdigest() == "7ac13ff9ef0d2ff1984bcbefa17ab686"
    flickr = protocols.split("flickr25k_mecoq", FLICKR[:, :24], validation=0)
    np.testing.assert_array_equal(flickr.query[:5] + 1, [13896, 20904, 8540, 13225, 7780])
    np.testing.assert_array_equal(flickr.train, flickr.database[:5000])


def test_spq_is_the_official_split():
    parts = protocols.split("cifar10_spq", CIFAR10, validation=0.02, query=0.5)
    np.testing.assert_array_equal(parts.query, np.arange(50_000, 60_000))
    np.testing.assert_array_equal(parts.database, np.arange(50_000))
    assert len(parts.validation) == 1000


def test_deephash_keeps_training_images_out_of_the_database():
    for name, labels in (("cifar10_54000", CIFAR10), ("flickr25k_deephash", FLICKR)):
        parts = protocols.split(name, labels, validation=0)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts[:3])), np.arange(len(labels)))
    assert (np.bincount(CIFAR10[protocols.split("cifar10_54000", CIFAR10).query]) == 100).all()


def test_nus_wide_draws_from_every_concept():
    labels = nus_wide()
    parts = protocols.split("nus_wide_21", labels, validation=0)
    assert np.isin(parts.train, parts.database).all()
    assert labels[parts.query].sum(0).min() >= 100 and labels[parts.train].sum(0).min() >= 500
    assert len(parts.query) == 2100 and len(parts.train) == 10_500


def test_the_folder_stream_is_frozen():
    parts = protocols.split("folder", np.zeros(1000, int), query=0.1, validation=0.2, seed=0)
    assert protocols.digest(parts) == "4e1d7d179c001f33a4cac34bff915e23dbe68783a60858c693467a0f47a13c82"
    assert [len(p) for p in parts] == [100, 900, 720, 180]
    np.testing.assert_array_equal(np.sort(np.concatenate([parts.train, parts.validation])), parts.database)


def test_cut_offs():
    assert protocols.cut_off("cifar10_I", -1, 50_000) == 1000
    assert protocols.cut_off("cifar10_54000", -1, 54_000) == 54_000
    assert protocols.cut_off("flickr25k_mecoq", -1, 23_000) == 5000
    assert protocols.cut_off("cifar10_I", 0, 50_000) == 50_000
    assert protocols.cut_off("folder", 70, 50) == 50


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("coco", CIFAR10, "'coco' is unknown: use one of folder, cifar10_spq, cifar10_I"),
        ("cifar10_spq", CIFAR10[:50_000], "needs 60,000 images in official order, got 50,000"),
        ("cifar10_I", np.sort(CIFAR10), "not the labels of CIFAR-10 in official order"),
        ("cifar10_I", CIFAR10 + 1, "not the labels of CIFAR-10 in official order"),
        ("cifar10_I", np.eye(10, dtype=bool)[CIFAR10], r"needs labels for 'same class', got an array \(60000, 10\)"),
        ("flickr25k_mecoq", CIFAR10[:25_000], r"needs labels for 'at least one of 24 labels shared'"),
        ("flickr25k_deephash", FLICKR[:, :24], r"needs labels for 'at least one of 38 labels shared', got .*24\)"),
        ("nus_wide_21", np.zeros((195_834, 21), bool), "195,834 images without any"),
        ("nus_wide_21", np.eye(21, dtype=bool)[np.zeros(195_834, int)], "needs 600 images of each concept"),
    ],
)
def test_other_images_are_refused_with_the_numbers(name, labels, message):
    with pytest.raises(protocols.ProtocolError, match=message):
        protocols.split(name, labels)


def test_the_docs_list_every_protocol():
    rows = {}
    for line in Path("docs/protocols.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = cells[1:]
    for name, protocol in protocols.PROTOCOLS.items():
        assert rows[name][3] == (f"{protocol.k:,}" if protocol.k else "all"), name
        assert rows[name][5].split(",")[0] in (str(protocol.seed), "none drawn"), name
        if protocol.num_labels:
            assert f"one of {protocol.num_labels} labels" in rows[name][4]


def test_shares_and_seeds():
    with pytest.raises(protocols.ProtocolError, match="seed -1 must be from 0"):
        protocols.split("folder", np.zeros(10, int), seed=-1)
    with pytest.raises(protocols.ProtocolError, match="query 1.0"):
        protocols.split("folder", np.zeros(10, int), query=1.0)
