"""Independent float64 NumPy versions of the maths: loops, no tricks, nothing imported from tcq."""

from itertools import permutations

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def soft_assign(x, codebooks, scale, metric):
    x, codebooks = np.asarray(x, np.float64), np.asarray(codebooks, np.float64)
    M, K, d = codebooks.shape
    out = np.zeros((len(x), M, K))
    for n in range(len(x)):
        for m in range(M):
            sub, words = x[n, m * d : (m + 1) * d], codebooks[m]
            if metric == "ip":
                logits = scale * unit(words) @ unit(sub)
            else:
                logits = np.array([-scale * np.sum((sub - w) ** 2) for w in words])
            e = np.exp(logits - logits.max())
            out[n, m] = e / e.sum()
    return out


def reconstruct(weights, codebooks):
    return np.stack([np.concatenate([w[m] @ codebooks[m] for m in range(len(codebooks))]) for w in np.float64(weights)])


def clipped_rows(similarity, clip):
    """For each of the 2B anchors the set of clipped negatives: most similar first, lower column first among equals.

    Columns beyond the 2B are those of a queue.
    """
    n, columns = similarity.shape
    clipped = []
    for i in range(n):
        negatives = [j for j in range(columns) if j not in (i, (i + n // 2) % n)]
        clipped.append(set(sorted(negatives, key=lambda j: (-similarity[i, j], j))[:clip]))
    return clipped


def clipped_pairs(similarity, clip):
    """As `clipped_rows`, but the clip * 2B most similar of all pairs; ties by anchor, then by column."""
    n, columns = similarity.shape
    pairs = [(i, j) for i in range(n) for j in range(columns) if j not in (i, (i + n // 2) % n)]
    first = sorted(pairs, key=lambda pair: -similarity[pair])[: int(clip * n + 1e-6)]
    clipped = [set() for _ in range(n)]
    for i, j in first:
        clipped[i].add(j)
    return clipped


def nt_xent(a, b, temperature, clip, debias=0.0, queue=None, scope="anchor"):
    return nt_xent_and_gradients(a, b, temperature, clip, debias, queue, scope)[0]


def nt_xent_and_gradients(a, b, temperature, clip, debias=0.0, queue=None, scope="anchor"):
    """The loss, and its gradients by a, b and queue: clipped NT-Xent, or after Chuang et al. 2020 with `debias`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    queue = np.zeros((0, a.shape[1])) if queue is None else np.asarray(queue, np.float64)
    everything = np.concatenate([a, b, queue])
    n, u = 2 * len(a), unit(everything)
    s = u[:n] @ u.T
    clipped = (clipped_rows if scope == "anchor" else clipped_pairs)(s, clip)
    total, by_s = 0.0, np.zeros(s.shape)
    for i in range(n):
        p = (i + n // 2) % n
        remaining = [j for j in range(len(u)) if j != i and j != p and j not in clipped[i]]
        top = max(s[i, [p, *remaining]])
        powers, positive = np.exp((s[i, remaining] - top) / temperature), np.exp((s[i, p] - top) / temperature)
        negative, by_power, by_positive = powers.sum(), 1.0, 0.0
        if debias:
            floor = len(remaining) * np.exp((-1 - top) / temperature)
            negative = (negative - debias * len(remaining) * positive) / (1 - debias)
            by_power, by_positive = 1 / (1 - debias), -debias * len(remaining) / (1 - debias)
            if negative < floor:
                negative, by_power, by_positive = floor, 0.0, 0.0
        whole = positive + negative
        total += -np.log(positive / whole)
        by_s[i, remaining] = by_power * powers / whole / temperature
        by_s[i, p] = (positive * (1 + by_positive) / whole - 1) / temperature
    by_u = by_s.T @ u[:n]
    by_u[:n] += by_s @ u
    by_x = (by_u - np.sum(by_u * u, axis=1, keepdims=True) * u) / np.linalg.norm(everything, axis=1, keepdims=True)
    return total / n, tuple(np.split(by_x / n, [len(a), n]))


def contrastive_loss(xa, xb, za, zb, pairing, temperature, clip):
    problems = {"cross": [(xa, zb), (xb, za)], "quantized": [(za, zb)], "float": [(xa, xb)]}[pairing]
    return np.mean([nt_xent(a, b, temperature, clip) for a, b in problems])


def one_ap(relevance, k, denominator="hits"):
    """AP@k of a ranked list of booleans, the whole database."""
    hits, total = 0, 0.0
    for rank, relevant in enumerate(relevance[:k], 1):
        if relevant:
            hits += 1
            total += hits / rank
    under = {"hits": hits, "min": min(k, sum(relevance)), "all": sum(relevance)}[denominator]
    return total / under if under else 0.0


def orders(scores):
    """Every order that sorts the scores, best first: brute force."""
    n = len(scores)
    return [o for o in permutations(range(n)) if all(scores[o[i]] >= scores[o[i + 1]] for i in range(n - 1))]


def all_aps(scores, relevance, k, denominator="hits"):
    """AP@k in every order that sorts the scores."""
    return [one_ap([relevance[i] for i in o], k, denominator) for o in orders(scores)]
