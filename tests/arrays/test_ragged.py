"""Ragged rows against Python lists and against each row on its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aidx.arrays
from aidx.arrays import NestedTensor, Ragged, RaggedTensor, deserialize, ragged, serialize
from tests.arrays.patterns import few

ROWS, CAPACITY = 4, 12
rows_of_numbers = st.lists(st.lists(st.integers(-3, 3), max_size=3), min_size=ROWS, max_size=ROWS)


def make(rows, dtype=jnp.float32):
    return Ragged.from_list(rows, capacity=CAPACITY, dtype=dtype)


# --- what a Ragged is ----------------------------------------------------------------------------


@few
@given(rows=rows_of_numbers)
def test_every_constructor_gives_the_same_rows(rows):
    r = make(rows, jnp.int32)
    lengths = np.array([len(row) for row in rows])
    assert r.to_list() == rows
    assert r.row_lengths.tolist() == lengths.tolist()
    np.testing.assert_array_equal(r.row_limits - r.row_starts, lengths)
    np.testing.assert_array_equal(r.value_rowids[: lengths.sum()], np.repeat(range(ROWS), lengths))
    assert (r.value_rowids[lengths.sum() :] == ROWS).all()
    garbage = r.values.at[lengths.sum() :].set(99)
    same = [
        Ragged.from_lengths(garbage, lengths),
        Ragged.from_offsets(garbage, r.offsets),
        Ragged.from_segment_ids(garbage, r.value_rowids, ROWS),
        Ragged.from_padded(r.to_padded(3, fill=7), lengths, capacity=CAPACITY),
        deserialize(serialize(r)),
    ]
    for other in same:
        chex.assert_trees_all_equal(other, r)
    dense = r.to_padded(3, fill=-9)
    assert [d[:n] for d, n in zip(dense.tolist(), lengths, strict=True)] == rows
    assert all((d[n:] == -9).all() for d, n in zip(dense, lengths, strict=True))
    np.testing.assert_array_equal(r.to_csr(3).to_dense(), r.to_padded(3))


def test_names_and_nesting():
    assert NestedTensor is Ragged and RaggedTensor is Ragged
    rows = [[[1.0, 2.0], []], [], [[3.0]]]
    r = Ragged.from_list(rows, ragged_rank=2, capacity=5)
    assert r.ragged_rank == 2 and r.ndim == 3 and r.to_list() == rows
    assert r[0].to_list() == rows[0] and [x.to_list() for x in r] == rows
    padded = r.to_padded()
    assert padded.shape == (3, 2, 2) and float(padded.sum()) == 6
    assert ragged.merge_dims(r, 1, 2).to_list() == [[1.0, 2.0], [], [3.0]]
    assert ragged.merge_dims(r, 0, 1).to_list() == [[1.0, 2.0], [], [3.0]]
    assert ragged.merge_dims(r, 0, 2).tolist()[:3] == [1.0, 2.0, 3.0]
    assert ragged.reduce_sum(r, 2).to_list() == [[3.0, 0.0], [], [3.0]]
    assert (r * jnp.array([[[1.0]], [[5.0]], [[10.0]]])).to_list() == [[[1, 2], []], [], [[30.0]]]
    assert ragged.gather(r, jnp.array([2, 0])).to_list() == [rows[2], rows[0]]
    assert ragged.softmax(r).to_list()[2] == [[1.0]]
    with pytest.raises(ValueError, match="merge_dims"):
        ragged.reduce_sum(r, 1)
    with pytest.raises(ValueError, match="one ragged level"):
        ragged.reverse_rows(r)
    deep = Ragged.from_list([[[[1], [2, 3]]], []], ragged_rank=3)
    assert deep.to_list() == [[[[1], [2, 3]]], []] and deep.row_lengths.tolist() == [1, 0]


@pytest.mark.parametrize(
    "bad, match",
    [
        (lambda: Ragged.from_offsets(jnp.ones(3), jnp.array([0, 2, 1])), "ascend"),
        (lambda: Ragged.from_offsets(jnp.ones(3), jnp.array([1, 2])), "ascend"),
        (lambda: Ragged.from_lengths(jnp.ones(3), jnp.array([2, 2])), "capacity=3"),
        (lambda: Ragged.from_lengths(jnp.ones(3), jnp.array([-1])), "negative"),
        (lambda: Ragged.from_list([[1, 2]], capacity=1), "capacity=1 is too small: 2"),
        (lambda: Ragged.from_list([[[1]], [[1, 2]]]), "beyond their length"),
        (lambda: Ragged.from_padded(jnp.ones((1, 2)), jnp.array([3])), r"in \[0, 2\]"),
        (lambda: Ragged.from_padded(jnp.ones((1, 2)), jnp.array([2]), capacity=1), "too small"),
        (lambda: Ragged.from_segment_ids(jnp.ones(2), jnp.array([1, 0]), 2), "ascend"),
        (lambda: Ragged.from_list([[1]]) + Ragged.from_list([[], [1]]), "rows differ"),
        (lambda: Ragged.from_list([[1], []]) + Ragged.from_list([[], [1]]), "lengths differ"),
        (lambda: Ragged.from_list([[1, 2]]) + jnp.ones((1, 2)), "does not broadcast"),
        (lambda: Ragged.from_list([[1]]).with_values(jnp.ones(2)), "capacity 1"),
        (lambda: jax.jit(lambda x, n: Ragged.from_padded(x, n))(jnp.ones((1, 2)), jnp.array([1])),
         "capacity= must be given under jit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        bad()


def test_an_overflow_under_jit_cuts_from_the_end():
    pack = jax.jit(lambda x, n: Ragged.from_padded(x, n, capacity=3))
    r = pack(jnp.arange(6).reshape(3, 2), jnp.array([2, 2, 1]))
    assert r.to_list() == [[0, 1], [2], []]
    taken = jax.jit(lambda r, i: ragged.gather(r, i, capacity=3))(r, jnp.array([0, 0]))
    assert taken.to_list() == [[0, 1], [0]]


@pytest.mark.smoke
def test_other_lengths_within_a_capacity_compile_nothing():
    @jax.jit
    @chex.assert_max_traces(1)
    def f(r, w):
        y = ragged.layer_norm(ragged.silu(r @ w), jnp.ones(3))
        z = ragged.attention(*[y.map_values(lambda v: v[:, None])] * 3, causal=True)
        return ragged.reduce_mean(z), ragged.concat([r, r], axis=1)

    for lengths in ([1, 2, 3], [0, 0, 8], [4, 4, 0]):
        r = Ragged.from_lengths(jnp.ones((8, 3)), jnp.array(lengths))
        mean, both = f(r, jnp.eye(3))
        assert mean.shape == (3, 1, 3) and both.row_lengths.tolist() == [2 * n for n in lengths]


CONSTANTS = {
    "from_padded": lambda r, x: Ragged.from_padded(x[None] * jnp.ones((2, 1)), FIXED, capacity=9),
    "from_lengths": lambda r, x: Ragged.from_lengths(x, FIXED),
    "from_segment_ids": lambda r, x: Ragged.from_segment_ids(x, jnp.array([0, 1, 1]), 2),
    "to_padded": lambda r, x: r.to_padded(3) * x[None],
    "to_csr": lambda r, x: r.to_csr(3) @ x,
    "row": lambda r, x: r[1] * x[0],
    "with_values": lambda r, x: r.with_values(x),
    "r + r": lambda r, x: r.with_values(x) + r,
    "r * dense": lambda r, x: r * x[:2, None],
    "softmax": lambda r, x: ragged.softmax(r.with_values(x)),
    "reduce_max": lambda r, x: ragged.reduce_max(r) * x[0],
    "gather": lambda r, x: ragged.gather(r, jnp.array([1, 0, 1]), capacity=9),
    "boolean_mask": lambda r, x: ragged.boolean_mask(r, r.with_values(x > 1)),
    "concat": lambda r, x: ragged.concat([r, r.with_values(x)], axis=1),
    "stack": lambda r, x: ragged.stack([r, r]),
    "attention": lambda r, x: ragged.attention(*[r.with_values(x[:, None, None])] * 3),
    "map": lambda r, x: aidx.arrays.vmap(lambda row: ragged.reduce_sum(row)[0])(r.with_values(x)),
}
FIXED = jnp.array([1, 2])


@pytest.mark.parametrize("name", CONSTANTS)
def test_rows_that_a_jitted_function_closes_over(name):
    """Its offsets are no tracers, but what is made of them under jit is."""
    r, x = Ragged.from_lengths(jnp.array([3.0, 1.0, 2.0]), FIXED), jnp.arange(1.0, 4)
    f = lambda x: jax.tree.leaves(CONSTANTS[name](r, x))
    for got, want in zip(jax.jit(f)(x), f(x), strict=True):
        np.testing.assert_allclose(got, want, 1e-6)


# --- rearranging ---------------------------------------------------------------------------------


@few
@given(
    a=rows_of_numbers, b=rows_of_numbers, at=st.lists(st.integers(-1, 4), min_size=3, max_size=3)
)
def test_rearranging_is_that_of_lists(a, b, at):
    x, y = make(a), make(b)
    assert ragged.concat([x, y]).to_list() == a + b
    assert ragged.concat([x, y], axis=1).to_list() == [p + q for p, q in zip(a, b, strict=True)]
    assert ragged.stack([x, y]).to_list() == [a, b]
    rows = [a[i] if 0 <= i < ROWS else [] for i in at]
    assert ragged.gather(x, jnp.array(at), capacity=9).to_list() == rows
    assert ragged.reverse_rows(x).to_list() == [row[::-1] for row in a]
    positive = x.map_values(lambda v: v > 0)
    assert ragged.boolean_mask(x, positive).to_list() == [[v for v in r if v > 0] for r in a]


@few
@given(rows=rows_of_numbers)
def test_reductions_and_broadcasting_are_those_of_the_rows(rows):
    x = make(rows)
    per_row = jnp.arange(1.0, 5)
    assert (x * per_row[:, None]).to_list() == [
        [v * (i + 1) for v in row] for i, row in enumerate(rows)
    ]
    assert (1 - x).to_list() == [[1 - v for v in row] for row in rows]
    assert (x * x + x / 2 - x).to_list() == [[v * v - v / 2 for v in row] for row in rows]
    sums = [float(sum(row)) for row in rows]
    assert ragged.reduce_sum(x).tolist() == sums
    lengths = [max(1, len(row)) for row in rows]
    np.testing.assert_allclose(ragged.reduce_mean(x), np.divide(sums, lengths), 1e-6)
    assert ragged.reduce_max(x).tolist() == [max(row, default=-np.inf) for row in rows]
    assert ragged.reduce_min(x).tolist() == [min(row, default=np.inf) for row in rows]
    assert ragged.reduce_any(x).tolist() == [any(row) for row in rows]
    assert ragged.reduce_all(x).tolist() == [all(row) for row in rows]
    assert ragged.reduce_min(make(rows, jnp.int32)).tolist() == [
        min(row, default=2**31 - 1) for row in rows
    ]


DTYPES = [jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_of_every_dtype(dtype):
    """Narrow floats are summed in f32; results keep the dtype, means of integers are f32."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    values = jnp.full(600, 1.0078125 if inexact else 1, dtype)  # 1 + 2^-7 is lost above 2 in bf16
    r = Ragged.from_lengths(values, jnp.array([512 if inexact else 200, 0, 88]))
    want = np.asarray(r.row_lengths) * (1.0078125 if inexact else 1)
    eps = float(jnp.finfo(dtype).eps) if inexact else 0
    for got, expected in ((r + r, 2 * want), (r * 1, want), (r - r, 0 * want)):
        total = ragged.reduce_sum(got)
        assert total.dtype == dtype
        if dtype != jnp.uint8:  # which wraps around
            np.testing.assert_allclose(np.asarray(total).astype(complex), expected, 2 * eps)
    mean = ragged.reduce_mean(r)
    assert mean.dtype == (dtype if inexact else jnp.float32)
    np.testing.assert_allclose(np.asarray(mean).astype(complex)[[0, 2]], np.real(values[0]), eps)
    if dtype == jnp.complex64:
        for f in (ragged.reduce_max, ragged.reduce_min):
            with pytest.raises(TypeError, match="order"):
                f(r)
        with pytest.raises(TypeError, match="cast"):
            ragged.softmax(r)
        return
    assert ragged.reduce_max(r)[0] == ragged.reduce_min(r)[2] == values[0]
    if inexact:
        ones = ragged.reduce_sum(ragged.softmax(r))
        assert ones.dtype == dtype
        np.testing.assert_allclose(np.asarray(ones).astype(float), [1, 0, 1], atol=2 * eps)
    if jnp.issubdtype(dtype, jnp.floating):
        g = jax.grad(lambda v: ragged.reduce_max(r.with_values(v)).astype(jnp.float32)[0])(values)
        assert g.dtype == dtype and abs(float(g.astype(jnp.float32).sum()) - 1) < 1e-2


def test_feature_axes():
    r = Ragged.from_list([[[1.0, 2.0], [3.0, 5.0]], [[0.0, 4.0]]])
    assert ragged.reduce_max(r, -1).to_list() == [[2.0, 5.0], [4.0]]
    assert ragged.reduce_max(r, 1).tolist() == [[3.0, 5.0], [0.0, 4.0]]
    assert (r + jnp.array([10.0, 20.0])).to_list()[1] == [[10.0, 24.0]]
    np.testing.assert_allclose(ragged.softmax(r, 1).values[:2].sum(0), 1, 1e-6)
    np.testing.assert_allclose(ragged.softmax(r).values.sum(1), 1, 1e-6)
    with pytest.raises(ValueError, match="axis=0"):
        ragged.softmax(r, 0)


# --- layers --------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(0, 5), min_size=3, max_size=3)
FEATURES = 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def layers(x, w, per_row):
    return {
        "linear": ragged.linear(x, w, w[0]),
        "per_row": x @ per_row,
        "layer_norm": ragged.layer_norm(x, w[0], w[1]),
        "rms_norm": ragged.rms_norm(x, w[0]),
        "gelu": ragged.gelu(x),
        "silu": ragged.silu(x),
        "softmax": ragged.softmax(x, 1),
        "log_softmax": ragged.log_softmax(x, 1),
    }


def one_row(v, w, matrix):
    z = (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1, keepdims=True) + 1e-5)
    return {
        "linear": v @ w + w[:1],
        "per_row": v @ matrix,
        "layer_norm": z * w[:1] + w[1:2],
        "rms_norm": v / jnp.sqrt((v * v).mean(-1, keepdims=True) + 1e-6) * w[:1],
        "gelu": jax.nn.gelu(v),
        "silu": v * jax.nn.sigmoid(v),
        "softmax": jax.nn.softmax(v, 0),
        "log_softmax": jax.nn.log_softmax(v, 0),
    }


@few
@given(lengths=LENGTHS)
def test_layers_are_those_of_each_row(lengths):
    values, w, per_row = normal(0, 16, FEATURES), normal(1, FEATURES, FEATURES), normal(2, 3, 8, 8)
    x = Ragged.from_lengths(values, jnp.array(lengths))
    out = layers(x, w, per_row)
    with jax.default_matmul_precision("highest"):
        want = jax.vmap(one_row, (0, None, 0))(values[:, None], w, per_row[x.value_rowids % 3])
    start = 0
    for r, n in enumerate(lengths):
        span = slice(start, start + n)
        for name, result in out.items():
            expected = want[name][span, 0]
            if "softmax" in name and n:
                expected = one_row(values[span], w, per_row[r])[name]
            np.testing.assert_allclose(result.values[span], expected, 2e-4, 2e-4, err_msg=name)
        start += n
    for name, result in out.items():
        assert (result.values[start:] == 0).all(), name


def attend_one(q, k, v, causal):
    T, S = len(q), len(k)
    logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        logits = np.where(np.tril(np.ones((T, S)), S - T) > 0, logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e30))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
    return np.einsum("nts,snh->tnh", p, v)


@pytest.mark.parametrize("causal", [False, True])
@few
@given(lengths=LENGTHS, more=LENGTHS)
def test_attention_over_rows_of_unequal_lengths(causal, lengths, more):
    # Under causality a query needs as many keys as it has predecessors.
    keys = [n + m for n, m in zip(lengths, more, strict=True)]
    q = Ragged.from_lengths(normal(0, 16, 2, 8), jnp.array(lengths))
    k = Ragged.from_lengths(normal(1, 32, 2, 8), jnp.array(keys))
    v = k.with_values(normal(2, 32, 2, 8))
    out = attend(q, k, v, causal)
    at, s = np.asarray(q.offsets), np.asarray(k.offsets)
    for r in range(3):
        if lengths[r] and keys[r]:
            rows = [np.float64(x.values[b[r] : b[r + 1]]) for x, b in ((q, at), (k, s), (v, s))]
            got = out.values[at[r] : at[r + 1]]
            np.testing.assert_allclose(got, attend_one(*rows, causal), 1e-4, 1e-4)
    assert (out.values[at[-1] :] == 0).all()


attend = jax.jit(lambda q, k, v, causal: ragged.attention(q, k, v, causal=causal), static_argnums=3)


def test_attention_gradients_stay_in_their_row():
    x = Ragged.from_lengths(normal(0, 12, 1, 8), jnp.array([3, 5]))
    f = lambda x: jnp.sum(ragged.attention(x, x, x).values[:3] ** 2)
    g = aidx.arrays.grad(f)(x)
    assert type(g) is Ragged and (g.values[:3] != 0).all() and (g.values[3:] == 0).all()
    with pytest.raises(ValueError, match="rows differ"):
        ragged.attention(x, Ragged.from_lengths(x.values, jnp.array([8])), x)
    with pytest.raises(TypeError, match="return_lse"):
        ragged.attention(x, x, x, return_lse=True)


def test_embedding_lookup_and_its_gradient():
    ids = Ragged.from_list([[1, 2], [], [2, 7, -1]], capacity=6)
    f = lambda table: jnp.sum(ragged.embedding_lookup(table, ids).values * 2)
    table = normal(0, 4, 2)
    out = ragged.embedding_lookup(table, ids)
    np.testing.assert_array_equal(out.values[jnp.array([1, 2])], table[jnp.array([2, 2])])
    assert (out.values[3:] == 0).all()  # outside the table, and padding
    assert jax.grad(f)(table).tolist() == [[0, 0], [2, 2], [4, 4], [0, 0]]


def test_gradients_of_reductions():
    x = make([[1.0, 2.0, 2.0], [], [5.0], [1.0, 0.0]])
    g = aidx.arrays.grad(lambda x: jnp.sum(jnp.where(x.row_lengths > 0, ragged.reduce_max(x), 0)))
    assert g(x).to_list() == [[0.0, 0.5, 0.5], [], [1.0], [1.0, 0.0]]
    g = aidx.arrays.grad(lambda x: jnp.sum(ragged.reduce_mean(x)))(x)
    np.testing.assert_allclose(g.values[:3], 1 / 3, 1e-6)
    g = aidx.arrays.grad(lambda x: jnp.sum(ragged.softmax(x).values ** 2))(x)
    assert abs(float(g.values[:3].sum())) < 1e-6  # softmax does not see a constant


def test_work_and_memory_are_those_of_the_values():
    """A long row among many short ones: padding would take R times its length."""
    R, total = 512, 1024
    values = jax.ShapeDtypeStruct((total, 64), jnp.float32)
    offsets = jax.ShapeDtypeStruct((R + 1,), jnp.int32)
    f = lambda v, o, w: ragged.layer_norm(ragged.linear(Ragged(v, o), w), w[0]).values
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(f).lower(values, offsets, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * total * 64 * 4
    assert compiled.cost_analysis()["flops"] < 4 * total * 64 * 64
