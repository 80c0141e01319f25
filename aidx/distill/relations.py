"""Losses on the relations among the examples of a batch: `[n, D]` embeddings in, a scalar out.

Widths of student and teacher may differ where only relations are compared (relational,
similarity-preserving); contrastive losses compare across and want one width.
"""

import jax
import jax.numpy as jnp

from aidx.distill.divergence import same_shape, weighted_mean
from aidx.distill.features import safe_sqrt, unit
from aidx.distill.options import ContrastiveMode, RelationalDistance
from aidx.typing import Array


def relation_loss(
    student: Array,
    teacher: Array,
    *,
    distance: RelationalDistance | str = RelationalDistance.EUCLIDEAN,
    distance_weight: float = 1.0,
    angle_weight: float = 2.0,
    weights: Array | None = None,
) -> Array:
    """Mutual relations of examples (Park et al., 2019, RKD, eq. 5 to 9).

        psi_D(i, j)    = d(x_i, x_j) / mean of d over pairs i != j
        psi_A(i, j, k) = cos of the angle at x_j between x_i and x_k
        L = distance_weight mean_{i != j} huber(psi_D(s) - psi_D(t))
          + angle_weight mean_{i, j, k distinct} huber(psi_A(s) - psi_A(t))

    Cosine distance is `1 - cos`, between the vectors themselves.

    Args:
        student: `[n, D]`.
        teacher: `[n, D']`.
        distance: d.
        distance_weight: 0 leaves pairs out.
        angle_weight: 0 leaves triplets out, which take n^3 numbers.
        weights: `[n]`, of examples; a pair has the product.

    Raises:
        ValueError: ranks or numbers of examples.

    Example:
        >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 0.0]])
        >>> float(relation_loss(x, 5 * x + 1)) < 1e-10  # scale and place do not matter
        True
    """
    distance = RelationalDistance(distance)
    n = _examples(student, teacher)
    w = jnp.ones(n) if weights is None else weights.astype(jnp.float32)
    student, teacher = _kept(student, w), _kept(teacher, w)
    other = 1 - jnp.eye(n)
    pairs = w[:, None] * w[None, :] * other
    loss = jnp.float32(0)
    if distance_weight:
        psi = [_normalised(pairwise_distance(x, distance), pairs) for x in (student, teacher)]
        loss += distance_weight * weighted_mean(huber(psi[0] - psi[1]), pairs)
    if angle_weight:
        triples = pairs[:, :, None] * w[None, None, :] * other[None, :, :] * other[:, None, :]
        loss += angle_weight * weighted_mean(huber(angles(student) - angles(teacher)), triples)
    return loss


def pairwise_distance(x: Array, distance: RelationalDistance | str) -> Array:
    """`d(x_i, x_j)`: `[n, D]` to `[n, n]`; the gradient at distance zero is zero.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> [round(float(pairwise_distance(x, d)[0, 1]), 4) for d in RelationalDistance]
        [1.4142, 1.0, 2.0]
    """
    distance = RelationalDistance(distance)
    if distance is RelationalDistance.COSINE:
        u = unit(x)
        return 1 - u @ u.T
    difference = x[:, None, :] - x[None, :, :]
    if distance is RelationalDistance.MANHATTAN:
        return jnp.abs(difference).sum(-1)
    square = (difference**2).sum(-1)
    return jnp.where(square > 0, safe_sqrt(square), 0.0)


def angles(x: Array) -> Array:
    """`cos(x_i - x_j, x_k - x_j)` at `[i, j, k]`: `[n, D]` to `[n, n, n]`.

    Example:
        >>> angles(jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))[0, 1].round(3).tolist()
        [1.0, 0.0, 0.0]
    """
    e = unit(x[:, None, :] - x[None, :, :])  # [i, j, D]: from j to i
    return jnp.einsum("ijd,kjd->ijk", e, e)


def similarity_loss(student: Array, teacher: Array, weights: Array | None = None) -> Array:
    """Similar for the teacher, similar for the student (Tung and Mori, 2019, eq. 1 to 4).

        G = F F^T, every row divided by its norm
        L = 1/n^2 ||G_s - G_t||_F^2

    Args:
        student: `[n, ...]`, flattened to `[n, D]`.
        teacher: `[n, ...]`.
        weights: `[n]`, of examples; a pair has the product.

    Raises:
        ValueError: numbers of examples.

    Example:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> losses = similarity_loss(x, 3 * x), similarity_loss(x, jnp.ones((2, 5)))
        >>> [round(float(loss), 4) for loss in losses]
        [0.0, 0.2929]
    """
    s, t = (x.reshape(x.shape[0], -1) for x in (student, teacher))
    n = _examples(s, t)
    w = jnp.ones(n) if weights is None else weights.astype(jnp.float32)
    gram = lambda x: unit(jnp.where(w[None, :] > 0, x @ x.T, 0.0))
    s, t = _kept(s, w), _kept(t, w)
    return weighted_mean((gram(s) - gram(t)) ** 2, w[:, None] * w[None, :])


def contrastive_loss(
    student: Array,
    teacher: Array,
    *,
    mode: ContrastiveMode | str = ContrastiveMode.INFO_NCE,
    temperature: float = 0.1,
    margin: float = 1.0,
    labels: Array | None = None,
    weights: Array | None = None,
) -> Array:
    """An example's own teacher embedding among those of the others; u is `x / ||x||`.

        info_nce  mean_i -log( e^{u_i.v_i/T} / sum_j e^{u_i.v_j/T} )
                  (van den Oord et al., 2018, eq. 4; Tian et al., 2020, CRD)
        triplet   mean_{i != j} max(0, |u_i - v_i|^2 - |u_i - v_j|^2 + margin)
                  (Schroff et al., 2015, eq. 3)
        nt_xent   the 2n embeddings z = (u, v): mean_a -log( e^{z_a.z_p(a)/T} /
                  sum_{b != a} e^{z_a.z_b/T} ), p(a) the same example on the other side
                  (Chen et al., 2020, SimCLR, eq. 1)

    None of the three is 0 when student and teacher agree: agreeing is not enough to be told apart.

    Args:
        student: u before normalising, `[n, D]`.
        teacher: v, `[n, D]`.
        mode: which of the three.
        temperature: T of info_nce and nt_xent.
        margin: of triplet.
        labels: `[n]` integers: examples of one label are no negatives of each other.
        weights: `[n]`; an example of weight 0 is neither anchor nor negative.

    Raises:
        ValueError: shapes or a temperature that is not positive.

    Example:
        >>> x = jnp.eye(2)
        >>> [round(float(contrastive_loss(x, x, mode=m, temperature=1.0)), 4)
        ...  for m in ContrastiveMode]
        [0.3133, 0.0, 0.5514]
    """
    mode = ContrastiveMode(mode)
    same_shape(student, teacher, "embeddings")
    n = _examples(student, teacher)
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be positive")
    w = jnp.ones(n) if weights is None else weights.astype(jnp.float32)
    u, v = unit(_kept(student, w)), unit(_kept(teacher, w))
    same = jnp.eye(n, dtype=bool)
    rival = ~same if labels is None else labels[:, None] != labels[None, :]
    rival = rival & (w > 0)[None, :]
    if mode is ContrastiveMode.TRIPLET:
        square = ((u[:, None, :] - v[None, :, :]) ** 2).sum(-1)
        hinge = jax.nn.relu(jnp.diagonal(square)[:, None] - square + margin)
        return weighted_mean(hinge, jnp.where(rival, w[:, None] * w[None, :], 0.0))
    if mode is ContrastiveMode.NT_XENT:
        u = v = jnp.concatenate([u, v])
        w = jnp.concatenate([w, w])
        off = jnp.zeros((n, n), bool)
        rival = jnp.block([[rival, rival], [rival, rival]])
        same = jnp.block([[off, same], [same, off]])
    logits = jnp.where(same | rival, u @ v.T / temperature, -jnp.inf)
    positive = jnp.where(same, logits, 0.0).sum(-1)
    return weighted_mean(jax.nn.logsumexp(logits, axis=-1) - positive, w)


def huber(x: Array) -> Array:
    """`x^2 / 2` up to 1, `|x| - 1/2` beyond.

    Example:
        >>> huber(jnp.array([0.5, -2.0])).tolist()
        [0.125, 1.5]
    """
    size = jnp.abs(x)
    return jnp.where(size <= 1, 0.5 * x**2, size - 0.5)


def _normalised(d: Array, pairs: Array) -> Array:
    mean = weighted_mean(d, pairs)
    return d / jnp.where(mean > 0, mean, 1.0)


def _kept(x: Array, w: Array) -> Array:
    """Rows of weight 0 may hold NaN: they become 0."""
    return jnp.where(w[:, None] > 0, x.astype(jnp.float32), 0.0)


def _examples(student: Array, teacher: Array) -> int:
    if student.ndim != 2 or teacher.ndim != 2:
        raise ValueError(f"embeddings are [n, D], not {student.shape} and {teacher.shape}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{student.shape[0]} examples of the student, {teacher.shape[0]} of the teacher"
        )
    return student.shape[0]
