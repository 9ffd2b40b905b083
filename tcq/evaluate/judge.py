"""How many pairs of a collection are of one kind, by answers to "the same kind of thing?".

The chance that a pair is of one kind falls with its rank u, the share of pairs that are more similar, as the curve
p(u) = floor + (1 - floor) / (1 + (u / half)^slope): our choice. A grid over these three holds its posterior. The next
pair is the one whose answer is expected to narrow the share of pairs of one kind, the integral of p, most.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tcq import embed, encode, plots
from tcq import workdir as workdirs
from tcq.data import protocols, splits
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.evaluate import clipped
from tcq.evaluate.report import EvaluateError
from tcq.runtime import storage

ANSWERS, PICTURE = "judgements.jsonl", "judge.png"
IMAGES = 1024  # training images whose pairs are ranked
# Our choices, by validation images of three sets (docs/clipping.md):
SKEW = 0.9  # standard deviation over mean of the number of an image's nearest pairs, from which scope "batch" fits
CAUTION = 0.3  # quantile of the posterior of the share that is clipped: too much costs more than too little
BATCH_PART = 0.8  # of the share of one kind that is clipped with scope "batch"
TEMPERATURE = 0.2
INTERVAL = (0.05, 0.95)
RANKS = np.geomspace(1e-4, 1.0, 41)  # of the pairs that a question may be about
_CURVES = np.meshgrid(np.geomspace(1e-4, 1.0, 41), np.geomspace(0.4, 6.0, 16), [0.0, 0.01, 0.02, 0.05, 0.1, 0.15])
_HALF, _SLOPE, _FLOOR = (x.ravel() for x in _CURVES)
_EDGES = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 240)])  # of the intervals that the integral sums over

Ask = Callable[[int, int], bool | None]  # whether two images are of one kind; None: no more questions


class Judgement(NamedTuple):
    """What some answers say."""

    share: float  # of all pairs that are of one kind
    low: float
    high: float  # the share is in between with 90 %
    scope: str  # the `loss.clip_scope` that fits
    clip: float  # the `loss.clip` that fits
    precision: float  # of the clipped pairs, if as many are clipped in the whole batch
    answers: int

    @property
    def overrides(self) -> list[str]:
        """The overrides of a config that follow this judgement."""
        values = {"clip": f"{self.clip:.3g}", "clip_scope": self.scope, "temperature": TEMPERATURE}
        return [f"--config.loss.{key}={value}" for key, value in values.items()]


def chance(u: Any) -> Float[np.ndarray, "G ..."]:
    """p(u) for every curve of the grid: halfway down at the rank `half`, steeper with `slope`."""
    u = np.asarray(u, np.float64)
    half, slope, floor = (x.reshape(-1, *[1] * u.ndim) for x in (_HALF, _SLOPE, _FLOOR))
    logits = slope * (np.log(np.maximum(u, 1e-9))[None] - np.log(half))
    return floor + (1 - floor) / (1 + np.exp(np.clip(logits, -50, 50)))


def posterior(answers: list[tuple[float, bool]]) -> Float[np.ndarray, " G"]:
    """The probability of every curve after answers (rank, same kind); before, all are equal."""
    log = np.zeros(len(_HALF))
    for u, same in answers:
        p = chance(u)
        log += np.log(np.maximum(p if same else 1 - p, 1e-12))
    weights = np.exp(log - log.max())
    return weights / weights.sum()


_MIDDLES, _WIDTHS = (_EDGES[1:] + _EDGES[:-1]) / 2, np.diff(_EDGES)
_SHARES = chance(_MIDDLES) @ _WIDTHS  # of every curve
_AT_RANKS = chance(RANKS)


def next_rank(weights: Float[np.ndarray, " G"]) -> float:
    """The rank whose answer leaves the smallest expected variance of the log of the share."""
    value, p = np.log(_SHARES), _AT_RANKS
    expected = np.zeros(len(RANKS))
    for likelihood in (p, 1 - p):
        joint = weights[:, None] * likelihood
        total = joint.sum(axis=0)
        mean = value @ joint / total
        expected += total * ((value**2 @ joint) / total - mean**2)
    return float(RANKS[np.argmin(expected)])


def judgement(answers: list[tuple[float, bool]], ranks: Float[np.ndarray, "B B"]) -> Judgement:
    """What answers (rank, same kind) say of a collection.

    `ranks` are of sampled pairs, with 1 on the diagonal.
    """
    weights = posterior(answers)
    order = np.argsort(_SHARES)
    quantiles = (INTERVAL[0], CAUTION, 0.5, INTERVAL[1])
    low, careful, share, high = np.interp(quantiles, np.cumsum(weights[order]), _SHARES[order]).tolist()
    scope = "batch" if skew(ranks, share / 2) > SKEW else "anchor"  # half of it, in case the share is too high
    clip = BATCH_PART * careful if scope == "batch" else careful
    inside = np.clip(clip - _EDGES[:-1], 0, _WIDTHS)
    precision = float(weights @ chance(_MIDDLES) @ inside / clip)
    return Judgement(share, low, high, scope, clip, precision, len(answers))


def skew(ranks: Float[np.ndarray, "B B"], share: float) -> float:
    """How unevenly the most similar `share` of all pairs is spread over the images.

    It is the deviation of the counts over their mean.
    """
    near = ranks <= share
    np.fill_diagonal(near, False)
    counts = near.sum(axis=1)
    return float(counts.std() / max(counts.mean(), 1e-9))


def text(j: Judgement) -> str:
    """A judgement in words, with the overrides that follow it."""
    return (
        f"{j.answers} answers: {j.share:.2%} of the pairs are of one kind ({j.low:.2%} to {j.high:.2%} with 90 %), "
        f"about {1 / j.share:,.0f} kinds\n"
        f"if {j.clip:.2%} are clipped, {j.precision:.0%} of the clipped pairs are of one kind\n"
        f"{' '.join(j.overrides)}"
    )


def run(workdir: str | Path, *, count: int, labels: bool, read: Callable[[str], str] = input) -> Judgement:
    """Judges the training images of a run by its newest checkpoint.

    The answers are by labels, or by questions on the terminal. `read` shows a question and returns the answer; by then
    judge.png of the workdir shows the pair.
    Raises as `prepare`.
    """
    source, judge_by = prepare(workdir, count=count, labels=labels)
    return judge_by(by_labels(source) if labels else by_terminal(Path(workdir), source, read))


def prepare(workdir: str | Path, *, count: int, labels: bool) -> tuple[Source, Callable[[Ask], Judgement]]:
    """The source of a run, and `judge` for its training images and newest checkpoint.

    Raises EvaluateError if there is nothing to show, no labels, or the workdir is in a bucket, and as `encode.load` and
    `embed.open_source`.
    """
    if storage.is_url(workdir):
        raise EvaluateError(f"{workdir} is in a bucket, and answers are kept in the workdir: copy it to a local folder")
    encoder = encode.load(workdir, which="latest")
    source = embed.open_source(encoder.config, partial(workdirs.in_order, Path(workdir)))
    split = splits.of_source(source, encoder.config.data)
    if labels and source.labels is None:
        raise EvaluateError(f"{encoder.config.data.source} has no labels: leave out --labels, and answer yourself")
    if not labels and source.images.ndim != 4 and source.pictures is None:
        raise EvaluateError(f"{encoder.config.data.source} has no images to show: use --labels, if there are some")
    return source, partial(judge, Path(workdir), encoder, source, split, count=count)


def judge(
    folder: Path,
    encoder: encode.Encoder,
    source: Source,
    split: protocols.Split,
    ask: Ask,
    *,
    count: int,
    seed: int = 0,
) -> Judgement:
    """Asks until there are `count` answers, and returns what follows.

    judgements.jsonl of the folder stores the answers. Answers of an earlier call count. `ask` gets the positions of two
    images in the source. `seed` draws the images whose pairs are ranked, and the questions.
    """
    chosen = np.sort(np.random.RandomState(seed).permutation(split.train)[:IMAGES])
    ranks = pair_ranks(clipped.similarities(encoder, encode.encode(encoder, take(source.images, chosen))))
    first, second = np.triu_indices(len(chosen), 1)
    open_pairs = np.argsort(ranks[first, second], kind="stable")  # the most similar first
    file, random = folder / ANSWERS, np.random.RandomState(seed + 1)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    position = {source.names[i]: n for n, i in enumerate(chosen)}
    pairs = [(position.get(a["first"], -1), position.get(a["second"], -1)) for a in known]
    given = {pair: bool(a["same"]) for pair, a in zip(pairs, known, strict=True) if min(pair) >= 0}
    answers = [(float(ranks[pair]), same) for pair, same in given.items()]  # by the model as it is now
    open_pairs = np.array([p for p in open_pairs if (first[p], second[p]) not in given], np.int64)
    with file.open("a") as out:
        while len(answers) < count and len(open_pairs):
            wanted = next_rank(posterior(answers)) * random.uniform(0.8, 1.25)
            place = min(int(wanted * len(open_pairs)), len(open_pairs) - 1)
            i, j = first[open_pairs[place]], second[open_pairs[place]]
            open_pairs = np.delete(open_pairs, place)
            same = ask(int(chosen[i]), int(chosen[j]))
            if same is None:
                break
            answers.append((float(ranks[i, j]), same))
            row = {"first": source.names[chosen[i]], "second": source.names[chosen[j]], "same": same}
            out.write(json.dumps(row) + "\n")
            out.flush()
    return judgement(answers, ranks)


def pair_ranks(similarity: Float[np.ndarray, "B B"]) -> Float[np.ndarray, "B B"]:
    """The share of pairs at least as similar as each pair, in (0, 1]; 1 on the diagonal."""
    both = np.maximum(similarity, similarity.T)
    first, second = np.triu_indices(len(both), 1)
    values = both[first, second]
    order = np.argsort(-values, kind="stable")
    shares = np.empty(len(values))
    shares[order] = (np.arange(len(values)) + 1) / len(values)
    ranks = np.ones(both.shape)
    ranks[first, second] = ranks[second, first] = shares
    return ranks


def by_labels(source: Source) -> Ask:
    """Answers by the labels of a source: equal classes, or a shared label."""
    labels = source.labels
    assert labels is not None
    if labels.ndim == 1:
        return lambda i, j: bool(labels[i] == labels[j])
    return lambda i, j: bool((labels[i] & labels[j]).any())


def by_terminal(folder: Path, source: Source, read: Callable[[str], str] = input) -> Ask:
    """Answers of a person, y, n or q, from the terminal; judge.png of a folder shows the pair."""
    images = source.images if source.pictures is None else source.pictures

    def ask(i: int, j: int) -> bool | None:
        plots.gallery(folder / PICTURE, [images[i]], [[images[j]]], title="the same kind of thing?", name="")
        while True:
            question = f"{folder / PICTURE}: {source.names[i]} and {source.names[j]}: same kind of thing? [y/n/q] "
            text = read(question).strip().lower()
            if text in ("y", "n", "q"):
                return None if text == "q" else text == "y"

    return ask
