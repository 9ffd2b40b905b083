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
    """For each anchor the set of clipped negatives: most similar first, lower index first among equals."""
    n = len(similarity)
    clipped = []
    for i in range(n):
        negatives = [j for j in range(n) if j not in (i, (i + n // 2) % n)]
        clipped.append(set(sorted(negatives, key=lambda j: (-similarity[i, j], j))[:clip]))
    return clipped


def nt_xent(a, b, temperature, clip):
    x = unit(np.concatenate([a, b]).astype(np.float64))
    n, s = len(x), x @ x.T
    gone = clipped_rows(s, clip)
    losses = []
    for i in range(n):
        p = (i + n // 2) % n
        kept = [s[i, j] / temperature for j in range(n) if j != i and j != p and j not in gone[i]]
        logits = np.array([s[i, p] / temperature, *kept])
        losses.append(np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[0])
    return np.mean(losses)


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
