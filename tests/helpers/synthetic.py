"""An index of random codes, without images or a backbone."""

import hashlib

import numpy as np

from tcq import config as configs
from tcq import encode
from tcq.index import contents, items, store


def index(score="ip", *, squared=True, normalize="none", count=500, codebooks=4, codewords=16, step=1):
    """An index with own columns "year" and "who"; a third of the codes stand twice, so that scores tie."""
    random = np.random.RandomState(step)
    config = configs.load("digits")
    q, e = config.quantizer, config.eval
    q.num_codebooks, q.num_codewords, q.codeword_dim = codebooks, codewords, 4
    e.score, e.squared, e.normalize = score, squared, normalize
    words = random.randn(codebooks, codewords, 4).astype(np.float32)
    encoder = encode.Encoder(config, _Model("l2"), {"params": {"codebooks": words}}, step)
    dtype = np.uint8 if codewords <= 256 else np.uint16
    codes = random.randint(0, codewords, (count, codebooks)).astype(dtype)
    codes[count // 3 : 2 * (count // 3)] = codes[: count // 3]
    files = items.Files(
        [f"photo {i}.jpg" for i in range(count)], [_hash(i) for i in range(count)], range(count), [10**15] * count
    )
    table = items.rows(np.arange(count), 0, files, codes, codewords)
    digest = hashlib.sha256(words.tobytes()).hexdigest()
    own = {"id": np.arange(count), "year": 2000 + np.arange(count) % 20, "who": [f"é{i % 3}" for i in range(count)]}
    return contents.Index(
        config,
        lambda: encoder,
        table,
        np.arange(count),
        ("/photos",),
        count,
        step,
        {store.ENCODER: digest},
        columns=store.pa.table(own),
    )


class _Model:
    def __init__(self, metric):
        self.metric = metric


def _hash(i):
    return hashlib.blake2b(str(i).encode(), digest_size=20).digest()
