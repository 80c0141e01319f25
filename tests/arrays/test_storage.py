"""2:4 storage, embedding gradients, and gradients of pytrees with integers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aidx.arrays
from aidx.arrays import CSR, Ragged, RowSparse, TwoFour, sparse
from tests.arrays.patterns import few

# --- 2:4 -----------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 99))
def test_two_of_four_keeps_the_largest_and_multiplies_like_dense(seed):
    key = jax.random.key(seed)
    w = jax.random.normal(key, (20, 3))  # 5 groups: an odd number of half bytes
    x = jax.random.normal(jax.random.fold_in(key, 1), (2, 3, 20))
    s = TwoFour.from_dense(w)
    dense = np.asarray(w).reshape(5, 4, 3).copy()
    np.put_along_axis(dense, np.argsort(np.abs(dense), axis=1)[:, :2], 0, axis=1)
    dense = dense.reshape(20, 3)
    np.testing.assert_array_equal(s.to_dense(), dense)
    np.testing.assert_allclose(x @ s, x @ dense, 1e-4, 1e-5)
    g, gx = aidx.arrays.grad(lambda s, x: jnp.sum(jnp.sin(x @ s)), (0, 1))(s, x)
    gd, gdx = jax.grad(lambda s, x: jnp.sum(jnp.sin(x @ s)), (0, 1))(jnp.asarray(dense), x)
    assert type(g) is TwoFour and (g.places == s.places).all()
    np.testing.assert_allclose(g.to_dense(), np.where(dense != 0, gd, 0), 1e-4, 1e-5)
    np.testing.assert_allclose(gx, gdx, 1e-4, 1e-5)


def test_two_of_four_under_vmap_forward_mode_and_on_cuda():
    w = jax.random.normal(jax.random.key(0), (2, 512, 64), jnp.bfloat16).astype(jnp.float32)
    s = [TwoFour.from_dense(m) for m in w]
    x = jax.random.normal(jax.random.key(1), (3, 4, 512))
    rows = jax.vmap(lambda x: x @ s[0])(x)
    np.testing.assert_allclose(rows, x @ s[0].to_dense(), 1e-3, 1e-3)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *s)
    both = jax.vmap(lambda s: x[0] @ s)(stack)
    np.testing.assert_allclose(both[1], x[0] @ s[1].to_dense(), 1e-3, 1e-3)
    move = jax.jvp(lambda x: x @ s[0], (x,), (x,))[1]
    np.testing.assert_allclose(move, rows, 1e-4, 1e-4)
    half = x.astype(jnp.bfloat16), s[0].with_values(s[0].values.astype(jnp.bfloat16))
    traced = lambda *args: jax.jit(sparse.two_four_matmul).trace(*args)
    lower = lambda *args: traced(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lower(*half).as_text()
    assert "mosaic_gpu" not in lower(x, s[0]).as_text()  # f32 is not rounded


def test_two_of_four_takes_nine_sixteenths_and_never_spreads_whole():
    w = jnp.ones((8192, 256), jnp.bfloat16)
    s = jax.eval_shape(sparse.two_four, w)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(s))
    assert size == w.nbytes * 9 / 16  # half the values, 2 bits of place each
    x = jax.ShapeDtypeStruct((4, 8192), jnp.bfloat16)
    f = lambda x, s: jnp.sum((x @ s).astype(jnp.float32) ** 2)
    for g in (f, jax.grad(f), aidx.arrays.grad(f, 1)):
        memory = jax.jit(g).lower(x, s).compile().memory_analysis()
        assert memory.temp_size_in_bytes < w.nbytes  # a spread f32 copy would take twice
    with pytest.raises(ValueError, match="multiple of 4"):
        sparse.two_four(jnp.ones((6, 2)))
    with pytest.raises(ValueError, match="sizes differ"):
        jnp.ones((2, 4)) @ sparse.two_four(jnp.ones((8, 2)))


# --- embeddings ----------------------------------------------------------------------------------

V, D = 12, 3


def loss(embedded, params):
    return jnp.sum(jnp.sin(embedded) * params)


@few
@given(ids=st.lists(st.integers(-1, V), min_size=6, max_size=6))
def test_embedding_gradients_are_the_dense_ones_on_touched_rows(ids):
    ids = jnp.array(ids).reshape(2, 3)
    table = jax.random.normal(jax.random.key(0), (V, D))
    params = jnp.ones((1, 1, D))
    value, (g, gp) = both_grads(table, ids, params)

    def dense(table, params):
        valid = (ids >= 0) & (ids < V)
        embedded = jnp.where(valid[..., None], table[jnp.clip(ids, 0, V - 1)], 0)
        return loss(embedded, params)

    want, (gt, gq) = jax.value_and_grad(dense, (0, 1))(table, params)
    np.testing.assert_allclose(value, want, 1e-5, 1e-6)
    np.testing.assert_allclose(g.to_dense(), gt, 1e-5, 1e-6)
    np.testing.assert_allclose(gp, gq, 1e-5, 1e-6)
    rows = np.asarray(g.rows)
    assert (np.diff(rows[rows < V]) > 0).all()  # each once


both_grads = jax.jit(sparse.embedding_value_and_grad(loss))


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_only_touched_rows_and_their_state_move(optimizer):
    table = jax.random.normal(jax.random.key(0), (V, D))
    state = optimizer.init(table)
    step = jax.jit(lambda g, s, t: sparse.update_rows(optimizer, g, s, t))
    for ids in ([1, 5, 5], [7, 1, 2]):
        _, (g, _) = both_grads(table, jnp.array([ids] * 2), jnp.ones((1, 1, D)))
        new_table, new_state = step(g, state, table)
        updates, dense_state = optimizer.update(g.to_dense(), state, table)
        touched = np.isin(np.arange(V), ids)
        np.testing.assert_allclose(new_table[touched], (table + updates)[touched], 1e-5)
        np.testing.assert_array_equal(new_table[~touched], table[~touched])
        leaves = map(jax.tree.leaves, (state, new_state, dense_state))
        for old, new, dense in zip(*leaves, strict=True):
            if new.ndim == 0:
                assert new == dense
            else:
                np.testing.assert_allclose(new[touched], dense[touched], 1e-5)
                np.testing.assert_array_equal(new[~touched], old[~touched])
        table, state = new_table, new_state


def test_a_state_without_rows_is_refused():
    table, factored = jnp.ones((128, 256)), optax.adafactor(0.1)
    g = RowSparse(jnp.ones((1, 256)), jnp.array([0]), table.shape)
    with pytest.raises(ValueError, match="no rows"):
        sparse.update_rows(factored, g, factored.init(table), table)


def test_a_dense_gradient_of_the_table_is_never_made():
    table = jax.ShapeDtypeStruct((1 << 16, 64), jnp.float32)  # 16 MiB
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    f = sparse.embedding_value_and_grad(lambda e, _: jnp.sum(e**2))
    memory = jax.jit(lambda t, i: f(t, i, None)[1][0]).lower(table, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1 << 18


# --- gradients of pytrees ------------------------------------------------------------------------


@pytest.mark.smoke
def test_gradients_have_the_class_and_the_pattern_of_the_argument():
    tree = {"a": CSR.from_dense(jnp.eye(3), nse=4), "r": Ragged.from_list([[1.0], [2.0]]), "n": 3}
    f = lambda tree, x: jnp.sum((tree["a"] @ x) ** 2) + jnp.sum(tree["r"].values ** 2)
    value, (g, gx) = aidx.arrays.value_and_grad(f, (0, 1))(tree, jnp.ones(3))
    assert value == 8.0 and g["n"] == 3
    assert g["a"].data.tolist() == [2.0, 2.0, 2.0, 0.0] and g["a"].shape == (3, 3)
    assert g["r"].to_list() == [[2.0], [4.0]] and gx.tolist() == [2.0] * 3
    assert jax.tree.structure(g) == jax.tree.structure(tree)


def test_aux_argnums_and_what_is_refused():
    f = lambda n, x: (jnp.sum(x**2) * n, "aux")
    (value, aux), g = aidx.arrays.value_and_grad(f, -1, has_aux=True)(2, jnp.ones(2))
    assert (float(value), aux, g.tolist()) == (4.0, "aux", [4.0, 4.0])
    g, aux = aidx.arrays.grad(f, 1, has_aux=True)(2, jnp.ones(2))
    assert aux == "aux" and g.tolist() == [4.0, 4.0]
    with pytest.raises(TypeError, match="no floating leaf"):
        aidx.arrays.grad(lambda n: n)(3)
    with pytest.raises(ValueError, match="argnums"):
        aidx.arrays.grad(lambda x: x, 1)(3.0)
    z = aidx.arrays.grad(lambda z: z * z, holomorphic=True)(jnp.complex64(1 + 2j))
    assert complex(z) == 2 + 4j


def test_optax_updates_the_floating_part():
    a = CSR.from_dense(2 * jnp.eye(3))
    optimizer = optax.sgd(0.5)
    floats, rest = aidx.arrays.partition(a)
    g, _ = aidx.arrays.partition(aidx.arrays.grad(lambda a: a.sum())(a))
    updates, _ = optimizer.update(g, optimizer.init(floats))
    b = aidx.arrays.combine(optax.apply_updates(floats, updates), rest)
    assert b.data.tolist() == [1.5] * 3 and (b.indices == a.indices).all()


def test_second_order_gradients_of_pytrees():
    a = CSR.from_dense(jnp.eye(2))
    inner = lambda a: jnp.sum(aidx.arrays.grad(lambda a: jnp.sum(a.data**3))(a).data)
    assert aidx.arrays.grad(inner)(a).data.tolist() == [6.0, 6.0]
