"""The record of what may be timed in a user's process, and the cases of aidx's own kernels."""

import importlib
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

import aidx.kernels.fused
import aidx.ops.flash_attention
import aidx.ops.paged_attention
import aidx.ops.sparse_kernels
from aidx.ops import _flash_peers, _kernel_store, autotune
from aidx.ops.autotune import store, tunable
from aidx.ops.autotune.tunable import case_of, code_hash, config_text, get
from tests.ops.toy_tunables import TOY

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
OWN = (
    "flash_attention/forward",
    "flash_attention/backward",
    "paged_attention/forward",
    "spmm/rows",
    "spmm/vector",
    "spmm/blocks",
)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("gate_tuning", SCRIPTS / "gate_tuning.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))


def test_the_record_holds_what_compiled_without_problems(script, monkeypatch):
    said = []

    def problems_of(f, operands):
        jax.eval_shape(f, *operands)
        return ["8 B spilled"] if f.args == (2,) else []

    monkeypatch.setitem(tunable._TUNABLES, TOY.name, TOY)
    rows = script.passed(TOY, problems_of, said.append)
    code, (operands, static) = code_hash(TOY.sources), case_of(TOY, "n=8")
    family = TOY.family_text(operands, static)
    assert rows == {("toy/scale", code, family, text) for text in ("1", "4", "5")}
    assert any("3: NotImplementedError" in line for line in said)
    said.clear()
    assert script.passed(TOY, problems_of, said.append, known=rows) == rows
    assert len(said) == 2  # what has not passed
    assert script.stale([TOY], rows) == []
    assert script.stale([TOY], {("toy/scale", "other code", family, "1")}) == ["toy/scale"]


def test_the_shipped_record_and_tables_can_be_read():
    store._gate.cache_clear()
    assert isinstance(store._gate(), frozenset)
    for entry in store.shipped().entries:
        assert get(entry.op) and entry.device.startswith("NVIDIA")


def test_a_call_takes_the_table_that_ships():
    """At a shape that was timed on an H200, and there alone."""
    tunable = get("residual_rms_norm/mosaic_gpu")
    (text,) = tunable.shapes
    operands, static = case_of(tunable, text)
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], 2048), x.dtype), operands)
    with autotune.mode(device="NVIDIA H200", cache=None), autotune.recording() as seen:
        for given in (operands, other):
            autotune.choose(tunable, given, static)
    assert [choice.source for choice in seen] == ["shipped", "default"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", OWN)
def test_the_candidates_of_a_kernel_are_distinct_and_named(name):
    tunable = get(name)
    keys = set()
    for text in tunable.shapes:
        operands, static = case_of(tunable, text)
        names = [config_text(c) for c in tunable.candidates(*operands, **static)]
        assert len(names) > 1 and len(set(names)) == len(names)
        keys.add(tunable.key_text(operands, static))
    assert len(keys) == len(tunable.shapes)
    with pytest.raises(ValueError, match=r"no sizes of|names no shapes of"):
        case_of(tunable, f"{tunable.shapes[0]} colour=3")
    with pytest.raises(ValueError, match="names no shapes of"):
        case_of(tunable, "N=3")


def test_the_doors_call_is_the_case_that_was_tuned(monkeypatch):
    """What `aidx tune --shapes` names is what a call of the door looks up."""
    monkeypatch.setattr(_kernel_store, "directory", lambda: None)  # a kept kernel asks nobody
    (ops,), static = case_of(get("flash_attention/forward"), "B=2 T=64 N=4 K=2 H=64 causal")
    x = [jax.numpy.zeros(a.shape, a.dtype) for a in ops[:3]]
    with autotune.mode(device="NVIDIA H200", cache=None), autotune.recording() as seen:
        f = jax.jit(lambda q, k, v: aidx.ops.flash_attention.flash_attention(q, k, v, causal=True))
        f.trace(*x).lower(lowering_platforms=("cuda",))
    asked = [c for c in seen if c.op == "flash_attention/forward"]
    assert asked and asked[0].source == "default"
    key = get("flash_attention/forward").key_text((ops,), static)
    timed = autotune.Measurement(config_text(asked[0].config), seconds=1.0)
    entry = autotune.Entry("flash_attention/forward", "NVIDIA H200", "", "", key, (timed,))
    with (
        autotune.mode(device="NVIDIA H200", cache=None),
        autotune.Tuning((entry,)),
        autotune.recording() as seen,
    ):
        f.trace(*x).lower(lowering_platforms=("cuda",))
    assert "pinned" in {c.source for c in seen if c.op == "flash_attention/forward"}


@pytest.mark.parametrize(
    "text",
    [
        "B=2 T=4096 N=8 K=2 H=128 causal",  # heads that share keys, below and above LONG
        "T=8192 N=8 K=2 H=128 causal",
        "T=64 S=16384 N=8 K=2 H=128 causal",
        "T=4096 N=8 H=128 causal",
        "T=4096 N=8 K=2 H=128",
        "T=4096 N=8 K=2 H=128 window=256 causal",
        "T=4096 N=8 K=2 H=128 soft_cap=30.0 causal",
        "T=512 N=4 H=64 causal",
        "T=512 N=4 H=80 Hv=256",
    ],
)
def test_the_tuners_default_is_what_the_kernels_choose(text, monkeypatch):
    """A call that nobody timed runs in the first candidate: what the heuristics say."""
    attention = importlib.import_module("pallas_kernels.flash_attention.attention")

    class Taken(Exception):
        pass

    def take(*operands, config, **rest):
        raise Taken(config)

    for name, run in (("forward", _flash_peers.run_forward), ("backward", _run_backward)):
        tunable = get(f"flash_attention/{name}")
        operands, static = case_of(tunable, text)
        monkeypatch.setattr(attention, name, take)
        with pytest.raises(Taken) as caught:
            jax.eval_shape(lambda *arrays, run=run, spec=static["spec"]: run(spec, *arrays, None),
                           *operands)  # fmt: skip
        assert tunable.candidates(*operands, **static)[0] == caught.value.args[0]


def _run_backward(spec, ops, outputs, d_out, config):
    return _flash_peers.run_backward(spec, ops, outputs, (d_out, None), config)


def test_a_paged_case_gives_every_row_its_blocks():
    tunable = get("paged_attention/forward")
    operands, static = case_of(tunable, "R=3 n=4 ctx=40 N=4 K=2 H=16 block=16")
    (ops,) = tunable.inputs(np.random.default_rng(0), *operands, **static)
    blocks = np.asarray(ops.block_tables).ravel()
    assert len(set(blocks)) == 9 and blocks.max() < ops.k_pool.shape[0]
    assert ops.context_lens.tolist() == [48] * 3 and ops.q_indptr.tolist() == [0, 4, 8, 12]
    # a step that decodes beside a prompt: one row has many tokens, the others one
    mixed = operands[0]._replace(q=jax.ShapeDtypeStruct((6, 4, 16), ops.q.dtype))
    (ops,) = tunable.inputs(np.random.default_rng(0), mixed, **static)
    assert ops.q_indptr.tolist() == [0, 4, 5, 6]
    assert tunable.reference(ops, **static).shape == (6, 4, 16)


@pytest.mark.parametrize("order", ["", " order"])
@pytest.mark.parametrize("turned", ["", " turned"])
def test_the_reference_of_blocks_is_the_dense_product(order, turned):
    tunable = get("spmm/blocks")
    text = f"M=12 N=8 n=5 block=4 nse=5 dtype=float32{order}{turned}"
    operands, static = case_of(tunable, text)
    made = tunable.inputs(np.random.default_rng(0), *operands, **static)
    data, x, minor, indptr, place = (None if a is None else np.asarray(a) for a in made)
    dense = np.zeros((12, 8), np.float64)
    for row in range(3):
        for e in range(indptr[row], indptr[row + 1]):
            block = data[e if place is None else place[e]]
            at = slice(4 * row, 4 * row + 4), slice(4 * minor[e], 4 * minor[e] + 4)
            dense[at] += block.T if turned else block
    np.testing.assert_allclose(tunable.reference(*made, **static), dense @ x, atol=1e-5)


def test_the_reference_of_rows_is_the_dense_product():
    tunable = get("spmm/rows")
    operands, static = case_of(tunable, "M=5 N=7 nse=11 n=2")
    made = tunable.inputs(np.random.default_rng(0), *operands, **static)
    data, x, row, column, indptr = map(np.asarray, made)
    assert indptr.tolist() == np.searchsorted(row, np.arange(6)).tolist()
    dense = np.zeros((5, 7))
    np.add.at(dense, (row, column), data)
    np.testing.assert_allclose(tunable.reference(*made, **static), dense @ x, atol=1e-5)
    vector = get("spmm/vector")
    assert case_of(vector, "M=5 N=7 nse=11")[0][1].shape == (7,)
    got = vector.reference(data, x[:, 0], row, column, indptr)
    np.testing.assert_allclose(got, dense @ x[:, 0], atol=1e-5)
