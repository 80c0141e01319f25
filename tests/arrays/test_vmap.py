"""`aidx.vmap` against loops, and the table of torch.func.vmap's options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aidx.arrays
from aidx.arrays import COO, CSR, BatchedFunction, Ragged, ragged, sparse, vmap
from tests.arrays.patterns import few

B = 5


def tree_function(tree, y, *, scale):
    return {"out": jnp.outer(tree["a"], y) * scale, "more": (tree["b"][0].sum(),)}


@few
@given(
    a_axis=st.sampled_from([0, 1, -1, -2]),
    y_axis=st.sampled_from([None, 0, -1]),
    out_axis=st.sampled_from([0, 1, -1]),
    scale_axis=st.sampled_from([None, 0]),
    chunk=st.sampled_from([None, 1, 2, 5, 7]),
)
def test_axes_over_trees_are_those_of_a_loop(a_axis, y_axis, out_axis, scale_axis, chunk):
    a = jnp.arange(3.0 * B).reshape(3, B) if a_axis % 2 else jnp.arange(3.0 * B).reshape(B, 3)
    b = jnp.arange(2.0 * B).reshape(2, B)
    y = jnp.arange(2.0) if y_axis is None else jnp.moveaxis(jnp.arange(2.0 * B).reshape(B, 2), 0,
                                                            y_axis)  # fmt: skip
    scale = jnp.float32(3) if scale_axis is None else jnp.arange(1.0, B + 1)
    mapped = vmap(
        tree_function,
        in_axes=({"a": a_axis, "b": -1}, y_axis),
        out_axes={"out": out_axis, "more": 0},
        kwarg_axes={"scale": scale_axis},
        chunk_size=chunk,
    )
    out = mapped({"a": a, "b": [b]}, y, scale=scale)
    at = lambda x, axis, i: x if axis is None else jnp.take(x, i, axis)
    for i in range(B):
        want = tree_function(
            {"a": at(a, a_axis, i), "b": [b[:, i]]},
            at(y, y_axis, i),
            scale=at(scale, scale_axis, i),
        )
        np.testing.assert_array_equal(jnp.take(out["out"], i, out_axis), want["out"])
        np.testing.assert_array_equal(out["more"][0][i], want["more"][0])


@pytest.mark.smoke
def test_chunks_are_bitwise_for_elementwise_functions_and_one_trace():
    x = jax.random.normal(jax.random.key(0), (7, 3))
    traces = []

    def f(row):
        traces.append(1)
        return row * 2 - row * row

    whole = vmap(f)(x)
    traces.clear()
    chunked = vmap(f, chunk_size=3)  # 3 + 3 + 1: the tail overlaps, it is no second program
    np.testing.assert_array_equal(chunked(x), whole)
    assert len(traces) == 1
    chunked(x)
    assert len(traces) == 1
    g = jax.grad(lambda x: jnp.sum(vmap(f, chunk_size=3)(x)))(x)
    np.testing.assert_allclose(g, 2 - 2 * x, 1e-6, 1e-6)


def test_memory_of_a_chunk_also_in_the_gradient():
    w = jnp.ones((64, 256))

    def f(row):  # an outer product of 256 KiB for every element
        return jnp.sum(jnp.tanh(row[:, None] * w).T @ jnp.cos(row[:, None] * w)) / 1e3

    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)

    def temporary(chunk, transform):
        mapped = lambda x: jnp.sum(vmap(f, chunk_size=chunk)(x))
        compiled = jax.jit(transform(mapped)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for transform in (lambda f: f, jax.grad):
        assert temporary(2, transform) < temporary(None, transform) / 5


def test_sizes_that_differ_name_the_argument():
    f = vmap(lambda tree, y: tree["x"] + y)
    with pytest.raises(ValueError, match=r"args\[1\] has size 3 .*args\[0\]\['x'\] has 2"):
        f({"x": jnp.ones(2)}, jnp.ones(3))
    with pytest.raises(ValueError, match=r"scale has size 3"):
        vmap(lambda x, scale: x)(jnp.ones(2), scale=jnp.ones(3))


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: vmap(jnp.sin, 1)(jnp.ones(2)), "axis 1 is none of them"),
        (lambda: vmap(jnp.sin, (0, 0))(jnp.ones(2)), "1 positional"),
        (lambda: vmap(lambda t: t, ({"a": 0, "b": 0},))({"a": jnp.ones(2)}), "no prefix"),
        (lambda: vmap(jnp.sin, None)(jnp.ones(2)), "nothing is mapped"),
        (lambda: vmap(jnp.sin, axis_size=3)(jnp.ones(2)), "axis_size=3"),
        (lambda: vmap(jnp.sin, chunk_size=0), "chunk_size=0"),
        (lambda: vmap(jnp.sin, chunk_size=1, axis_name="i"), "collectives"),
        (lambda: vmap(jnp.sin, randomness="maybe"), "maybe"),
        (lambda: vmap(jnp.sin, ragged="rows"), "rows"),
        (lambda: vmap(jnp.sin, kwarg_axes={"y": 0})(jnp.ones(2)), r"kwarg_axes names \['y'\]"),
        (lambda: vmap(lambda a: a, 1)(sparse.stack([sparse.eye(2)])), "stack axes"),
        (lambda: vmap(lambda r: r, 1)(Ragged.from_list([[1]])), "axis 0 is mapped"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- keys ----------------------------------------------------------------------------------------


def draw(key, x):
    return x + jax.random.randint(key, (), 0, 1 << 20)


def test_randomness():
    key, x = jax.random.key(0), jnp.arange(B)
    with pytest.raises(ValueError, match=r"args\[0\] is a key"):
        vmap(draw, (None, 0))(key, x)
    same = vmap(draw, (None, 0), randomness="same")(key, x) - x
    assert len({*same.tolist()}) == 1
    different = vmap(draw, (None, 0), randomness="different")(key, x) - x
    assert len({*different.tolist()}) == B
    for chunk in (1, 2, 4):  # the numbers belong to the element, not to the chunk
        f = vmap(draw, (None, 0), randomness="different", chunk_size=chunk)
        np.testing.assert_array_equal(f(key, x) - x, different)
    mapped = vmap(draw)(jax.random.split(key, B), x) - x
    np.testing.assert_array_equal(mapped, different)  # as if split by hand


# --- sparse and ragged arguments -----------------------------------------------------------------


def test_stacks_of_sparse_matrices():
    parts = [sparse.random(jax.random.key(i), (4, 6), nse=5) for i in range(3)]
    stack, v = sparse.stack(parts), jnp.arange(18.0).reshape(3, 6)
    want = [m.to_dense() @ x for m, x in zip(parts, v, strict=True)]
    for axis, chunk in ((0, None), (-3, 2)):
        got = vmap(lambda a, v: a @ v, (axis, 0), chunk_size=chunk)(stack, v)
        np.testing.assert_allclose(got, want, 1e-5)
    doubled = vmap(lambda a: a * 2.0)(stack)
    assert type(doubled) is CSR and doubled.batch_shape == (3,)
    np.testing.assert_allclose(doubled.to_dense(), 2 * stack.to_dense())
    # One pattern, a batch of values: a matrix of axes.
    axes = CSR(0, None, None, (4, 6), None)
    got = vmap(lambda a: a @ v[0], (axes,))(parts[0].replace(data=stack.data))
    assert got.shape == (3, 4)
    data = jnp.stack([parts[0].data, 2 * parts[0].data])
    coo = vmap(lambda d: COO(d, jnp.zeros(5, int), jnp.arange(5), (4, 6)))(data)
    assert coo.batch_shape == (2,)


@few
@given(
    lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    mode=st.sampled_from(["bucket", "segment", "jit"]),
)
def test_rows_of_a_ragged_are_those_of_a_loop(lengths, mode):
    x = Ragged.from_lengths(jnp.arange(1.0, 13), jnp.array(lengths))
    options = {"ragged": "segment"} if mode == "segment" else {}
    if mode == "jit":
        out, total = in_jit(x)
    else:
        out, total = vmap(row_function, **options)(x)
    for r, row in enumerate(x.to_list()):
        want = np.exp(row) / np.exp(row).sum() if row else []
        np.testing.assert_allclose(out.to_list()[r], want, 1e-5)
        np.testing.assert_allclose(np.ravel(total[r]), sum(row), 1e-6)
    assert out.capacity == x.capacity


def row_function(row):
    return ragged.softmax(row), ragged.reduce_sum(row)


in_jit = jax.jit(vmap(row_function, max_length=4))


def test_ragged_rows_with_other_arguments_gradients_and_chunks():
    x = Ragged.from_list([[1.0, 2.0, 3.0], [], [4.0], [5.0, 6.0]])
    scale = jnp.arange(4.0)
    f = lambda row, s, k: ragged.reduce_sum(row * s)[0] + k
    for chunk in (None, 1, 3):
        got = vmap(f, (0, 0, None), chunk_size=chunk)(x, scale, 10.0)
        assert got.tolist() == [10, 10, 18, 43]
    g = aidx.arrays.grad(lambda x: jnp.sum(vmap(f, (0, 0, None))(x, scale, 0.0)))(x)
    assert g.to_list() == [[0.0] * 3, [], [2.0], [3.0, 3.0]]
    both = vmap(lambda a, b: ragged.concat([a, b], axis=1))(x, x * 2)
    assert both.to_list()[3] == [5.0, 6.0, 10.0, 12.0]
    assert x.map(lambda row: row + 1).to_list() == (x + 1).to_list()
    with pytest.raises(ValueError, match="max_length"):
        jax.jit(vmap(lambda row: row))(x)
    with pytest.raises(ValueError, match="segment"):
        vmap(f, (0, 0, None), ragged="segment")(x, scale, 0.0)
    with pytest.raises(ValueError, match="nested"):
        vmap(lambda r: r)(Ragged.from_list([[[1]]], ragged_rank=2))


def test_buckets_bound_the_number_of_programs():
    traces = []

    def f(row):
        traces.append(row.values.shape)
        return ragged.reduce_sum(row)[0]

    g = vmap(f)
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, 8)
        x = Ragged.from_lengths(jnp.ones(64), jnp.array(lengths))
        assert g(x).tolist() == lengths.tolist()
    assert {s[0] for s in traces} <= {1, 2, 4, 8}
    assert len(traces) <= 4 * 4  # powers of two of lengths times those of numbers of rows


# --- torch.func.vmap's options -------------------------------------------------------------------

X = np.arange(6.0).reshape(2, 3)
drawn = lambda mode: vmap(lambda x, key: jax.random.uniform(key), (0, None), randomness=mode)(
    jnp.ones(3), jax.random.key(0)
)
TORCH_OPTIONS = {  # what it is called there -> (ours, what comes out)
    "in_dims=1": (lambda: vmap(jnp.sum, in_axes=1)(X), X.sum(0)),
    "in_dims=-1": (lambda: vmap(jnp.sum, in_axes=-1)(X), X.sum(0)),
    "in_dims=(0, None)": (lambda: vmap(jnp.multiply, (0, None))(X[:, 0], 2.0), X[:, 0] * 2),
    "in_dims={'a': 0}": (lambda: vmap(lambda t: t["a"].sum(), ({"a": 0},))({"a": X}), X.sum(1)),
    "out_dims=1": (lambda: vmap(jnp.sin, out_axes=1)(X), np.sin(X).T),
    "out_dims=-1": (lambda: vmap(jnp.sin, out_axes=-1)(X), np.sin(X).T),
    "out_dims=None": (lambda: vmap(lambda x: 1.0, out_axes=None)(X), 1.0),
    "chunk_size=1": (lambda: vmap(jnp.sum, chunk_size=1)(X), X.sum(1)),
    "randomness='same'": (lambda: jnp.ptp(drawn("same")), 0.0),
    "randomness='different'": (lambda: len({*drawn("different").tolist()}), 3),
    "nested": (lambda: vmap(vmap(jnp.multiply, (0, None)), (None, 0))(X[0], X[1]),
               np.outer(X[1], X[0])),
    "with grad": (lambda: vmap(jax.grad(lambda x: jnp.sum(x**2)))(X), 2 * X),
    "jit of it": (lambda: jax.jit(vmap(jnp.sum, chunk_size=1))(X), X.sum(1)),
}  # fmt: skip


@pytest.mark.parametrize("option", TORCH_OPTIONS)
def test_torch_options(option):
    call, want = TORCH_OPTIONS[option]
    np.testing.assert_allclose(call(), want, 1e-6)


def test_randomness_is_an_error_unless_it_is_asked_for():
    with pytest.raises(ValueError, match="is a key"):
        drawn("error")


@pytest.mark.parametrize("chunk", [None, 2])
def test_an_spmd_axis_shards_the_mapped_axis(chunk):
    """As jax.vmap's: a constraint inside gets the mesh's axis for the mapped one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    inner = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
    f = lambda row: jax.lax.with_sharding_constraint(row * 2, inner)
    text = lambda g: jax.jit(g).lower(jnp.ones((4, 3))).as_text()
    ours = vmap(f, spmd_axis_name="x", chunk_size=chunk)
    assert '[{"x"}, {}]' in text(ours) and '[{"x"}, {}]' not in text(vmap(f, chunk_size=chunk))
    np.testing.assert_array_equal(ours(jnp.ones((4, 3))), 2)


def test_axis_names_and_a_batched_function():
    f = vmap(lambda x: x / jax.lax.psum(x, "i"), axis_name="i")
    assert isinstance(f, BatchedFunction)
    np.testing.assert_allclose(f(jnp.ones(4)), 0.25)
    assert f.replace(axis_name="j").axis_name == "j"
    assert vmap(lambda: 3, axis_size=2)().tolist() == [3, 3]
