"""Run by test_flash_sharding.py in a process with eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aidx.ops.flash_attention import FlashAttentionConfig, flash_attention
from aidx.ops.paged_attention import PagedAttentionConfig, paged_attention
from tests.ops import dense

SMALL = FlashAttentionConfig(block_size_q=16, block_size_kv=16)
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
spec = P("data", None, "model", None)
keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (2, 48, 8, 8))
k, v = (jax.random.normal(key, (2, 48, 4, 8)) for key in keys[1:])


def loss(attend, q, k, v):
    return jnp.sum(jnp.sin(attend(q, k, v)))


flash = functools.partial(flash_attention, causal=True, config=SMALL)
gradient = lambda attend: jax.grad(functools.partial(loss, attend), (0, 1, 2))
ref = jax.jit(gradient(lambda *a: dense.attend(*a, causal=True)[0]))(q, k, v)
placed = jax.device_put((q, k, v), NamedSharding(mesh, spec))

step = jax.jit(gradient(flash))
text = step.lower(*placed).compile().as_text()
for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert collective not in text, collective
for a, b in zip(step(*placed), ref, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), a.sharding
print("jit: no collectives")

mapped = jax.shard_map(flash, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
for a, b in zip(jax.jit(gradient(mapped))(*placed), ref, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
print("shard_map: equal")

sinks = jnp.linspace(-1, 1, 8)
ours = lambda q, k, v, sinks: flash_attention(q, k, v, sinks=sinks, causal=True, config=SMALL)
mapped = jax.shard_map(ours, mesh=mesh, in_specs=(*(spec,) * 3, P("model")), out_specs=spec)
theirs = lambda q, k, v, sinks: dense.attend(q, k, v, sinks=sinks, causal=True)[0]
grad = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), 3))(*placed, sinks)
np.testing.assert_allclose(grad(mapped), grad(theirs), atol=1e-5)
print("shard_map: the gradient of what is replicated is summed")

rng = np.random.default_rng(0)
pool = jnp.asarray(rng.normal(size=(9, 4, 4, 8)), jnp.float32)
tables = jnp.asarray(rng.permutation(8).reshape(2, 4))
queries = jnp.asarray(rng.normal(size=(14, 8, 8)), jnp.float32)
small = PagedAttentionConfig(block_size_q=4, chunk_size_kv=8)


def serve(max_q):
    return functools.partial(paged_attention, max_q=max_q, config=small)


heads = (P(None, "model"), P(None, "model"), P(None, "model"), P(), P(), P())
for max_q, indptr in ((1, [0, 1, 2]), (12, [0, 1, 13])):
    rows = (tables, jnp.array([7, 15]), jnp.array(indptr))
    mapped = jax.shard_map(serve(max_q), mesh=mesh, in_specs=heads, out_specs=P(None, "model"))
    args = (queries, pool, pool, *rows)
    np.testing.assert_allclose(jax.jit(mapped)(*args), serve(max_q)(*args), atol=1e-5)
print("shard_map: paged attention over heads equal")

exported = jax.export.export(jax.jit(flash), platforms=("cpu",))(q, k, v)
np.testing.assert_allclose(exported.call(q, k, v), flash(q, k, v), atol=1e-6)
print("export: equal")
