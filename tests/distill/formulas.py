"""Every distillation loss once more, in float64 NumPy, written from the papers' equations.

Slow, with loops where the equation has a sum: an oracle, and the function whose finite differences
the gradients are compared with.
"""

import itertools

import numpy as np


def log_softmax(z, T=1.0):
    z = np.asarray(z, np.float64) / T
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mean(values, weights=None):
    values = np.asarray(values, np.float64)
    return values.mean() if weights is None else (values * weights).sum() / np.sum(weights)


def response(s, t, *, temperature, divergence="forward_kl", beta=0.5, weights=None):
    def one(a, b):
        q, p = np.exp(log_softmax(a, temperature)), np.exp(log_softmax(b, temperature))
        m = beta * p + (1 - beta) * q
        return {
            "forward_kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "total_variation": lambda: 1 - np.minimum(p, q).sum(),
            "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        }[divergence]()

    return temperature**2 * mean([one(a, b) for a, b in zip(s, t, strict=True)], weights)


def hard(z, labels, weights=None):
    rows = [-log_softmax(row)[y] for row, y in zip(z, labels, strict=True)]
    return mean(rows, weights)


def feature(s, t, weights=None):
    return mean([((a - b) ** 2).mean() for a, b in zip(s, t, strict=True)], weights)


def attention(s, t, matching, weights=None):
    """Maps [B, N, T, S]."""

    def row(a, b):
        if matching == "mse":
            return ((a - b) ** 2).mean()
        if matching == "kl":
            return kl(b, a)
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    B, N, T = s.shape[:3]
    rows = np.array(
        [[[row(s[b, n, i], t[b, n, i]) for i in range(T)] for n in range(N)] for b in range(B)]
    )
    w = None if weights is None else np.broadcast_to(weights[:, None], rows.shape)
    return mean(rows, w)


def distance(a, b, kind):
    if kind == "euclidean":
        return np.linalg.norm(a - b)
    if kind == "manhattan":
        return np.abs(a - b).sum()
    return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def relation(s, t, kind, distance_weight=1.0, angle_weight=2.0):
    n = len(s)

    def psi(x):
        pairs = {(i, j): distance(x[i], x[j], kind) for i, j in itertools.permutations(range(n), 2)}
        mu = np.mean(list(pairs.values()))
        return {k: v / mu for k, v in pairs.items()}

    def angle(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    ps, pt = psi(s), psi(t)
    pairs = np.mean([huber(ps[k] - pt[k]) for k in ps])
    triples = list(itertools.permutations(range(n), 3))
    angles = np.mean([huber(angle(s, *ijk) - angle(t, *ijk)) for ijk in triples])
    return distance_weight * pairs + angle_weight * angles


def normed(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def contrastive(s, t, mode, temperature=0.1, margin=1.0, labels=None):
    u, v = normed(s), normed(t)
    n = len(u)
    labels = list(range(n)) if labels is None else labels
    if mode == "triplet":
        terms = [
            max(0.0, ((u[i] - v[i]) ** 2).sum() - ((u[i] - v[j]) ** 2).sum() + margin)
            for i, j in itertools.permutations(range(n), 2)
            if labels[i] != labels[j]
        ]
        return np.mean(terms)
    if mode == "info_nce":
        rivals = lambda i: [v[j] for j in range(n) if j != i and labels[j] != labels[i]]
        cases = [(u[i], v[i], rivals(i)) for i in range(n)]
    else:
        z, y = np.concatenate([u, v]), [*labels, *labels]
        cases = [
            (z[a], z[(a + n) % (2 * n)], [z[b] for b in range(2 * n) if y[b] != y[a]])
            for a in range(2 * n)
        ]
    terms = []
    for anchor, positive, negatives in cases:
        scores = np.array([anchor @ positive, *[anchor @ x for x in negatives]]) / temperature
        terms.append(np.log(np.exp(scores).sum()) - scores[0])
    return np.mean(terms)


def similarity(s, t):
    g = [normed(x @ x.T) for x in (s, t)]
    return ((g[0] - g[1]) ** 2).sum() / len(s) ** 2


def flow(s, t):
    """Layers [B, X, D]."""

    def fsp(a, b):
        return sum(np.outer(a[x], b[x]) for x in range(len(a))) / len(a)

    losses = [
        ((fsp(s[i][b], s[i + 1][b]) - fsp(t[i][b], t[i + 1][b])) ** 2).mean()
        for i in range(len(s) - 1)
        for b in range(len(s[0]))
    ]
    return np.mean(losses)


def moments(s, t, K=2):
    total = ((s.mean(0) - t.mean(0)) ** 2).mean()
    for k in range(2, K + 1):
        c = [((x - x.mean(0)) ** k).mean(0) for x in (s, t)]
        total += ((c[0] - c[1]) ** 2).mean()
    return total


def mmd(s, t, bandwidth=None):
    if bandwidth is None:
        gaps = [((a - b) ** 2).sum() for a, b in itertools.permutations(t, 2)]
        h2 = np.median(gaps)
    else:
        h2 = bandwidth**2
    k = lambda x, y: np.mean([[np.exp(-((a - b) ** 2).sum() / (2 * h2)) for b in y] for a in x])
    return k(s, s) + k(t, t) - 2 * k(s, t)


def entropies(s, t):
    h = lambda z: -(np.exp(log_softmax(z)) * log_softmax(z)).sum(-1)
    return ((h(s) - h(t)) ** 2).mean()


def normal_kl(m0, v0, m1, v1):
    return 0.5 * (np.exp(v0 - v1) + (m1 - m0) ** 2 / np.exp(v1) - 1 + v1 - v0).mean(-1)


def elbo(m, v, t, latent, prior_weight):
    nll = (0.5 * v + (t - m) ** 2 / (2 * np.exp(v))).mean(-1)
    return nll.mean() + prior_weight * normal_kl(*latent, 0.0, 0.0).mean()


def bottleneck(s, t, latent, prior_weight, temperature):
    prior = normal_kl(*latent, 0.0, 0.0).mean()
    return response(s, t, temperature=temperature) + prior_weight * prior


def factor(s, t, mode, rank=2, norm_order=1):
    n, D = s.shape
    if mode == "factor_matching":
        return (np.abs(normed(t) - normed(s)) ** norm_order).sum(-1).mean()
    if mode == "nuclear_norm_matching":
        norm = lambda x: np.linalg.svd(x, compute_uv=False).sum()
        return (norm(s) - norm(t)) ** 2 / (n * D)
    V = np.linalg.svd(t)[2][:rank].T
    return (((s - t) @ V) ** 2).sum() / (n * D)


def selectivity(s, t, metric):
    def m(x):
        if metric == "variance":
            return x.var(0)
        if metric == "sparsity":
            n = len(x)
            ratio = np.abs(x).sum(0) / np.sqrt((x**2).sum(0))
            return (np.sqrt(n) - ratio) / (np.sqrt(n) - 1)
        return np.abs(x).max(0) / np.abs(x).mean(0)

    return ((m(s) - m(t)) ** 2).mean()
