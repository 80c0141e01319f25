"""Scopes are counted where they are, and device time is the device's."""

import csv
import io
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aidx.telemetry.profiler import (
    UNATTRIBUTED,
    Cost,
    DeviceEvent,
    Profiler,
    ProfileReport,
    busy_seconds,
    device_rows,
    line_events,
    profile_scope,
    scope_costs,
    scope_path,
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


@pytest.mark.smoke
def test_device_time_is_found_under_the_names_of_the_code():
    f, x, compiled = program()
    with Profiler(device_trace=True) as profiler:
        with profile_scope("dispatch"):
            out = [compiled(x) for _ in range(3)]
        jax.block_until_ready(out)
    report = profiler.report(programs=[compiled], costs=scope_costs(f, x))
    found = {row.path: row for row in report.device}
    assert {"looped", "single"} <= {path[0] for path in found}
    # Own times, of nested events too, make up the busy time where one thread executes.
    assert sum(row.seconds for row in report.device) >= 0.99 * report.device_busy > 0
    assert found["looped",].seconds > found["single",].seconds
    assert found["looped",].flops == 5 * 2 * 256**3
    assert report.programs[0]["arguments"] == 256 * 256 * 4
    assert "looped" in report.table() and rows(report)["dispatch",].count == 1
    without = {row.path for row in profiler.report().device}
    assert without == {(UNATTRIBUTED,)}  # no program was given


def test_compilation_is_told_apart():
    with Profiler() as profiler:
        with profile_scope("first"):
            jax.jit(lambda x: jnp.sin(x) * 1.2345)(jnp.ones(7))
        with profile_scope("second"):
            pass
    found = rows(profiler.report())
    assert found["first",].compiling > 0 and found["second",].compiling == 0


class Event:
    def __init__(self, op, start, length):
        self.start_ns, self.duration_ns = start, length
        self.stats = [("hlo_op", op), ("hlo_module", "m")] if op else []


def test_own_time_leaves_out_what_ran_within():
    events = [Event("while", 0, 100), Event("dot", 10, 30), Event("dot", 50, 40),
              Event("add", 60, 10), Event("late", 200, 5), Event(None, 0, 300)]  # fmt: skip
    found = line_events(events)
    own = {}
    for event in found:
        own[event.instruction] = own.get(event.instruction, 0) + round(1e9 * event.seconds)
    assert own == {"while": 30, "dot": 60, "add": 10, "late": 5}
    assert busy_seconds(found) == pytest.approx(105e-9)
    assert sum(e.seconds for e in found) == pytest.approx(busy_seconds(found))


def test_a_fused_kernel_is_charged_to_its_root_and_the_rest_is_unattributed():
    text = (
        "HloModule jit_f, x\n"
        '  ROOT %fusion.1 = f32[2]{0} fusion(%x), metadata={op_name="jit(f)/a/b/add" id=1}\n'
        "  %copy.2 = f32[2]{0} copy(%x)\n"
    )
    at = lambda name, s: DeviceEvent("jit_f", name, 0.0, s, s)
    other = DeviceEvent("jit_g", "fusion.1", 0.0, 4.0, 4.0)
    found = device_rows(
        [at("fusion.1", 1.0), at("copy.2", 2.0), other], [text], {("a", "b"): Cost(7)}
    )
    assert [(r.path, r.seconds, r.kernels, r.flops) for r in found] == [
        ((UNATTRIBUTED,), 6.0, 2, None), (("a", "b"), 1.0, 1, 7),
    ]  # fmt: skip
    assert scope_path("jit(step)/jvp(layer_0)/checkpoint/attention/jit(f)/dot") == (
        "layer_0", "attention",
    )  # fmt: skip


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


def report():
    with Profiler() as profiler:
        for name in ("a", "b"):
            with profile_scope(name), profile_scope("<leaf>"):
                pass
    made = profiler.report()
    device = device_rows([DeviceEvent("p", "i", 0.0, 1.0, 1.0)], [], {})
    return ProfileReport(made.seconds, made.host, tuple(device), 1.0, (), made.timeline)


def test_every_format_says_the_same():
    made = report()
    again = ProfileReport.from_json(made.to_json())
    assert (again.host, again.device, again.seconds) == (made.host, made.device, made.seconds)
    table = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert [row["path"] for row in table] == ["a", "a/<leaf>", "b", "b/<leaf>"]
    assert float(table[0]["total"]) == made.host[0].total
    assert "| a/<leaf> | 1 |" in made.to_markdown() and UNATTRIBUTED in made.to_markdown()
    events = json.loads(made.to_chrome_trace())["traceEvents"]
    assert {e["args"]["path"] for e in events} == {"a", "a/<leaf>", "b", "b/<leaf>"}
    assert all(e["dur"] >= 0 and e["ph"] == "X" for e in events)
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
