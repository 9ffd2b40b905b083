"""The scoring of the released code of SPQ, MeCoQ and DeepHash-pytorch, rewritten from its description in NumPy loops.

All three share these rules: an item is relevant if it shares a label; AP is divided by the hits among the first k; a
query without a hit scores 0 and counts; ties are in the order of a sort (here a stable one).
"""

import numpy as np


def spq(queries, codebooks, codes, query_labels, database_labels, k):
    """Sums over codebooks the (not squared) distances of query subvector and codeword, ascending."""
    M, K, d = codebooks.shape
    total = 0.0
    for q, label in zip(queries, query_labels, strict=True):
        table = np.zeros((M, K))
        for m in range(M):
            for c in range(K):
                table[m, c] = np.sqrt(np.sum((q[m * d : (m + 1) * d] - codebooks[m, c]) ** 2))
        distance = np.zeros(len(codes))
        for m in range(M):
            distance += table[m, codes[:, m]]
        total += _ap((label @ database_labels.T > 0)[np.argsort(distance, kind="stable")][:k])
    return total / len(queries)


def mecoq(queries, codebooks, codes, query_labels, database_labels, k):
    """Sums over codebooks inner products of the raw query subvector and the codeword, descending."""
    M, _, d = codebooks.shape
    values = []
    for q, label in zip(queries, query_labels, strict=True):
        table = np.einsum("md,mkd->mk", q.reshape(M, d), codebooks)
        score = sum(table[m][codes[:, m]] for m in range(M))
        order = np.argsort(-score, kind="stable")[:k]
        values.append(_ap((label * database_labels[order]).sum(1) > 0))
    return np.mean(values)


def mecoq_curve(queries, codebooks, codes, query_labels, database_labels):
    """Mean precision and recall at every rank."""
    M, _, d = codebooks.shape
    precision, recall = [], []
    for q, label in zip(queries, query_labels, strict=True):
        table = np.einsum("md,mkd->mk", q.reshape(M, d), codebooks)
        score = sum(table[m][codes[:, m]] for m in range(M))
        hits = np.cumsum((database_labels @ label > 0)[np.argsort(-score, kind="stable")])
        precision.append(hits / np.arange(1, len(hits) + 1))
        recall.append(hits / max(hits[-1], 1))
    return np.mean(precision, 0), np.mean(recall, 0)


def deephash(query_signs, database_signs, query_labels, database_labels, k=-1):
    """Hamming distance of -1/1 codes; its "ALL", k = -1, slices [0:-1] and so leaves out the item ranked last."""
    total = 0.0
    for q, label in zip(query_signs, query_labels, strict=True):
        hamming = 0.5 * (database_signs.shape[1] - database_signs @ q)
        total += _ap((label @ database_labels.T > 0)[np.argsort(hamming, kind="stable")][0:k])
    return total / len(query_signs)


def _ap(relevant):
    places = np.flatnonzero(relevant) + 1.0
    return float(np.mean(np.arange(1, len(places) + 1) / places)) if len(places) else 0.0
