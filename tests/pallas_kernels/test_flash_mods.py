"""Dropout, score_mod, mask_mod and block masks of the flash kernels, in the GPU interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention as fa
from pallas_kernels.dropout import dropout_rows
from tests.pallas_kernels.test_flash import BF16, arrays, causal, full, relative

B, T, S, N, K, H = 1, 72, 100, 2, 1, 64


def words(batch=B, heads=N, queries=T):
    b, n, t = (jnp.arange(size) for size in (batch, heads, queries))
    key = jax.random.key_data(jax.random.key(5))[-2:]
    return dropout_rows(key, b[:, None, None], n[None, :, None], t[None, None])


def split(f, scored, *captured, sizes=(B, N, T, S)):
    """(Split, Modifier) of a scalar function that closes over `captured`."""
    index = jnp.int32(0)
    closed = jax.make_jaxpr(f)(*(jnp.float32(0),) * scored, *(index,) * 4)
    parts = fa.split(closed.jaxpr, scored, sizes)
    return fa.Modifier(parts.program, parts.arrays(closed.consts))


key = jax.random.key(3)
slopes = jnp.array([0.3, 0.1])
doc_q, doc_k = jnp.arange(T) // 30, jnp.arange(S) // 30
table = jax.random.normal(key, (N, S))
bias = jax.random.normal(key, (1, N, T, S), BF16)

MODS = {
    "alibi": lambda x, b, n, t, s: x - slopes[n] * jnp.abs(t - s),
    "cap": lambda x, b, n, t, s: 3.0 * jnp.tanh(x / 3.0),
    "hides": lambda x, b, n, t, s: jnp.where(s <= t + 20, x + table[n, s], -jnp.inf),
    "integers": lambda x, b, n, t, s: x * jnp.where((t // 7 + s) % 3 == 0, 0.5, 1.0) + (t > s),
}
MASKS = {
    "documents": lambda b, n, t, s: doc_q[t] == doc_k[s],
    "not": lambda b, n, t, s: ~((s > t) & (s < t + 30 * (n + 1))),
}


def kinds(mask, block_q, block_kv, heads=1):
    """The block mask of a mask_mod, written out."""
    at = jax.vmap(jax.vmap(jax.vmap(mask, (None, None, None, 0)), (None, None, 0, None)),
                  (None, 0, None, None))  # fmt: skip
    seen = np.asarray(at(0, jnp.arange(heads), jnp.arange(T), jnp.arange(S)))
    rows, columns = -(-T // block_q), -(-S // block_kv)
    out = np.zeros((1, heads, rows, columns), np.int8)
    for n, i, j in np.ndindex(heads, rows, columns):
        part = seen[n, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        out[0, n, i, j] = int(part.any()) + int(part.all())
    return fa.BlockKinds(jnp.asarray(out), block_q, block_kv, T, S)


def bias_modifier(x=bias, kind="tile"):
    program = fa.scalar_program(lambda score, t, s, x: score + x, [kind], [jnp.float32])
    return fa.Modifier(program, (x,))


def options(name):
    lens = fa.dynamic_bounds(causal, T, S, kv_lens=jnp.array([83]))
    return {
        "dropout": dict(band=causal, dropout=fa.Dropout(0.3, words())),
        "alibi": dict(band=causal, score=split(MODS["alibi"], True)),
        "cap": dict(band=full, score=split(MODS["cap"], True), soft_cap=9.0),
        "hides": dict(band=full, score=split(MODS["hides"], True)),
        "integers": dict(band=full, score=split(MODS["integers"], True)),
        "documents": dict(band=causal, mask=split(MASKS["documents"], False)),
        "not": dict(band=full, bounds=lens, mask=split(MASKS["not"], False)),
        "blocks": dict(
            band=fa.Band(right=5),
            mask=split(MASKS["documents"], False),
            blocks=kinds(MASKS["documents"], 32, 48),
        ),
        "blocks of heads": dict(
            band=full, mask=split(MASKS["not"], False), blocks=kinds(MASKS["not"], 16, 16, 2),
            dropout=fa.Dropout(0.2, words()), score=bias_modifier(),
        ),
        "bias": dict(band=causal, score=bias_modifier()),
    }[name]  # fmt: skip


NAMES = ("dropout", "alibi", "cap", "hides", "integers", "documents", "not", "blocks",
         "blocks of heads", "bias")  # fmt: skip


def quick(names, chosen):
    """The other names are slow tests: the interpreter compiles for seconds."""
    return [pytest.param(n, marks=() if n in chosen else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", quick(NAMES, ("not", "blocks")))
def test_forward(name):
    q, k, v, _ = arrays(B, T, S, N, K, H, H)
    given = options(name)
    config = fa.ForwardConfig(block_kv=64, consumers=1)
    out, lse = fa.flash_attention_fwd(q, k, v, scale=0.2, config=config, interpret=True, **given)
    want, want_lse = fa.reference(q, k, v, scale=0.2, **given)
    assert relative(out.astype(jnp.float32), want) < 4e-3
    np.testing.assert_allclose(lse, want_lse, atol=2e-4)


@pytest.mark.parametrize("name", quick(["blocks", "blocks of heads"], ("blocks of heads",)))
def test_listed_blocks_longest_first(name):
    q, k, v, _ = arrays(B, T, S, N, K, H, H)
    given = options(name)
    config = fa.ForwardConfig(
        block_kv=64, consumers=1, persistent=True, longest_first=True, num_sms=2
    )
    out, lse = fa.flash_attention_fwd(q, k, v, scale=0.2, config=config, interpret=True, **given)
    want, want_lse = fa.reference(q, k, v, scale=0.2, **given)
    assert relative(out.astype(jnp.float32), want) < 4e-3
    np.testing.assert_allclose(lse, want_lse, atol=2e-4)


def both(name, wanted=(), deterministic=False, config=None, head_dim=H):
    """(gradients of the kernel, of the oracle)."""
    q, k, v, do = arrays(B, T, S, N, K, head_dim, head_dim)
    given = options(name)
    f32 = [x.astype(jnp.float32) for x in (q, k, v)]
    score = given.get("score")

    def oracle(q, k, v, *chosen):
        if not wanted:
            return fa.reference(q, k, v, scale=0.2, **given)
        full = list(score.arrays)
        for i, x in zip(wanted, chosen, strict=True):
            full[i] = x
        changed = given | {"score": fa.Modifier(score.program, tuple(full))}
        return fa.reference(q, k, v, scale=0.2, **changed)

    chosen = [score.arrays[i].astype(jnp.float32) for i in wanted]
    (out, lse), pull = jax.vjp(oracle, *f32, *chosen)
    want = pull((do.astype(jnp.float32), jnp.zeros_like(lse)))
    got = fa.flash_attention_bwd(
        q, k, v, out.astype(BF16), lse, do, scale=0.2, interpret=True, wanted=wanted,
        deterministic=deterministic, config=config, **given,
    )  # fmt: skip
    return (*got[:3], *got.score), want


CONFIG = fa.BackwardConfig(consumers=1)


@pytest.mark.parametrize("name", quick(NAMES, ("dropout", "hides")))
def test_backward(name):
    for got, want in zip(*both(name, config=CONFIG), strict=True):
        assert relative(got.astype(jnp.float32), want) < 1e-2


@pytest.mark.parametrize("name", quick(["dropout", "blocks of heads"], ()))
def test_the_repeatable_backward(name):
    for got, want in zip(*both(name, deterministic=True), strict=True):
        assert relative(got.astype(jnp.float32), want) < 1e-2


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", quick(["cap", "bias", "blocks of heads"], ("cap",)))
def test_a_step_of_128_queries_in_pieces(name, deterministic):
    config = fa.BackwardConfig(block_q=128)
    for got, want in zip(*both(name, (), deterministic, config), strict=True):
        assert relative(got.astype(jnp.float32), want) < 1e-2


@pytest.mark.parametrize("name", quick(["dropout", "cap", "blocks of heads"], ("dropout",)))
def test_wide_heads(name):
    config = fa.BackwardConfig(split="columns", stages=1, do_stages=1)
    for got, want in zip(*both(name, config=config, head_dim=128), strict=True):
        assert relative(got.astype(jnp.float32), want) < 1e-2


@pytest.mark.parametrize("name", quick(["alibi", "hides", "blocks of heads"], ("alibi",)))
def test_arrays_of_a_score_mod_get_gradients(name):
    got, want = both(name, (0,), config=CONFIG)
    assert got[3].shape == want[3].shape
    assert relative(got[3], want[3]) < 1e-2
