"""Scopes are counted where they are, and device time is the device's."""

import csv
import dataclasses
import gc
import gzip
import io
import json
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidx.ops.flash_attention import flash_attention
from aidx.telemetry._device import (
    DeviceEvent,
    Trace,
    busy_seconds,
    device_rows,
    executions,
    line_events,
    read_trace,
    shared,
)
from aidx.telemetry._scopes import scope_path
from aidx.telemetry.profiler import (
    UNATTRIBUTED,
    Cost,
    Peak,
    Profiler,
    ProfileReport,
    profile_scope,
    scope_costs,
)
from aidx.train import fit, init_state, make_train_step


def rows(report):
    return {row.path: row for row in report.host}


@pytest.mark.smoke
def test_scopes_nest_count_and_add_up():
    with Profiler() as profiler:
        for _ in range(3):
            with profile_scope("outer"):
                time.sleep(0.002)
                with profile_scope("inner"):
                    time.sleep(0.004)
                with profile_scope("inner"):
                    pass
    found = rows(profiler.report())
    assert {path: row.count for path, row in found.items()} == {
        ("outer",): 3, ("outer", "inner"): 6,
    }  # fmt: skip
    outer, inner = found["outer",], found["outer", "inner"]
    assert outer.total >= inner.total + 3 * 0.002 and inner.total >= 3 * 0.004
    assert inner.min <= inner.p50 <= inner.p95 <= inner.p99 <= inner.max
    assert outer.mean == pytest.approx(outer.total / 3)
    assert profiler.seconds >= outer.total


def test_threads_have_scopes_of_their_own_and_exceptions_close_them():
    def work(name):
        for _ in range(200):
            with profile_scope(name), profile_scope("leaf"):
                pass

    with Profiler() as profiler:
        threads = [threading.Thread(target=work, args=(n,)) for n in "abcd"]
        [t.start() for t in threads]
        with pytest.raises(KeyError), profile_scope("broken"), profile_scope("deep"):
            raise KeyError
        with profile_scope("after"):
            pass
        [t.join() for t in threads]
    found = rows(profiler.report())
    assert all(found[n, "leaf"].count == found[n,].count == 200 for n in "abcd")
    assert found["broken", "deep"].count == 1 and ("after",) in found
    assert {path[0] for path in found} == {*"abcd", "broken", "after"}


def test_without_a_profiler_nothing_is_kept_and_two_cannot_run():
    with profile_scope("unseen"):
        pass
    with Profiler() as profiler:
        with pytest.raises(RuntimeError, match="is running"):
            Profiler().start()
        profiler.stop()
        with profile_scope("late"):
            pass
    assert profiler.report().host == ()


def program():
    """Two scopes, one of which loops; a function, its argument, the compiled program."""

    def f(x):
        with jax.named_scope("looped"):
            x = jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=5)[0]
        with profile_scope("single"):
            return (x @ x).sum()

    x = jnp.eye(256) * 0.5
    return f, x, jax.jit(f).lower(x).compile()


def one_run(calls=3, **options):
    """A profile of the program above, run so often."""
    jax.clear_caches()  # a trace carries every program of the process: not those of other tests
    gc.collect()
    f, x, compiled = program()
    jax.block_until_ready(compiled(x))
    with Profiler(device_trace=True, **options) as profiler:
        with profile_scope("dispatch"):
            out = [compiled(x) for _ in range(calls)]
        jax.block_until_ready(out)
    return f, x, compiled, profiler


@pytest.mark.smoke
def test_device_time_is_found_under_the_names_of_the_code():
    f, x, _, profiler = one_run()
    report = profiler.report(costs=scope_costs(f, x), peak=Peak(1e12, 1e10))
    found = {row.path: row for row in report.device}
    assert {"looped", "single"} <= {path[0] for path in found}
    # Own times, of nested and of parallel events, make up the busy time.
    assert sum(row.seconds for row in report.device) == pytest.approx(report.device_busy, rel=1e-6)
    assert report.device_busy > 0 and found["looped",].seconds > found["single",].seconds
    assert found["looped",].flops == 3 * 5 * 2 * 256**3 and found["looped",].bytes > 0
    (memory,) = report.programs
    assert memory["arguments"] == 256 * 256 * 4 and memory["peak"] >= memory["arguments"] + 4
    tree = {s.path: s for s in report.scopes()}
    rate = found["looped",].flops / found["looped",].seconds
    assert tree["looped",].of_flops_peak == pytest.approx(rate / 1e12)
    assert tree["looped",].share == pytest.approx(found["looped",].seconds / report.device_busy)
    assert "looped" in report.table() and rows(report)["dispatch",].count == 1
    kernels = json.loads(report.to_chrome_trace())["traceEvents"]
    host = next(e for e in kernels if e["name"] == "dispatch")
    device = [e for e in kernels if e.get("args", {}).get("path", "").startswith("looped")]
    # One clock: nothing ran before it was dispatched.
    assert min(e["ts"] for e in device) >= host["ts"]


def test_a_traces_own_programs_count_their_matmuls_and_bytes():
    _, x, _, profiler = one_run(calls=2)
    found = {row.path: row for row in profiler.report().device}
    assert found["looped",].flops == 2 * 5 * 2 * 256**3
    assert found["single",].flops == 2 * 2 * 256**3
    # Of a product at least the operands and the result, 5 times in each call.
    assert found["looped",].bytes >= 2 * 5 * 2 * x.nbytes


def test_compilation_is_told_apart():
    with Profiler() as profiler:
        with profile_scope("first"):
            jax.jit(lambda x: jnp.sin(x) * 1.2345)(jnp.ones(7))
        with profile_scope("second"):
            pass
    found = rows(profiler.report())
    assert found["first",].compiling > 0 and found["second",].compiling == 0


class Event:
    def __init__(self, op, start, length, name="kernel"):
        self.start_ns, self.duration_ns, self.name = start, length, name
        self.stats = [("hlo_op", op), ("hlo_module", "m"), ("program_id", 3)] if op else []


def test_own_time_leaves_out_what_ran_within():
    events = [Event("while", 0, 100), Event("dot", 10, 30), Event("dot", 50, 40),
              Event("add", 60, 10), Event("late", 200, 5), Event(None, 0, 300)]  # fmt: skip
    found = shared([line_events(events)[0]])
    own = {}
    for event in found:
        own[event.instruction] = own.get(event.instruction, 0) + round(1e9 * event.seconds)
    assert own == {"while": 30, "dot": 60, "add": 10, "late": 5}
    assert busy_seconds(found) == pytest.approx(105e-9)
    assert sum(e.seconds for e in found) == pytest.approx(busy_seconds(found))
    with_copies = line_events(events, "/device:GPU:0", every=True)[0]
    assert [e.instruction for e in with_copies if not e.program] == ["kernel"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6), max_size=3))
def test_shares_of_streams_that_overlap_make_up_the_busy_time(streams):
    lines = []
    for stream in streams:  # one after another in a stream, each with another within
        at, found = 0, []
        for gap, length in stream:
            found.append(DeviceEvent("p", "outer", at + gap, at + gap + 3.0 * length, 0.0))
            found.append(DeviceEvent("p", "inner", at + gap + 1.0, at + gap + 1.0 + length, 0.0))
            at += gap + 3 * length
        lines.append(found)
    events = shared(lines)
    assert len(events) == sum(map(len, lines)) and all(e.seconds >= 0 for e in events)
    assert sum(e.seconds for e in events) == pytest.approx(busy_seconds(events))


def test_busy_time_of_two_devices_adds_up():
    one = DeviceEvent("p", "a", 0.0, 2.0, 2.0, device="0")
    assert busy_seconds([one, dataclasses.replace(one, device="1")]) == 4.0


def test_a_fused_kernel_is_charged_to_its_root_and_the_rest_is_unattributed():
    text = (
        "HloModule jit_f, x\n"
        '  ROOT %fusion.1 = f32[2]{0} fusion(%x), metadata={op_name="jit(f)/a/b/add" id=1}\n'
        "  %copy.2 = f32[2]{0} copy(%x)\n"
    )
    at = lambda name, s, kernel="": DeviceEvent("jit_f", name, 0.0, s, s, kernel=kernel)
    other = DeviceEvent("jit_g", "fusion.1", 0.0, 4.0, 4.0)
    # Kernels of a command buffer carry its name, and their own.
    graph = [at("command_buffer_1", 0.5, "fusion_1"), at("command_buffer_1", 0.25, "nvjet")]
    trace = Trace((at("fusion.1", 1.0), at("copy.2", 2.0), other, *graph))
    found = device_rows(trace, [text], {("a", "b"): Cost(7)}, calls=2)
    assert [(r.path, r.seconds, r.kernels, r.flops) for r in found] == [
        ((UNATTRIBUTED,), 6.25, 3, 0.0), (("a", "b"), 1.5, 2, 14),
    ]  # fmt: skip
    assert scope_path("jit(step)/jvp(layer_0)/checkpoint/attention/jit(f)/dot") == (
        "layer_0", "attention",
    )  # fmt: skip
    backward = (
        "jit(s)/transpose(jvp(layer_1))/attention/jit(_jit_call)/cond/branch_0_fun/k/mpmd_map"
    )
    assert scope_path(backward) == ("backward", "layer_1", "attention", "k")


def test_operations_of_a_training_step_are_three_times_the_forwards():
    def loss(w, x):
        with jax.named_scope("layer"):
            return (x @ w).sum()

    w, x = jnp.ones((8, 16)), jnp.ones((4, 8))
    forward = scope_costs(loss, w, x)["layer",].flops
    both = scope_costs(jax.grad(loss, (0, 1)), w, x)
    assert forward == 2 * 4 * 8 * 16
    assert sum(cost.flops for cost in both.values()) == 3 * forward
    assert both["backward", "layer"].flops == 2 * forward


@pytest.mark.smoke
def test_kernels_count_by_formula_and_a_scan_as_often_as_it_runs():
    B, T, N, K, H = 2, 8, 4, 2, 16
    q, k = jnp.zeros((B, T, N, H)), jnp.zeros((B, T, K, H))

    def loss(q, k, causal=True):
        body = lambda q, _: (flash_attention(q, k, k, causal=causal), None)
        with jax.named_scope("layer"):
            return jax.lax.scan(body, q, length=3)[0].sum()

    pairs = B * N * T * (T + 1) // 2
    forward = sum(c.flops for c in scope_costs(loss, q, k).values())
    assert forward == 3 * 4 * H * pairs
    assert sum(c.flops for c in scope_costs(lambda q, k: loss(q, k, False), q, k).values()) == (
        3 * 4 * H * B * N * T * T
    )
    both = scope_costs(jax.grad(loss), q, k)
    assert sum(c.flops for c in both.values()) == 3 * (4 + 10) * H * pairs
    assert both["layer", "flash_attention_fwd"].flops == forward
    assert both["backward", "layer", "flash_attention_bwd"].flops == 3 * 10 * H * pairs
    assert both["layer", "flash_attention_fwd"].bytes >= 3 * (2 * q.nbytes + 2 * k.nbytes)


def test_memory_is_what_the_scopes_ends_saw(monkeypatch):
    seen = iter([10, 15, 25, 30])  # in: outer, inner; out: inner, outer
    monkeypatch.setattr("aidx.telemetry.profiler.live_bytes", lambda device: next(seen))
    with Profiler() as profiler, profile_scope("outer"), profile_scope("inner"):
        held = bytearray(64 << 20)
        held[::4096] = b"x" * len(held[::4096])
    found = rows(profiler.report())
    inner, outer = found["outer", "inner"], found["outer",]
    assert (inner.live_before, inner.live_after, inner.grown) == (15, 25, 10)
    assert (outer.live_before, outer.live_after, outer.grown) == (10, 30, 20)
    assert inner.host_grown > 32 << 20 and profiler.report().host_peak > inner.host_grown
    with Profiler(memory=False) as profiler, profile_scope("outer"):
        pass
    assert profiler.report().host_peak == 0


def report():
    with Profiler() as profiler:
        for name in ("a", "b"):
            with profile_scope(name), profile_scope("<leaf>"):
                pass
    made = profiler.report()
    device = device_rows(Trace((DeviceEvent("p", "i", 0.0, 1.0, 1.0),)))
    return dataclasses.replace(made, device=tuple(device), device_busy=1.0, peak=Peak(2.0, 3.0))


def test_every_format_says_the_same():
    made = report()
    again = ProfileReport.from_json(made.to_json())
    assert (again.host, again.device, again.seconds) == (made.host, made.device, made.seconds)
    assert again.peak == made.peak
    table = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert [row["path"] for row in table] == ["a", "a/<leaf>", "b", "b/<leaf>", UNATTRIBUTED]
    assert [row["kind"] for row in table] == ["host"] * 4 + ["device"]
    assert float(table[0]["total"]) == made.host[0].total
    assert "| a/<leaf> | 1 |" in made.to_markdown() and UNATTRIBUTED in made.to_markdown()
    events = json.loads(made.to_chrome_trace())["traceEvents"]
    scopes = [e for e in events if e["ph"] == "X"]
    assert {e["args"]["path"] for e in scopes} == {"a", "a/<leaf>", "b", "b/<leaf>"}
    assert all(e["dur"] >= 0 for e in scopes)
    page = made.to_html()
    assert "&lt;leaf&gt;" in page and "<leaf>" not in page and page.count("<h3>") == 2
    assert "<leaf>" in made.table() and "100.0%" in made.table()


def test_a_comparison_fails_where_something_became_slower():
    then = report()
    slower = [r if r.path != ("a",) else r.__class__(**(vars(r) | {"p50": 2 * r.p50}))
              for r in then.host]  # fmt: skip
    now = ProfileReport(then.seconds, tuple(slower), then.device, 1.0)
    found = now.compare(then, tolerance=0.5)
    assert found.exit_code == 1 and "host a:" in str(found) and len(found.slower) == 1
    assert then.compare(then).exit_code == 0 and now.compare(then, tolerance=1.5).exit_code == 0
    with pytest.raises(ValueError, match="tolerance=-1"):
        then.compare(then, -1)


def test_fit_is_hooked():
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda p, x, key: (((p - x) ** 2).sum(), x.size), optimizer)
    state = init_state(jnp.zeros(3), optimizer, jax.random.key(0))
    with Profiler() as profiler:
        fit(step, state, lambda i: np.ones(3, np.float32), steps=4,
            evaluate=lambda s: {"loss": 0.0})  # fmt: skip
    counts = {path: row.count for path, row in rows(profiler.report()).items()}
    assert counts == {("step",): 4, ("read",): 4, ("data",): 5, ("evaluate",): 1}


# --- traces of an H200, recorded by record_trace.py -----------------------------------------------

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three training steps of a small model: kernels one by one, and in command buffers."""
    found = {}
    for name in ("step", "graph"):
        folder = tmp_path_factory.mktemp(name)
        packed = (DATA / f"{name}.xplane.pb.gz").read_bytes()
        (folder / "host.xplane.pb").write_bytes(gzip.decompress(packed))
        found[name] = read_trace(folder)
    return found


@pytest.mark.smoke
def test_scopes_of_a_gpus_trace_add_up_to_its_busy_time(recorded):
    for trace in recorded.values():
        rows, busy = device_rows(trace), busy_seconds(trace.events)
        assert busy > 1e-3 and sum(r.seconds for r in rows) == pytest.approx(busy, rel=0.01)
        assert sum(r.kernels for r in rows) == len(trace.events) == 576
    rows = {r.path: r for r in device_rows(recorded["step"])}
    assert rows[UNATTRIBUTED,].seconds < 0.05 * busy_seconds(recorded["step"].events)
    for layer in ("layer_0", "layer_1"):
        forward = rows["gradient", layer, "attention", "flash_attention_fwd"]
        backward = rows["backward", "gradient", layer, "attention", "flash_attention_bwd"]
        assert forward.kernels == 3 and backward.seconds > forward.seconds > 0
    assert {"clip", "optimizer", "metrics"} <= {path[0] for path in rows}
    assert executions(recorded["step"]) == {14582: 3}


def test_matmuls_of_a_gpus_programs_are_counted(recorded):
    T, D, F, V, N, K, H, L = 2 * 512, 256, 512, 4096, 4, 2, 64, 2
    layers = L * (D * (N + 2 * K) * H + N * H * D + 3 * D * F)
    forward_and_backward = 3 * 2 * T * (layers + V * D)
    rows = device_rows(recorded["step"])
    assert sum(r.flops or 0 for r in rows) == 3 * forward_and_backward
    rows = {r.path: r for r in rows}
    assert rows["gradient", "cross_entropy", "unembed"].flops == 3 * 2 * T * V * D
    # An AdamW step reads weights, moments and gradient and writes three of them.
    parameters = layers + V * D + (2 * L + 1) * D
    assert rows["optimizer",].bytes == pytest.approx(3 * 26 * parameters, rel=0.2)


def test_in_command_buffers_fusions_are_found_by_their_kernels(recorded):
    rows = {r.path: r for r in device_rows(recorded["graph"])}
    for scope in ("clip", "optimizer", "metrics"):
        one_by_one = {r.path: r for r in device_rows(recorded["step"])}[scope,]
        assert rows[scope,].seconds == pytest.approx(one_by_one.seconds, rel=0.2)
    assert 0.1 < rows[UNATTRIBUTED,].seconds / busy_seconds(recorded["graph"].events) < 0.3
