"""Questions about images, until it is known how many pairs are of one kind."""

import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tcq import embed, encode, plots
from tcq import workdir as workdirs
from tcq.data import protocols, splits
from tcq.data.rows import take
from tcq.data.source import Source
from tcq.evaluate import clipped, kinds
from tcq.evaluate.report import EvaluateError
from tcq.runtime import locks, signals, storage
from tcq.workdir import journal

ANSWERS, PICTURE = "judgements.jsonl", "judge.png"
LOCKED = "judging"  # a folder that is there and locked as long as there are questions
KEYS = ("first", "second", "same")  # of a line: the anchor, another image, whether it is of the same kind
IMAGES = 1024  # training images whose pairs are ranked

WIDE = 3.0  # times the lower end of an interval: the upper end, from which more answers are worth while

# Which of some images are of the kind of the first argument, an anchor; None: no more questions. The third argument is
# the number of answers so far.
Ask = Callable[[int, list[int], int], list[bool] | None]

logger = logging.getLogger(__name__)


def text(j: kinds.Judgement) -> str:
    """A judgement in words, with the overrides that follow it."""
    if not j.answers:
        return "no answers, so nothing is known: run the same command to begin"
    wide = (
        "" if j.high < WIDE * j.low else "that is a wide interval: the same command asks on, with --answers for more\n"
    )
    count = "1 answer" if j.answers == 1 else f"{j.answers} answers"
    return (
        f"{count}: {j.share:.2%} of the pairs are of one kind ({j.low:.2%} to {j.high:.2%} with 90 %), "
        f"about {1 / j.share:,.0f} kinds\n{wide}"
        f"if as many are clipped, {j.precision:.0%} of the clipped pairs are of one kind\n"
        f"train in a new workdir with: {' '.join(j.overrides)}"
    )


def run(workdir: str | Path, *, count: int, labels: bool, read: Callable[[str], str] = input) -> kinds.Judgement:
    """Judges the training images of a run by its newest checkpoint.

    The answers are by labels, which are not stored, or by questions on the terminal. `read` shows a question and
    returns the answer; by then judge.png of the workdir shows the images.
    Raises as `prepare`.
    """
    source, judge_by = prepare(workdir, count=count, labels=labels)
    return judge_by(by_labels(source) if labels else by_terminal(Path(workdir), source, count, read))


def prepare(workdir: str | Path, *, count: int, labels: bool) -> tuple[Source, Callable[[Ask], kinds.Judgement]]:
    """The source of a run, and `judge` for its training images and newest checkpoint.

    Raises EvaluateError if there is nothing to show, no labels, or the workdir is in a bucket, and as `encode.load` and
    `embed.open_source` and `workdir.unchanged`. The second raises LockedError if another process asks.
    """
    if storage.is_url(workdir):
        raise EvaluateError(f"{workdir} is in a bucket, and answers are kept in the workdir: copy it to a local folder")
    encoder = encode.load(workdir, which="latest")
    source = embed.open_source(encoder.config, partial(workdirs.unchanged, Path(workdir), encoder.config.data))
    split = splits.of_source(source, encoder.config.data)
    if labels and source.labels is None:
        raise EvaluateError(f"{encoder.config.data.source} has no labels: leave out --labels, and answer yourself")
    if not labels and source.images.ndim != 4 and source.pictures is None:
        raise EvaluateError(f"{encoder.config.data.source} has no images to show: use --labels, if there are some")
    return source, partial(judge, None if labels else Path(workdir), encoder, source, split, count=count)


def judge(
    folder: Path | None,
    encoder: encode.Encoder,
    source: Source,
    split: protocols.Split,
    ask: Ask,
    *,
    count: int,
    seed: int = 0,
) -> kinds.Judgement:
    """Asks until there are `count` answers, and returns what follows.

    judgements.jsonl of the folder, if there is one, stores the answers, a line for each pair. Answers of an earlier
    call count. `ask` gets positions in the source. `seed` draws the images whose pairs are ranked, and the questions.
    """
    chosen = np.sort(np.random.RandomState(seed).permutation(split.train)[:IMAGES])
    ranks = kinds.pair_ranks(clipped.similarities(encoder, encode.encode(encoder, take(source.images, chosen))))
    count_of = Counter(source.names)
    names = [f"{i} {source.names[i]}" if count_of[source.names[i]] > 1 else source.names[i] for i in chosen]
    is_open, random = ~np.eye(len(chosen), dtype=bool), np.random.RandomState(seed + 1)
    own_ranks = kinds.anchor_ranks(ranks)
    answers, by_anchor = list[Any](), list[Any]()

    def count_in(anchor: int, others: np.ndarray, same: np.ndarray) -> None:
        answers.append(kinds.likelihood(ranks[anchor, others], same))
        by_anchor.append(kinds.likelihood(own_ranks[anchor, others], same))
        _close(is_open, anchor, others)

    file = folder / ANSWERS if folder else None
    with _only(folder), file.open("a") if file else nullcontext(io.StringIO()) as out:
        for anchor, others, same in _stored(file, names) if file else ():  # ranks are those of the model as it is now
            count_in(anchor, others, same)
        if file and out.tell() and not file.read_bytes().endswith(b"\n"):
            out.write("\n")  # the last line of a killed process may be cut
        while len(answers) < count:
            drawn = kinds.draw(kinds.posterior(answers), ranks, is_open, random)
            if drawn is None:
                logger.info(f"all pairs of {len(chosen):,} images are known: no further questions")
                break
            anchor, others = drawn
            picked = ask(int(chosen[anchor]), chosen[others].tolist(), len(answers))
            if picked is None:
                break
            count_in(anchor, others, np.array(picked))
            rows = [(names[anchor], names[i], bool(same)) for i, same in zip(others, picked, strict=True)]
            out.write("".join(json.dumps(dict(zip(KEYS, row, strict=True))) + "\n" for row in rows))
            out.flush()
    return kinds.judgement(answers, by_anchor, ranks, encoder.config.data.batch_size)


def _only(folder: Path | None) -> AbstractContextManager[None]:
    """A context that one process at a time can enter for a folder; without one any."""
    return locks.lock(folder / LOCKED, wait=False) if folder else nullcontext()


def _close(is_open: Bool[np.ndarray, "B B"], anchor: int, others: Int[np.ndarray, " m"]) -> None:
    """Afterwards no image is an anchor twice, and no pair is shown twice."""
    is_open[anchor] = False
    is_open[others, anchor] = False


def _stored(file: Path, names: list[str]) -> list[tuple[int, Int[np.ndarray, " m"], Bool[np.ndarray, " m"]]]:
    """The answers of a file about some images: anchors, others, and which are of one kind.

    Images are positions in `names`.
    """
    position, by_anchor = {name: i for i, name in enumerate(names)}, defaultdict[int, dict[int, bool]](dict)
    for line in journal.read(file):
        try:
            first, second, same = (line[key] for key in KEYS)
            known = first in position and second in position
        except (KeyError, TypeError):
            raise EvaluateError(f"{file}: {line} is no answer: it needs {', '.join(KEYS)}. Remove this line") from None
        if type(same) is not bool or first == second:
            raise EvaluateError(f"{file}: {line} must have two names, and true or false. Remove this line")
        if known:
            by_anchor[position[first]][position[second]] = same
    return [(anchor, np.array([*given]), np.array([*given.values()])) for anchor, given in by_anchor.items()]


def by_labels(source: Source) -> Ask:
    """Answers by the labels of a source: equal classes, or a shared label."""
    labels = source.labels
    assert labels is not None
    if labels.ndim == 1:
        return lambda anchor, others, _: (labels[others] == labels[anchor]).tolist()
    return lambda anchor, others, _: (labels[others] & labels[anchor]).any(axis=1).tolist()


def by_terminal(folder: Path, source: Source, count: int, read: Callable[[str], str] = input) -> Ask:
    """Answers of a person from the terminal: numbers of images, 0 or q.

    There are to be `count`. judge.png of the folder shows the images.
    """
    images = source.images if source.pictures is None else source.pictures

    def ask(anchor: int, others: list[int], so_far: int) -> list[bool] | None:
        title = "which are the same kind of thing as the first?"
        numbers = [str(n) for n in range(1, len(others) + 1)]
        shown = [[images[i] for i in others]]
        plots.gallery(folder / PICTURE, [images[anchor]], shown, captions=[numbers], title=title, name="")
        form = f"numbers from 1 to {len(others)}, such as '1 4', 0 for none, q to stop"
        question = f"{so_far + 1} of {count}: open {folder / PICTURE}: {title} [{form}] "
        while True:
            try:
                with signals.waiting():
                    line = read(question)
            except UnicodeDecodeError as error:
                line = repr(error.object)
            except (EOFError, RuntimeError):  # the end of the input, or none at all
                return None
            given = line.replace(",", " ").lower().split()
            if given == ["q"]:
                return None
            if given == ["0"] or (given and set(given) <= set(numbers)):
                return [n in given for n in numbers]
            question = f"{line!r} is no answer: type {form} "

    return ask
