"""Laws of forward: flat = batched = scanned = rematerialised; what is asked for is what comes."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.models import (
    GPT2Config,
    LlamaConfig,
    Model,
    bind_forward,
    init_params,
    param_shapes,
    stack_layers,
    unstack_layers,
)
from aidx.models.llama import runs
from aidx.models.model import is_shape
from aidx.models.sharding import param_shardings, param_specs
from tests.models.golden import dense_attend

LLAMA = LlamaConfig(97, 32, 64, 3, 4, 2, 8, windows=(None, 3, 3), qkv_bias=True, mlp_bias=True)
GPT2 = GPT2Config(97, 32, 64, 3, 4, scale_attn_by_inverse_layer_idx=True)
T = 12
TOKENS = np.random.default_rng(0).integers(0, 97, (2, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
both = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


@pytest.fixture(scope="module")
def params():
    return {c: init_params(c, jax.random.key(1), std=0.2) for c in (LLAMA, GPT2)}


def run(config, params, tokens=TOKENS, positions=POSITIONS, attend=dense_attend, **options):
    static = {k: options.pop(k) for k in ("hidden", "remat") if k in options}
    f = jax.jit(lambda p, t, i, o: bind_forward(config)(p, t, i, attend, (), **static, **o)[0])
    return f(params, tokens, positions, options)


@pytest.mark.smoke
@both
def test_flat_equals_batched_and_logits_at_selects(config, params):
    batched = run(config, params[config])
    flat = run(config, params[config], TOKENS[1], POSITIONS[1], logits_at=jnp.array([11, 4, 4]))
    assert batched.shape == (2, T, 97) and batched.dtype == jnp.float32
    np.testing.assert_allclose(flat, batched[1, np.array([11, 4, 4])], rtol=2e-5, atol=2e-5)


@both
def test_scanned_and_rematerialised_equal_unrolled_with_gradients(config, params):
    def loss(p, remat):
        return (run(config, p, remat=remat) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(params[config], None)
    stacked = stack_layers(params[config])
    scanned, scanned_grads = jax.value_and_grad(loss)(stacked, jax.checkpoint)
    np.testing.assert_allclose(value, scanned, rtol=1e-5)
    chex.assert_trees_all_close(unstack_layers(scanned_grads), grads, rtol=1e-3, atol=1e-5)
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(grads)), "a parameter is unused"


@both
def test_stacking_is_undone_by_unstacking(config, params):
    chex.assert_trees_all_equal(unstack_layers(stack_layers(params[config])), params[config])


@both
def test_hidden_states_unembed_to_the_logits(config, params):
    p = params[config]
    hidden = run(config, p, hidden=True)
    assert hidden.shape == (2, T, 32)
    table = p.get("lm_head", p["embed"])
    np.testing.assert_allclose(
        jnp.einsum("btd,vd->btv", hidden, table), run(config, p), rtol=2e-5, atol=2e-5
    )


def test_attend_sees_each_layer_once_in_order_with_its_options(params):
    seen = []

    def attend(cache, layer, q, k, v, **options):
        seen.append((layer, q.shape, k.shape, options))
        return dense_attend((), layer, q, k, v, **options)[0], cache + 1

    _, cache = bind_forward(LLAMA)(params[LLAMA], TOKENS, POSITIONS, attend, 0)
    assert cache == 3
    q, k = (2, T, 4, 8), (2, T, 2, 8)
    windows = ({"window": None}, {"window": 3}, {"window": 3})
    assert seen == [(i, q, k, w) for i, w in enumerate(windows)]


def test_positions_decide_and_only_earlier_tokens_count(params):
    """Shifting all positions changes nothing under rotary embedding, everything under learned."""
    for config, same in ((LLAMA, True), (GPT2, False)):
        base = run(config, params[config])
        shifted = run(config, params[config], positions=POSITIONS + 5)
        assert np.allclose(base, shifted, rtol=1e-3, atol=1e-3) == same
        later = TOKENS.copy()
        later[:, 8:] = 1
        np.testing.assert_array_equal(run(config, params[config], later)[:, :8], base[:, :8])


def test_bfloat16_stays_near_float32(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params[LLAMA])
    want, got = run(LLAMA, params[LLAMA]), run(LLAMA, half)
    assert got.dtype == jnp.float32
    assert run(LLAMA, half, hidden=True).dtype == jnp.bfloat16
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_equal_configs_share_one_compilation(params):
    f = jax.jit(
        chex.assert_max_traces(lambda forward, p, t, i: forward(p, t, i, dense_attend, ())[0], n=1),
        static_argnums=0,
    )
    for config in (LLAMA, dataclasses.replace(LLAMA)):
        f(Model(config, params[LLAMA]).forward, params[LLAMA], TOKENS, POSITIONS)


@both
def test_random_parameters_follow_the_key_and_the_shapes(config, params):
    again = init_params(config, jax.random.key(1), std=0.2)
    chex.assert_trees_all_equal(again, params[config])
    other = init_params(config, jax.random.key(2), jnp.bfloat16, std=0.2)
    shapes = jax.tree.leaves(param_shapes(config), is_leaf=is_shape)
    assert [x.shape for x in jax.tree.leaves(other)] == shapes
    assert {x.dtype for x in jax.tree.leaves(other)} == {jnp.dtype(jnp.bfloat16)}
    assert not np.array_equal(other["embed"], again["embed"])
    layers = again["layers"]
    assert not np.array_equal(layers[0]["down"], layers[1]["down"])
    assert np.std(again["embed"]) == pytest.approx(0.2, rel=0.1)


def test_what_does_not_go_together_is_refused(params):
    forward, p = bind_forward(LLAMA), params[LLAMA]
    with pytest.raises(ValueError, match=r"tokens.shape=\(2, 12\)"):
        forward(p, TOKENS, POSITIONS[0], dense_attend, ())
    with pytest.raises(ValueError, match="logits_at"):
        forward(p, TOKENS, POSITIONS, dense_attend, (), logits_at=jnp.array([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"windows": (None,)}, "differs from self.num_layers=3"),
        ({"windows": (None, 0, 3)}, "must be positive or None"),
        ({"activation": "x"}, "activation 'x'"),
        ({"max_model_len": -1}, "max_model_len=-1"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_runs_of_windows():
    assert runs((None,) * 4) == [(0, 4)]
    assert runs((4, None, 4, 4)) == [(0, 1), (1, 2), (2, 4)]


# --- devices --------------------------------------------------------------------------------


def test_meshes_that_cannot_hold_a_model_are_refused():
    with pytest.raises(ValueError, match="neither of the axes"):
        param_shardings(LLAMA, jax.make_mesh((1,), ("data",)))
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
    with pytest.raises(ValueError, match="vocab_size=97 does not divide over 2 devices"):
        param_shardings(LLAMA, mesh)


def test_heads_features_and_vocabulary_are_split_and_the_rest_is_whole():
    """Sharded answers are right under any placement, so the placement itself is asserted."""
    every = dataclasses.replace(LLAMA, qk_norm=True, o_bias=True)
    specs = param_specs(every)
    layer = {name: tuple(spec) for name, spec in specs["layers"][0].items()}
    assert layer == {
        "attn_norm": (),
        "qkv": (None, "tensor"),
        "qkv_bias": ("tensor",),
        "q_norm": (),
        "k_norm": (),
        "o": ("tensor",),
        "o_bias": (),
        "mlp_norm": (),
        "gate_up": (None, None, "tensor"),
        "gate_up_bias": (None, "tensor"),
        "down": ("tensor",),
        "down_bias": (),
    }
    assert tuple(specs["embed"]) == tuple(specs["lm_head"]) == ("tensor",)
    assert tuple(specs["norm"]) == ()
    gpt2 = param_specs(GPT2)["layers"][0]
    assert tuple(gpt2["up"]) == (None, "tensor") and tuple(gpt2["up_bias"]) == ("tensor",)
    assert tuple(gpt2["attn_norm"]["scale"]) == ()


SHARDED = """
import os, sys, pathlib, numpy as np, jax
assert jax.device_count() == 4
from aidx.models import load_model
from tests.models.golden import golden_cases, prompt_logits, distance, TOLERANCE
out = pathlib.Path(sys.argv[1])
for name, shape, axes in (("llama_mha", (2, 2), ("data", "tensor")), ("gpt2", (4,), ("model",))):
    case = golden_cases()[name]
    mesh = jax.make_mesh(shape, axes)
    model = load_model(case.write(out / name), mesh=mesh)
    split = model.params["layers"][0]["o"]
    n = shape[-1]
    assert split.addressable_shards[0].data.shape[0] * n == split.shape[0]
    logits = prompt_logits(model.config, model.params, case.tokens)
    assert distance(logits, case) < TOLERANCE, distance(logits, case)
    print(name, "ok")
"""


def test_parameters_spread_over_a_mesh_give_the_same_logits(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2]
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["llama_mha", "ok", "gpt2", "ok"], done.stderr[-2000:]
