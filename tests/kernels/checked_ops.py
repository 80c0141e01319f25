"""Run by test_ops.py in a process with eight CPU devices: aidx's ops keep every law of op_check."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from aidx.arrays import sparse
from aidx.arrays.formats import CSR
from aidx.arrays.two_four import TwoFour, two_four_matmul, unpack_places
from aidx.kernels import Case, Fold, KernelBuilder, Tolerance, op_check
from aidx.ops import rope, sampling
from aidx.ops.flash_attention import FlashAttentionConfig, flash_attention
from aidx.ops.norm import layer_norm, rms_norm
from aidx.ops.paged_attention import paged_attention
from aidx.ops.write_kv import write_kv
from tests.ops import dense

ROWS = P("devices")
BOTH = ("float32", "bfloat16")
ONE = ("float32",)


def by_rows(*arrays):
    """Shards of the leading axis where true, copies elsewhere."""
    return tuple(ROWS if split else P() for split in arrays), ROWS


# --- norms and rope -------------------------------------------------------------------------------


def plain_rms_norm(x, scale):
    mean = jnp.sum(x * x, -1, keepdims=True) / x.shape[-1]
    return x / jnp.sqrt(mean + 1e-6) * scale[None]


def plain_layer_norm(x, scale, bias):
    y = x - jnp.sum(x, -1, keepdims=True) / x.shape[-1]
    y = y / jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) / x.shape[-1] + 1e-5)
    return y * scale[None] + bias[None]


def plain_rope(x, angles):
    turn = jnp.exp(1j * angles)[..., None, :]
    half = x.shape[-1] // 2
    y = (x[..., :half] + 1j * x[..., half:]) * turn
    return jnp.concatenate([y.real, y.imag], -1).astype(x.dtype)


def turned(x, angles):
    angles = angles.astype(jnp.float32)
    return rope.apply_rope(x, jnp.cos(angles), jnp.sin(angles))


def check_norms():
    main = Case("8 x 6", ((8, 6), (6,)), dtypes=BOTH, shard=by_rows(True, False))
    others = [Case(f"{n} x {d}", ((n, d), (d,)), dtypes=ONE) for n, d in ((1, 1), (0, 8), (3, 129))]
    op_check(rms_norm, [main, *others], reference=plain_rms_norm)
    main = Case("8 x 6", ((8, 6), (6,), (6,)), dtypes=BOTH, shard=by_rows(True, False, False))
    op_check(layer_norm, [main], reference=plain_layer_norm)
    main = Case("8 x 2 x 6", ((8, 2, 6), (8, 3)), dtypes=BOTH, shard=by_rows(True, True))
    op_check(turned, [main], reference=plain_rope)


# --- attention ------------------------------------------------------------------------------------

SMALL = FlashAttentionConfig(block_size_q=4, block_size_kv=4)


def flash(q, k, v, kv_lens, *, implementation):
    return flash_attention(
        q, k, v, causal=True, kv_lens=kv_lens, config=SMALL, implementation=implementation
    )


def plain_flash(q, k, v, kv_lens):
    seen = (jnp.arange(k.shape[1])[None] < kv_lens[:, None])[:, None, None, :]
    # A key that no query sees takes no part, whatever it holds.
    hidden = ~seen[:, 0, 0, :, None, None]
    k, v = (jnp.where(hidden, 0.0, x).astype(q.dtype) for x in (k, v))
    out = dense.attend(q, k, v, causal=True, allowed=seen)[0]
    return out.astype(q.dtype)


def padding(q, k, v, kv_lens):
    hidden = jnp.broadcast_to(
        (jnp.arange(k.shape[1])[None] >= kv_lens[:, None])[..., None, None], k.shape
    )
    return None, hidden, hidden, None


def check_flash():
    lens = np.array([7, 6, 5, 7, 7, 4, 7, 7], np.int32)
    shapes = ((8, 7, 4, 8), (8, 7, 2, 8), (8, 7, 2, 8), lens)
    main = Case(
        "GQA, 7 tokens, ragged",
        shapes,
        dtypes=BOTH,
        vmap=((0, 0, 0, None), (0, None, None, None)),
        shard=by_rows(True, True, True, True),
        unread=padding,
        poison=(2,),
    )
    one = Case("one token", ((1, 1, 1, 8),) * 3 + (np.ones(1, np.int32),), dtypes=ONE)
    none = Case("no batch", ((0, 3, 1, 8),) * 3 + (np.ones(0, np.int32),), dtypes=ONE)
    op_check(
        flash,
        [main, one, none],
        reference=plain_flash,
        implementations=["xla"],
        tolerance=Tolerance(float32=3e-5, bfloat16=3e-2),
    )


TABLES = np.array([[3, 1], [4, 2]], np.int32)
CONTEXT = np.array([3, 7], np.int32)
INDPTR = np.array([0, 1, 3], np.int32)


def paged(q, k_pool, v_pool, tables, context, indptr, *, implementation):
    return paged_attention(
        q, k_pool, v_pool, tables, context, indptr, max_q=2, implementation=implementation
    )


def plain_paged(q, k_pool, v_pool, tables, context, indptr):
    """Row by row over the slots in order; the rows are those of this module."""
    out = jnp.zeros((*q.shape[:2], v_pool.shape[-1]), jnp.float32)
    for row in range(2):
        begin, end, length = INDPTR[row], INDPTR[row + 1], CONTEXT[row]
        keys, values = (
            jnp.moveaxis(pool[tables[row]], 1, 2).reshape(-1, *pool.shape[1::2])[None, :length]
            for pool in (k_pool, v_pool)
        )
        found = dense.attend(q[None, begin:end], keys, values, causal=True)[0][0]
        out = out.at[begin:end].set(found)
    return out.astype(q.dtype)


def unowned(q, k_pool, v_pool, tables, context, indptr):
    size = k_pool.shape[2]
    slots = np.ones((k_pool.shape[0], size), bool)
    for row in range(2):
        for position in range(CONTEXT[row]):
            slots[TABLES[row, position // size], position % size] = False
    hidden = jnp.broadcast_to(slots[:, None, :, None], k_pool.shape)
    nobody = jnp.broadcast_to((jnp.arange(q.shape[0]) >= 3)[:, None, None], q.shape)
    return nobody, hidden, hidden, None, None, None


def check_paged():
    heads = P(None, "devices")
    case = Case(
        "decode and verify, 16 heads over 8",
        ((4, 16, 8), (5, 8, 4, 8), (5, 8, 4, 8), TABLES, CONTEXT, INDPTR),
        dtypes=BOTH,
        gradients=False,
        vmap=((0, None, None, None, None, None), (0, 0, 0, None, None, None)),
        shard=((heads, heads, heads, P(), P(), P()), heads),
        unread=unowned,
        poison=(2,),
    )
    op_check(paged, [case], reference=plain_paged, implementations=["xla"])


# --- writing, sampling ----------------------------------------------------------------------------


def plain_write(k_pool, v_pool, k, v, slots):
    def put(pool, x):
        P_, K, size, H = pool.shape
        flat = jnp.moveaxis(pool, 2, 1).reshape(-1, K, H)
        where = slots[None] == jnp.arange(P_ * size, dtype=slots.dtype)[:, None]
        new = jnp.stack([x[jnp.argmax(hit)] for hit in where])
        flat = jnp.where(where.any(1)[:, None, None], new.astype(pool.dtype), flat)
        return jnp.moveaxis(flat.reshape(P_, size, K, H), 1, 2)

    return put(k_pool, k), put(v_pool, v)


def check_write():
    slots = np.array([5, -1, 2], np.int32)
    heads = P(None, "devices")
    pools, tokens = ((2, 8, 4, 4),) * 2, ((3, 8, 4),) * 2
    skipped = jnp.broadcast_to((slots == -1)[:, None, None], (3, 8, 4))
    case = Case(
        "3 tokens, one of no slot",
        (*pools, *tokens, slots),
        dtypes=BOTH,
        gradients=False,
        vmap=((0, 0, 0, 0, None),),
        shard=((heads,) * 4 + (P(),), (heads, heads)),
        donate=(0, 1),
        unread=lambda *_: (None, None, skipped, skipped, None),
    )
    op_check(write_kv, [case], reference=plain_write, implementations=["xla"])


ROWS_OF_SAMPLING = sampling.sampling_rows(
    8, temperature=[0.0, 0.7] * 4, top_k=[0, 3] * 4, top_p=[1.0, 0.8] * 4, seed=range(8)
)


def untied(logits):
    """Ties are broken by the order of the tokens, which a sort and a threshold do not share."""
    return logits + 1e-3 * jnp.arange(logits.shape[-1])[None]


@jax.jit  # as the engine calls it; eagerly its loops compile anew in every call
def drawn(logits, positions):
    return sampling.sample(untied(logits), ROWS_OF_SAMPLING, positions, variant="full").tokens


def plain_drawn(logits, positions):
    """The same noise over a sort: tokens are exact, so both must keep the same candidates."""
    rows, logits = ROWS_OF_SAMPLING, untied(logits)
    hot = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    x = logits.astype(jnp.float32) / hot
    order = jnp.argsort(-x, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    k = jnp.where(rows.top_k > 0, rows.top_k, x.shape[-1])[:, None]
    x = jnp.where(rank < k, x, -jnp.inf)
    mass = jnp.take_along_axis(jax.nn.softmax(x, -1), order, -1)
    before = jnp.take_along_axis(jnp.cumsum(mass, -1) - mass, rank, -1)
    x = jnp.where(before < rows.top_p[:, None], x, -jnp.inf)
    noise = sampling.gumbel(sampling.draw_keys(rows, positions), x.shape[-1])
    best = jnp.argmax(jnp.where(rows.temperature[:, None] > 0, x + noise, logits), -1)
    return best.astype(jnp.int32)


def check_sample():
    """Rows are fixed, so they are neither split nor vmapped; NaN logits are no case of sampling."""
    case = Case(
        "8 rows of 19",
        ((8, 19), np.arange(8, dtype=np.int32)),
        dtypes=ONE,
        gradients=False,
        vmap=((0, None),),
        poison=(),
    )
    op_check(drawn, [case], reference=plain_drawn)


# --- sparse products ------------------------------------------------------------------------------


def patterns(side=8, width=8):
    """A CSR with an empty row and a full one, and a 2:4 matrix; their values are the operands."""
    keep = np.random.default_rng(5).random((side, side)) < 0.3
    keep[1], keep[2] = False, True
    weights = np.random.default_rng(6).normal(size=(side, width))
    return CSR.from_dense(jnp.asarray(keep, jnp.float32)), TwoFour.from_dense(jnp.asarray(weights))


def products(side=8, width=8):
    """(name, function, reference, shapes of its operands) of each product with a pattern."""
    csr, weights = patterns(side, width)
    rows, columns = map(np.asarray, csr.coordinates())
    places = np.asarray(unpack_places(weights.places, side // 4))
    places = places + 4 * np.arange(side // 4, dtype=np.int32)[:, None, None]
    spread = (places[:, :, None] == np.arange(side)[None, None, :, None]).astype(np.float32)

    def spmm(data, x, *, implementation):
        return sparse.matmul(csr.with_data(data), x, implementation=implementation)

    def plain_spmm(data, x):
        return jnp.zeros((side, side), data.dtype).at[rows, columns].add(data) @ x

    def sddmm(x, y, *, implementation):
        return sparse.sampled_matmul(csr, x, y, implementation=implementation).data

    def plain_sddmm(x, y):
        return (x @ y)[rows, columns]

    def two_four(x, values, *, implementation):
        return two_four_matmul(x, weights.with_values(values), implementation=implementation)

    def plain_two_four(x, values):
        return x @ jnp.sum(values[:, :, None] * spread.astype(values.dtype), (0, 1))

    wide = (side, width)
    yield "spmm", spmm, plain_spmm, ((csr.nse,), wide)
    yield "sddmm", sddmm, plain_sddmm, (wide, (width, side))
    yield "two_four", two_four, plain_two_four, ((16, side), (side // 4, 2, width))


CPU_CALLS = ("cpu_csr_sparse_dense_ffi",)  # of Eigen


def check_products(implementations=None, dtypes=BOTH, sizes=(8, 8), **options):
    """NaN where a pattern has no entry counts in the dense reference: no case of theirs."""
    options = {"custom_calls": CPU_CALLS, **options}
    for name, call, plain, shapes in products(*sizes):
        own = (implementations or {"spmm": ["eigen", "xla"]}).get(name, ["xla"])
        op_check(
            call,
            [Case(name, shapes, dtypes=dtypes, poison=())],
            reference=plain,
            implementations=own,
            tolerance=Tolerance(float32=3e-5, bfloat16=3e-2),
            **options,
        )


# --- custom kernels over devices ------------------------------------------------------------------


def check_custom():
    """A sharding rule splits without gathering, gradients too; a wrong one is found."""

    def normalised(x, scale):
        return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True)) * scale[None]

    def own(x, scale):
        # A carry that is replicated at first and differs between devices after one trip.
        scale = jax.lax.fori_loop(0, 1, lambda _, carry: carry + 0.0 * x[0], scale)
        return scale[None] * normalised(x, jnp.ones_like(scale))

    builder = KernelBuilder("split").reference(normalised).implementation("own", own)
    kernel = builder.sharding("n d, d -> n d", replicated=("d",)).batching(Fold(("x",))).build(None)
    shard = by_rows(True, False)
    case = Case("8 x 6", ((8, 6), (6,)), dtypes=ONE, shard=shard)
    op_check(kernel, [case])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    args = place(jnp.ones((8, 6)), ROWS), place(jnp.ones(6), P())
    step = jax.jit(jax.grad(lambda x, s: jnp.sum(jnp.sin(kernel(x, s))), (0, 1)))
    text = step.lower(*args).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert step(*args)[0].sharding.is_equivalent_to(args[0].sharding, 2)

    # Split along the axis that it normalises: every device would see its own part only.
    wrong = builder.sharding("n d, d -> n d").build(None)
    case = dataclasses.replace(
        case, operands=((3, 8), (8,)), shard=((P(None, "devices"), ROWS), P(None, "devices"))
    )
    for broken, words in ((wrong, "over 8 devices"), (normalised, "shard_map over 8 devices")):
        try:
            op_check(broken, [case], reference=normalised, laws=["devices"])
        except AssertionError as found:
            assert words in str(found), found
        else:
            raise SystemExit(f"{broken} passed")


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for check in (
        *(check_norms, check_flash, check_paged, check_write, check_sample),
        *(check_products, check_custom),
    ):
        check()
        print(f"-- {check.__name__} --", flush=True)
