"""The published protocols as functions of labels.

They give the indices of query, database, training and validation images.

The entries of `PROTOCOLS` describe them as data; docs/protocols.md lists them with their sources. Indices refer to the
images in official order: for CIFAR-10 the 50,000 training images, then the 10,000 test images; for MIRFLICKR-25K im1 to
im25000; for NUS-WIDE the rows of AllLabels. Arrays keep the order in which the reference draws them, because ties by
index depend on it.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, Int64


class ProtocolError(ValueError):
    """The images do not fit the protocol; the message says what it needs."""


class Split(NamedTuple):
    """Indices of images in official order.

    Validation images are carved from the training images.
    """

    query: Int64[np.ndarray, " Q"]
    database: Int64[np.ndarray, " N"]
    train: Int64[np.ndarray, " T"]
    validation: Int64[np.ndarray, " V"]


class Draw(NamedTuple):
    """The draw of a protocol, before validation images are carved from the training images."""

    query: np.ndarray
    database: np.ndarray
    train: np.ndarray
    shuffled: np.ndarray  # the training images in the order in which they become validation images


class Protocol(NamedTuple):
    """A named protocol."""

    draw: Callable[[np.ndarray, np.random.RandomState, float], Draw]
    num_images: int | None  # None: any
    num_labels: int | None  # columns of multi-hot labels; 0: class numbers; None: either
    sizes: tuple[int, int, int] | None  # queries, database, training with validation images; None: by share
    k: int | None  # cut-off of mAP@k; None: the whole database
    seed: int  # of the reference, or ours if the reference has none
    sha256: str | None  # of the draw with this seed (see `digest`); None if it depends on the labels
    source: str

    @property
    def relevance(self) -> str:
        """When a database image is relevant to a query."""
        rules = {None: "same class, or at least one shared label", 0: "same class"}
        return rules.get(self.num_labels, f"at least one of {self.num_labels} labels shared")


def split(
    name: str,
    labels: Int[ArrayLike, " N"] | Bool[ArrayLike, "N L"],
    *,
    seed: int | None = None,
    query: float = 0.1,
    validation: float = 0.1,
) -> Split:
    """The named split of N images.

    Args:
      name: a key of `PROTOCOLS`.
      labels: (N,) class numbers or (N, L) multi-hot, in official order. Protocols that draw by class use them; all
        protocols check them against the published counts.
      seed: of the draw; None is that of the protocol, which gives a published split exactly.
      query: share of the images that become queries; only for "folder".
      validation: share of the training images of the protocol that is held out for validation. They stay in the
        database if the protocol has its training images there.

    Raises:
      ProtocolError: the name is unknown, a share is not in [0, 1), or the labels are not those of the protocol's
        images.
    """
    if name not in PROTOCOLS:
        raise ProtocolError(f"protocol {name!r} is unknown: use one of {', '.join(PROTOCOLS)}")
    if not (0 <= query < 1 and 0 <= validation < 1):
        raise ProtocolError(f"shares must be in [0, 1): query {query}, validation {validation}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ProtocolError(f"seed {seed} must be from 0 to {2**32 - 1}")
    protocol, labels = PROTOCOLS[name], np.asarray(labels)
    if protocol.num_images not in (None, len(labels)):
        raise ProtocolError(
            f"protocol {name} needs {protocol.num_images:,} images in official order, got {len(labels):,}: "
            f"check data.source"
        )
    columns = protocol.num_labels
    if columns is not None and (labels.ndim != (2 if columns else 1) or (columns and labels.shape[1] < columns)):
        raise ProtocolError(f"protocol {name} needs labels for {protocol.relevance!r}, got an array {labels.shape}")
    # The legacy generator, as in the references: its stream is frozen, the same in every version of NumPy.
    random = np.random.RandomState(protocol.seed if seed is None else seed)
    queries, database, train, shuffled = protocol.draw(labels, random, query)
    none = np.zeros(0, np.int64)
    if seed is None and protocol.sha256 and digest(Split(queries, database, train, none)) != protocol.sha256:
        raise ProtocolError(
            f"NumPy {np.__version__} does not draw the recorded split of protocol {name}: install the NumPy "
            f"of requirements.txt"
        )
    held_out = np.isin(train, shuffled[: round(validation * len(train))])
    parts = (queries, database, train[~held_out], train[held_out])
    return Split(*(np.asarray(part, np.int64) for part in parts))


def cut_off(name: str, k: int, num_database: int) -> int:
    """The k of mAP@k, at most the whole database.

    It is k itself, that of the protocol for -1, and the whole database for 0.
    """
    chosen = PROTOCOLS[name].k if k < 0 else k
    return min(chosen or num_database, num_database)


def digest(parts: Split) -> str:
    """SHA-256 of a split: for each array its length and its numbers, as little-endian int64."""
    sha = hashlib.sha256()
    for array in parts:
        sha.update(len(array).to_bytes(8, "little") + array.astype("<i8").tobytes())
    return sha.hexdigest()


def _folder(labels: np.ndarray, random: np.random.RandomState, query: float) -> Draw:
    order = random.permutation(len(labels))
    cut = round(query * len(labels))
    rest = np.sort(order[cut:])
    return Draw(np.sort(order[:cut]), rest, rest, order[cut:])


def _cifar10_spq(labels: np.ndarray, random: np.random.RandomState, _: float) -> Draw:
    _check_cifar10(labels)
    train = np.arange(50_000)
    return Draw(np.arange(50_000, 60_000), train, train, random.permutation(train))


def _cifar10_by_class(queries: int, train: int | None, *, in_database: bool) -> Callable[..., Draw]:
    """For each class its images in random order: queries, then training images, then the rest."""

    def draw(labels: np.ndarray, random: np.random.RandomState, _: float) -> Draw:
        _check_cifar10(labels)
        orders = [np.flatnonzero(labels == c)[random.permutation(6000)] for c in range(10)]
        stop = None if train is None else queries + train
        chosen = np.concatenate([order[queries:stop] for order in orders])
        rest = np.concatenate([order[queries if in_database else stop :] for order in orders])
        return Draw(np.concatenate([order[:queries] for order in orders]), rest, chosen, random.permutation(chosen))

    return draw


def _flickr25k_mecoq(labels: np.ndarray, random: np.random.RandomState, _: float) -> Draw:
    order = random.permutation(25_000)
    return Draw(order[:2000], order[2000:], order[2000:7000], random.permutation(order[2000:7000]))


def _flickr25k_deephash(labels: np.ndarray, random: np.random.RandomState, _: float) -> Draw:
    order = random.permutation(25_000)
    return Draw(order[4000:5000], order[5000:], order[:4000], random.permutation(order[:4000]))


def _nus_wide_21(labels: np.ndarray, random: np.random.RandomState, _: float) -> Draw:
    """In random order each image goes to its first concept that is not full.

    A concept is full with 500 training images, and then 100 queries.
    """
    if labels.shape[1] != 21 or not labels.any(axis=1).all():
        raise ProtocolError(
            f"protocol nus_wide_21 needs images with at least one of 21 concepts, got {labels.shape[1]} concepts and "
            f"{np.count_nonzero(~labels.any(axis=1)):,} images without any"
        )
    order = random.permutation(len(labels))
    train_room, query_room = [500] * 21, [100] * 21
    queries, train = [], []
    for image in order:
        for concept in np.flatnonzero(labels[image]):
            if train_room[concept]:
                train_room[concept] -= 1
                train.append(image)
                break
            if query_room[concept]:
                query_room[concept] -= 1
                queries.append(image)
                break
        if not any(train_room) and not any(query_room):
            break
    if any(train_room) or any(query_room):
        raise ProtocolError(
            f"protocol nus_wide_21 needs 600 images of each concept; {sum(train_room)} training images and "
            f"{sum(query_room)} queries are missing"
        )
    chosen = np.array(train)
    return Draw(np.array(queries), order[~np.isin(order, queries)], chosen, random.permutation(chosen))


def _check_cifar10(labels: np.ndarray) -> None:
    for part, count in ((labels[:50_000], 5000), (labels[50_000:], 1000)):
        counts = np.unique(part, return_counts=True)
        if not (np.array_equal(counts[0], np.arange(10)) and (counts[1] == count).all()):
            raise ProtocolError(
                f"these are not the labels of CIFAR-10 in official order, 50,000 training and then 10,000 test images: "
                f"{len(part):,} of them must have {count:,} images of each class from 0 to 9, got "
                f"{dict(zip(*(c.tolist() for c in counts), strict=True))}"
            )


# Sizes, cut-offs and draws are those of the sources. Where a source publishes lists, or no seed, we
# draw by its rule with a seed of our own.
PROTOCOLS = {
    "folder": Protocol(_folder, None, None, None, None, 0, None, "ours: a seeded share of any images"),
    "cifar10_spq": Protocol(
        _cifar10_spq,
        60_000,
        0,
        (10_000, 50_000, 50_000),
        1000,
        0,
        "ed09c91c3d293704499265dcd6d0167a7975da960e61a8467b44af5b64721713",
        "SPQ (Jang & Cho 2021), released code: official test images against official training images",
    ),
    "cifar10_I": Protocol(
        _cifar10_by_class(1000, None, in_database=True),
        60_000,
        0,
        (10_000, 50_000, 50_000),
        1000,
        2021,
        None,
        "MeCoQ (Wang et al. 2022), released code, CIFAR-10 (I): 1,000 queries of each class of 60,000, its seed",
    ),
    "cifar10_II": Protocol(
        _cifar10_by_class(1000, 500, in_database=True),
        60_000,
        0,
        (10_000, 50_000, 5000),
        1000,
        2021,
        None,
        "MeCoQ, released code, CIFAR-10 (II): as (I), trained on 500 database images of each class, its seed",
    ),
    "cifar10_54000": Protocol(
        _cifar10_by_class(100, 500, in_database=False),
        60_000,
        0,
        (1000, 54_000, 5000),
        None,
        0,
        None,
        "DeepHash-pytorch, README, cifar10: 100 queries and 500 training images of each class, neither in the "
        "database; the reference has no seed, the draw is ours",
    ),
    "flickr25k_mecoq": Protocol(
        _flickr25k_mecoq,
        25_000,
        24,
        (2000, 23_000, 5000),
        5000,
        2021,
        "d85666c6e661edb3bd59b0c2823b049e2b319361abee5a084dfacb1d8788552e",
        "MeCoQ, released code, Flickr25K: 24 potential labels, its seed",
    ),
    "flickr25k_deephash": Protocol(
        _flickr25k_deephash,
        25_000,
        38,
        (1000, 20_000, 4000),
        None,
        0,
        "0afc581f428722867e4030f96011eed3d83985f857a9753bfe68801be116c3a4",
        "DeepHash-pytorch, data/mirflickr/code.py: 24 potential and 14 stricter labels, training images not in the "
        "database; the reference has no seed, the draw is ours by its rule",
    ),
    "nus_wide_21": Protocol(
        _nus_wide_21,
        195_834,
        21,
        (2100, 193_734, 10_500),
        5000,
        0,
        None,
        "DeepHash-pytorch, data/nuswide_21/code.py: images with any of the 21 most frequent concepts, 100 queries and "
        "500 training images of each; the reference publishes lists without a seed, the draw is ours by its rule",
    ),
}
