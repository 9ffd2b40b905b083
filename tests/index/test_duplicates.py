"""Groups of copies in an index."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

import small
import synthetic
from tcq import cli
from tcq import index as indexes
from tcq.index import closeness, duplicates

pytestmark = pytest.mark.whole


def found(path, *flags):
    done = small.main("duplicates", f"--index={path}", "--json", *flags)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(group):
    return sorted(c["path"].rpartition("/")[2] for c in group["copies"])


def picture(seed, size=(64, 48)):
    """A photograph of a kind: blobs of colours, so that no two of them look alike."""
    random = np.random.RandomState(seed)
    return Image.fromarray(random.randint(0, 256, (4, 5, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def collection(run, tmp_path):
    """An index of nine pictures, of copies of some in all ways, and of pictures of one colour."""
    folder = tmp_path / "collection"
    for name in ("old", "new"):
        (folder / name).mkdir(parents=True)
    for i in range(9):
        picture(i).save(folder / "old" / f"{i}.png")
    shutil.copy(folder / "old" / "1.png", folder / "new" / "1 copy.png")
    picture(2).save(folder / "new" / "2.bmp")
    picture(3, (200, 150)).save(folder / "new" / "3 large.jpg", quality=95)
    marked = picture(4)
    ImageDraw.Draw(marked).text((2, 2), "x", fill="white")
    marked.save(folder / "new" / "4 marked.png")
    shutil.copy(folder / "new" / "4 marked.png", folder / "new" / "4 marked again.png")
    Image.new("RGB", (64, 48), "red").save(folder / "new" / "red.png")
    Image.new("RGB", (64, 48), "blue").save(folder / "new" / "blue.png")
    for gray in (100, 101):  # without contrast
        Image.new("RGB", (64, 48), (gray,) * 3).save(folder / "new" / f"{gray}.png")
    indexes.build(run, folder, tmp_path / "index")
    return tmp_path / "index", folder


def test_kinds_are_kept_apart_and_no_pair_is_listed_twice(collection):
    path, _ = collection
    groups = found(path, "--others=50")
    assert sorted((duplicates.KINDS.index(g["kind"]), names(g)) for g in groups) == [
        (0, ["1 copy.png", "1.png"]),
        (0, ["4 marked again.png", "4 marked.png"]),
        (1, ["2.bmp", "2.png"]),
        (2, ["3 large.jpg", "3.png"]),
        (2, ["4 marked.png", "4.png"]),
    ]
    kinds = [duplicates.KINDS.index(g["kind"]) for g in groups]
    assert kinds == sorted(kinds) and groups[3]["likeness"] >= groups[4]["likeness"]
    assert all(0.97 <= g["likeness"] <= 1 for g in groups)
    for kind, count in (("bytes", 2), ("pixels", 3)):
        assert found(path, "--others=50", f"--kind={kind}") == groups[:count]


def test_the_largest_then_the_oldest_is_kept(collection):
    path, folder = collection
    groups = {tuple(names(g)): g for g in found(path, "--others=50")}
    for group in groups.values():
        assert [c["keep"] for c in group["copies"]] == [True] + [False] * (len(group["copies"]) - 1)
        sizes = [c["size"] for c in group["copies"]]
        assert sizes[0] == max(sizes)
    same = groups["1 copy.png", "1.png"]["copies"]
    assert same[0]["modified"] < same[1]["modified"] and same[0]["path"] == str(folder / "old" / "1.png")


def test_references_are_kept_and_not_compared_with_each_other(collection):
    path, folder = collection
    shutil.copy(folder / "old" / "5.png", folder / "old" / "5 again.png")
    indexes.update(path)
    assert ["5 again.png", "5.png"] in [names(g) for g in found(path)]
    groups = found(path, "--others=50", "--reference", str(folder / "old"))
    assert ["5 again.png", "5.png"] not in [names(g) for g in groups]
    for group in groups:
        for copy in group["copies"]:
            assert copy["reference"] == ("/old/" in copy["path"])
        if any(copy["reference"] for copy in group["copies"]):
            assert all(copy["keep"] == copy["reference"] for copy in group["copies"])
    assert any(c["reference"] for g in groups for c in g["copies"])
    small.assert_refused(small.main("duplicates", f"--index={path}", "--reference", "nowhere"), "nowhere not found")


def test_verdicts_are_remembered_also_when_files_move(collection):
    path, folder = collection
    flags = ["--others=50"]
    before = found(path, *flags)
    small.main("duplicates", f"--index={path}", "--not_copies", str(folder / "old" / "3.png"), "9999")
    pair = [str(folder / "old" / "3.png"), str(folder / "new" / "3 large.jpg")]
    done = small.main("duplicates", f"--index={path}", "--not_copies", *pair)
    assert done.returncode == 0 and "remembered 1 pairs" in done.stdout, done.stderr
    assert "remembered 0 pairs" in small.main("duplicates", f"--index={path}", "--not_copies", *pair).stdout
    (folder / "old" / "3.png").rename(folder / "new" / "three.png")
    indexes.update(path)
    after = found(path, *flags)
    assert after == [g for g in before if "3.png" not in names(g)] and len(after) == len(before) - 1
    pair = [str(folder / "old" / "2.png"), str(folder / "new" / "2.bmp")]
    small.main("duplicates", f"--index={path}", "--not_copies", *pair)
    assert "2.png" not in [n for g in found(path, *flags) for n in names(g)]
    same = [str(folder / "old" / "1.png"), str(folder / "new" / "1 copy.png")]
    small.assert_refused(
        small.main("duplicates", f"--index={path}", "--not_copies", *same), "two images with different bytes"
    )
    (path / "not_copies.jsonl").write_text("{}\n")
    small.assert_refused(small.main("duplicates", f"--index={path}"), "is not a file of verdicts")


def test_results_as_csv_text_and_picture(collection, tmp_path):
    path, _ = collection
    groups = found(path)
    done = small.main("duplicates", f"--index={path}", "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [r["path"] for r in rows] == [c["path"] for g in groups for c in g["copies"]]
    assert [r["keep"] == "True" for r in rows] == [c["keep"] for g in groups for c in g["copies"]]
    done = small.main("duplicates", f"--index={path}", f"--gallery={tmp_path / 'x.png'}")
    assert done.stdout.count("keep\t") == len(groups) and "# same bytes" in done.stdout
    with Image.open(tmp_path / "x.png") as gallery:
        assert gallery.size[1] > 100 * len(groups)


def test_images_that_are_gone_can_only_have_the_same_bytes(collection, logs):
    path, folder = collection
    whole = found(path, "--others=50")
    shutil.rmtree(folder)
    assert found(path, "--others=50") == [g for g in whole if g["kind"] == "same bytes"]


def linked(likeness, threshold, order, verdicts=()):
    """Groups of `duplicates._linked` of images whose pairs have given likenesses, by their names."""
    count = len(likeness)
    index = synthetic.index(count=count)
    index = index.replace(rows=np.asarray(order))
    values, vectors = np.linalg.eigh(likeness + np.eye(count) * 1e-9)
    pictures = vectors * np.sqrt(np.maximum(values, 0))
    real = duplicates.small_picture
    duplicates.small_picture = lambda index, i: pictures[index.rows[i]]
    try:
        found = duplicates._linked(index, [list(range(count))], [(0, 0)], threshold, verdicts, np.zeros(count, bool))
    finally:
        duplicates.small_picture = real
    return sorted((round(v, 4), sorted(int(index.rows[i]) for i in g)) for v, g in found)


def test_groups_do_not_chain_and_do_not_depend_on_the_order():
    angles = np.linspace(0, np.pi, 13)  # each is like its neighbours, and the first is unlike the last
    likeness = np.cos(angles[:, None] - angles[None])
    threshold = np.cos(2.1 * (angles[1] - angles[0]))
    groups = linked(likeness, threshold, range(13))
    assert groups and all(len(g) <= 3 for _, g in groups)
    for value, group in groups:
        weakest = likeness[np.ix_(group, group)].min()
        assert value == pytest.approx(weakest, abs=1e-3) and weakest >= threshold - 1e-6
    # Complete: no two groups could be joined.
    alone = [[i] for i in range(13) if not any(i in g for _, g in groups)]
    whole = [g for _, g in groups] + alone
    for a in range(len(whole)):
        for b in range(a):
            assert likeness[np.ix_(whole[a], whole[b])].min() < threshold
    for seed in range(5):
        assert linked(likeness, threshold, np.random.RandomState(seed).permutation(13)) == groups


@pytest.mark.parametrize("score", ["l2", "ip", "cosine"])
def test_close_codes_are_the_nearest_of_each(score, monkeypatch):
    monkeypatch.setattr(closeness, "BLOCK", 50)
    index = synthetic.index(score, count=300)
    codes = closeness.different_codes(index)
    assert sorted(i for items in codes.items for i in items.tolist()) == list(range(300)) and len(codes.codes) < 300
    decoded = index.encoder.codebooks[np.arange(4), codes.codes].reshape(len(codes.codes), -1).astype(np.float64)
    if score == "l2":
        truth = -((decoded[:, None] - decoded[None]) ** 2).sum(-1)
    else:
        units = decoded / np.linalg.norm(decoded, axis=1, keepdims=True)
        truth = units @ units.T
    by_code = [items.tolist() for items in codes.items]
    by_code[3], by_code[8] = [], []  # left out
    used = np.array([bool(items) for items in by_code])
    np.fill_diagonal(truth, -np.inf)
    truth[:, ~used] = truth[~used] = -np.inf
    for reference in (np.zeros(300, bool), np.arange(300) % 2 == 0):
        pairs = list(closeness.close_codes(codes, by_code, 7, reference))
        assert len(pairs) == len(set(map(frozenset, pairs)))
        assert {a for a, b in pairs if a == b} == {c for c, items in enumerate(by_code) if len(items) > 1}
        only = np.array([not items or reference[items].all() for items in by_code])
        expected = {tuple(sorted((a, b))) for a in np.flatnonzero(~only) for b in np.argsort(-truth[a])[:7]}
        assert {tuple(sorted(p)) for p in pairs if p[0] != p[1]} == expected


def test_embeddings_have_no_copies():
    index = synthetic.index()
    with pytest.raises(indexes.IndexFileError, match="holds embeddings"):
        duplicates.find(index.replace(roots=("",) * len(index.roots)))


def test_the_flags_have_the_defaults_of_the_function():
    arguments = cli.make_parser().parse_args(["duplicates", "--index=x"])
    assert (arguments.min_likeness, arguments.others) == (duplicates.LIKENESS, duplicates.OTHERS)
