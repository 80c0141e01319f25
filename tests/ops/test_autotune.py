"""The tuner in one process: the order of choice, what a timing is known by, what may win."""

import concurrent.futures
import dataclasses
import json
import runpy
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops import autotune, registry
from aidx.ops.autotune import Entry, Measurement, NotTuned, Tuning, choice, store, trial
from aidx.ops.autotune.tunable import Tunable, code_hash, config_text
from tests.ops.toy_tunables import TOY

X = jnp.arange(8.0)


class Clock:
    """`seconds` of each configuration; knows what it was asked."""

    def __init__(self, **seconds):
        self.seconds = {int(name[1:]): value for name, value in seconds.items()}
        self.asked = []

    def __call__(self, trial, config):
        if config not in self.asked:
            self.asked.append(config)
        return self.seconds[config]


@pytest.fixture
def clock():
    return Clock(c1=3.0, c2=2.0, c4=1.0)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A disk cache of one's own, read as by a new process; no shipped tables."""
    monkeypatch.setattr(store, "_read", {})
    monkeypatch.setattr(store, "shipped", Tuning)
    with autotune.mode("off", cache=str(tmp_path)) as settings:
        yield settings


def chosen(tunable=TOY, x=X, **options):
    with autotune.recording() as seen:
        config = autotune.choose(tunable, (x,), **options)
    assert seen[0].config == config
    return config, seen[0].source


def place(tunable=TOY, x=X, device="cpu"):
    key = tunable.key_text((x,), {})
    return (tunable.name, device, jax.__version__, code_hash(tunable.sources), key)


def table(config, *, code="another version", device="cpu", seconds=1.0):
    name, _, version, _, key = place()
    timed = (Measurement(config_text(config), seconds=seconds),)
    return Tuning((Entry(name, device, version, code, key, timed),))


# --- the order of choice -------------------------------------------------------------------------


@pytest.mark.smoke
def test_each_source_comes_before_the_next(alone, clock, monkeypatch):
    assert chosen() == (1, "default")
    monkeypatch.setattr(store, "shipped", lambda: table(2))
    assert chosen() == (2, "shipped")
    with autotune.mode("on", timer=clock):
        assert chosen() == (4, "tuned")
        assert chosen() == (4, "disk cache")
    assert sorted(clock.asked) == [1, 2, 4]
    assert chosen() == (4, "disk cache")  # in the mode "off" as well
    with table(1):
        assert chosen() == (1, "pinned")
        with table(2):
            assert chosen() == (2, "pinned")
            assert chosen(explicit=4) == (4, "explicit")
        assert chosen() == (1, "pinned")
    assert chosen() == (4, "disk cache")


def test_cached_only_makes_a_miss_an_error(alone, clock):
    with autotune.mode("cached-only"):
        with pytest.raises(
            NotTuned, match=r"nobody has timed toy/scale at .*float32\[8\].* on cpu"
        ):
            chosen()
        with table(2):
            assert chosen() == (2, "pinned")
        assert not isinstance(NotTuned(), NotImplementedError)  # the next implementation is no cure
    with autotune.mode("on", timer=clock):
        chosen()
    with autotune.mode("cached-only"):
        assert chosen() == (4, "disk cache")


def test_a_table_of_another_device_or_of_no_candidate_is_passed_over(alone):
    with table(2, device="NVIDIA H200"), table(6):
        assert chosen() == (1, "default")
        with autotune.mode(device="NVIDIA H200"):
            assert chosen() == (2, "pinned")
    # 4 pieces are no candidate for 3 elements, though a table says so
    small = jnp.zeros(3)
    entry = Entry(*place(x=small), (Measurement("4", seconds=1.0),))
    with Tuning((entry,)):
        assert chosen(x=small) == (1, "default")


def test_what_cannot_be_named_or_run_here_takes_the_default(alone, clock):
    gpu = dataclasses.replace(TOY, name="toy/gpu", platforms=("cuda",))
    with autotune.mode("on", timer=clock):
        assert chosen(gpu) == (1, "default")
        with autotune.recording() as seen:
            autotune.choose(TOY, (X,), {"factor": print})
        assert seen[0].reason == "a static argument has no lasting name"
        assert chosen(x=jnp.zeros(1)) == (1, "default")  # the only candidate
    assert clock.asked == []
    nothing = dataclasses.replace(TOY, candidates=lambda x: ())
    with pytest.raises(NotImplementedError, match="no configuration of toy/scale fits"):
        chosen(nothing)


def test_an_operand_that_is_absent_is_part_of_the_key():
    one, two = TOY.key_text((X, None), {}), TOY.key_text((X, X), {})
    assert one == '{"operands": ["float32[8]", "none"]}' and one != two


def test_modes_and_their_mistakes(monkeypatch):
    with pytest.raises(ValueError, match=r"one of .*, not 'fast'"), autotune.mode("fast"):
        pass
    monkeypatch.setenv("AIDX_AUTOTUNE", "cached-only")
    monkeypatch.setenv("AIDX_TUNING_CACHE", "")
    assert autotune.settings() == autotune.Settings("cached-only", cache=None)
    monkeypatch.setenv("AIDX_TUNING_CACHE", "elsewhere")
    assert autotune.settings().cache == "elsewhere"


# --- what is timed, and what may win -------------------------------------------------------------


@pytest.mark.smoke
def test_only_a_right_result_may_win_and_failures_are_kept(alone):
    clock = Clock(c1=3.0, c2=2.0, c4=2.5, c5=0.1)  # 5 is the fastest, and wrong
    with autotune.mode("on", timer=clock):
        assert chosen() == (2, "tuned")
    entry = store.read(alone.cache, place())
    failures = {m.config: m.failure for m in entry.measurements if m.failure}
    assert failures["3"] == "refused: three pieces do not fit"
    assert failures["5"].startswith("wrong: error 0.5")
    assert 5 not in clock.asked


def test_a_new_configuration_is_the_only_one_timed_anew(alone, clock):
    few = dataclasses.replace(TOY, candidates=lambda x, **static: (1, 2))
    with autotune.mode("on", timer=clock):
        assert chosen(few) == (2, "tuned")
        assert chosen(TOY) == (4, "tuned")  # 3, 4 and 5 are new
    assert clock.asked == [1, 2, 4]


@pytest.mark.parametrize("what", ["code", "shape", "dtype", "device", "jax", "static"])
def test_a_timing_is_known_by(alone, clock, monkeypatch, what):
    with autotune.mode("on", timer=clock):
        chosen()
    x, options = X, {}
    if what == "code":
        monkeypatch.setattr(choice, "code_hash", lambda sources: "new code")
    elif what == "shape":
        x = jnp.zeros(16)
    elif what == "dtype":
        x = X.astype(jnp.bfloat16)
    elif what == "device":
        options["device"] = "another"
    elif what == "jax":
        monkeypatch.setattr(choice.jax, "__version__", "9.9")
    with autotune.mode(**options):
        static = {"factor": 3.0} if what == "static" else {}
        assert autotune.choose(TOY, (x,), static) == 1


def test_the_hash_of_code_ignores_comments_and_sees_the_rest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for text in ("x = 1\n", "x = 1  # one\n\n\n", "x = 2\n"):
        (tmp_path / "some_kernel.py").write_text(text)
        code_hash.cache_clear()
        hashes.append(code_hash(("some_kernel",)))
    code_hash.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_function_without_a_module_is_hashed_by_its_file_or_its_code(tmp_path):
    """The module of what runpy or exec ran cannot be imported."""
    file, hashes = tmp_path / "kernel.py", []
    for text in ("f = lambda x: x * 2\n", "f = lambda x: x * 2  # two\n", "f = lambda x: x * 3\n"):
        file.write_text(text)
        hashes.append(code_hash((runpy.run_path(str(file))["f"],)))
        typed: dict = {"__name__": "typed"}
        exec(text, typed)
        hashes.append(code_hash((typed["f"],)))
    assert hashes[:2] == hashes[2:4] and len(set(hashes)) == 4
    assert code_hash((code_hash.__wrapped__,)) == code_hash(("aidx.ops.autotune.tunable",))
    assert code_hash((jax.jit(typed["f"]),)) == hashes[-1]
    assert code_hash((exec_constant({1, 2}),)) != code_hash((exec_constant({1, 3}),))


def exec_constant(options):
    """A function that was typed, whose inner function knows a set."""
    typed: dict = {"__name__": "typed"}
    exec(f"def f(x):\n  def g(y): return y in {options}\n  return g(x)", typed)
    return typed["f"]


def test_a_gpu_kernel_runs_here_only_if_it_passed_the_gate(alone, clock, monkeypatch):
    gpu = dataclasses.replace(TOY, name="toy/gpu", platforms=("cuda", "cpu"))
    passed = set()
    monkeypatch.setattr(store, "passed_gate", lambda *row: row in passed)
    with autotune.mode("on", timer=clock):
        with autotune.recording() as seen:
            assert autotune.choose(gpu, (X,)) == 1
        assert seen[0].reason == "5 of 5 are not through the gate"
        assert clock.asked == []
        code, family = code_hash(gpu.sources), gpu.family_text((X,), {})
        passed.add(("toy/gpu", code, family, "2"))
        assert chosen(gpu) == (2, "tuned")
    assert clock.asked == [1, 2]  # the default runs in any case


def test_the_gates_record_goes_to_json_and_back():
    rows = frozenset({("a/b", "code", '{"H": 64}', "1"), ("a/b", "code", '{"H": 64}', '["x"]')})
    assert store.read_gate(store.gate_json(rows)) == rows
    with pytest.raises(ValueError, match="its format is None"):
        store.read_gate("{}")


def test_no_memory_to_tune_in_is_no_reason_to_fail(alone, clock):
    def inputs(rng, x):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    full = dataclasses.replace(TOY, inputs=inputs)
    with autotune.mode("on", timer=clock), autotune.recording() as seen:
        assert autotune.choose(full, (X,)) == 1
    assert seen[0].reason == "it could not be timed: RESOURCE_EXHAUSTED: out of memory"
    assert store.read(alone.cache, place(full)) is None


@pytest.mark.smoke
def test_a_call_under_jit_is_tuned_outside_the_trace(alone):
    """With the real clock: the trace holds the chosen configuration and nothing of the tuning."""
    pieces = dataclasses.replace(TOY, candidates=lambda x: (1, 2))

    @jax.jit
    def f(x):
        config = autotune.choose(pieces, (x,))
        return pieces.run(config, x)

    with autotune.mode("on"), autotune.recording() as seen:
        np.testing.assert_array_equal(f(X), 2 * X)
        assert seen[0].source == "tuned"
        text = f.trace(X).jaxpr.pretty_print()
        assert "while" not in text and "random" not in text
    entry = store.read(alone.cache, place(pieces))
    assert all(m.seconds > 0 for m in entry.measurements)


def test_pinning_is_part_of_the_key_of_jits_caches(alone):
    f = jax.jit(lambda x: autotune.choose(TOY, (x,)) + 0 * x)
    assert f(X)[0] == 1
    with table(2):
        assert f(X)[0] == 2
    assert f(X)[0] == 1
    with table(2), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen).result() == (1, "default")  # another thread, another context


@pytest.mark.smoke
def test_less_than_two_percent_is_no_gain(alone):
    with autotune.mode("on", timer=Clock(c1=1.0, c2=0.99, c4=0.985)):
        assert chosen() == (1, "tuned")
    with table(2), autotune.mode("on", timer=Clock(c1=1.0, c2=0.97, c4=1.1)):
        assert chosen(x=jnp.zeros(4)) == (2, "tuned")


def test_the_best_and_the_default_are_timed_again_in_turns(alone):
    """A first time that is too good, or too bad, decides nothing."""
    calls = []

    def timer(trial, config):
        calls.append(config)
        lucky = calls.count(config) == 1 and config == 4
        unlucky = calls.count(config) == 1 and config == 1
        return 0.1 if lucky else 9.0 if unlucky else {1: 1.0, 2: 1.2, 4: 1.5}[config]

    with autotune.mode("on", timer=timer):
        assert chosen() == (1, "tuned")
    entry = store.read(alone.cache, place())
    assert [entry.find(c).seconds for c in ("1", "2", "4")] == [1.0, 1.2, 1.5]
    assert calls[:3] == [1, 2, 4] and calls[3:6] == calls[6:9] == calls[-3:]  # rounds


@pytest.mark.parametrize("slow", range(5))
def test_one_slow_call_in_five_does_not_decide(slow):
    """The dispatch of a program stalls now and then: 907 us for a kernel of 9, once measured."""
    now, programs = [0.0], []

    def chain(*sets):
        programs.append(sets)
        stalls = (len(programs) - 2) // (trial.QUEUE + 1) == slow
        now[0] += 1000.0 if stalls and (len(programs) - 2) % (trial.QUEUE + 1) == 0 else 1.0
        return jnp.float32(0)

    seconds = trial.device_seconds(chain, ((), ()), clock=lambda: now[0])
    assert seconds == pytest.approx(1.0 / (2 * trial.ROUNDS + 1))


def test_errors_count_beside_the_size_of_the_output():
    want = jnp.full((64,), 1e-3)
    assert trial.relative_error(want, want) == 0
    assert trial.relative_error(want.at[3].set(2e-3), want) > 0.4
    assert trial.relative_error(want.at[3].set(2e-3), want, floor=1.0) < 2e-3
    assert trial.relative_error(want.at[3].set(jnp.nan), want) == np.inf
    infinite = want.at[0].set(-jnp.inf)
    assert trial.relative_error(infinite, infinite) == 0
    with pytest.raises(ValueError, match="an output is"):
        trial.relative_error(want[:3], want)


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_tables_merge_and_go_to_json_and_back(tmp_path):
    a = table(1, seconds=2.0) | table(2, seconds=3.0, code="older")
    b = table(1, seconds=5.0) | table(4, device="NVIDIA H200")
    both = a | b
    assert len(both.entries) == 3
    again = both.get(a.entries[0].place)
    assert [m.seconds for m in again.measurements] == [5.0]  # the later one
    assert both | Tuning() == both and (Tuning() | a).entries == a.entries
    assert Tuning.from_json(both.to_json()) == both
    both.save(tmp_path / "deep" / "table.json")
    assert Tuning.load(tmp_path / "deep" / "table.json") == both
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["table.json"]
    json.loads(both.to_json())
    with pytest.raises(ValueError, match="two entries"):
        Tuning((*a.entries, *a.entries))
    with pytest.raises(ValueError, match="seconds or a failure"):
        Measurement("1")


def test_a_pinned_table_is_hashed_once(monkeypatch):
    """jit asks for the hash of its context in every call."""
    hashed = []
    monkeypatch.setattr(Entry, "__hash__", lambda self: hashed.append(1) or 7)
    many = Tuning(tuple(Entry("toy/scale", "cpu", "", str(n), "{}") for n in range(5)))
    f = jax.jit(lambda x: x + 1)
    with many:
        for _ in range(3):
            f(X)
    assert len(hashed) == 5


def test_configurations_of_every_kind_have_a_name():
    @dataclasses.dataclass(frozen=True)
    class Tiles:
        rows: int = 64
        dtype: type = np.float32

    assert config_text((Tiles(), None)) == (
        '[{"dtype": "float32", "rows": 64, "type": "Tiles"}, null]'
    )
    with pytest.raises(TypeError, match="no name"):
        config_text((print,))


def test_two_writers_of_one_entry_keep_both_timings(alone):
    entry = Entry(*place())
    store.write(alone.cache, entry.updated([Measurement("1", seconds=1.0)]))
    store._read.clear()
    store.write(alone.cache, entry.updated([Measurement("2", seconds=2.0)]))
    assert len(store.read(alone.cache, place()).measurements) == 2


def test_what_a_lowered_kernel_is_called_changes_with_the_tuner(alone, clock):
    """A kernel kept on disk must not outlive what its configuration was chosen by."""
    plain = autotune.fingerprint(autotune.settings())
    with table(2):
        pinned = autotune.fingerprint(autotune.settings())
    with autotune.mode("on", timer=clock):
        assert autotune.fingerprint(autotune.settings()) is None
        chosen()
    cached = autotune.fingerprint(autotune.settings())
    assert len({plain, pinned, cached}) == 3


# --- explain, and several processes --------------------------------------------------------------


def test_explain_says_which_configuration_and_why(alone):
    def forward(spec, operands):
        return TOY.run(autotune.choose(TOY, (operands,)), operands)

    registry.register_op("toy", lambda: (registry.Implementation("toy", "own", forward),),
                         lambda x: (None, x))  # fmt: skip
    try:
        for _ in range(2):  # a second time, though all is traced
            with table(2):
                (line,) = registry.explain("toy", X)
            assert line.chosen and [str(c) for c in line.configs] == ["toy/scale: 2 [pinned]"]
    finally:
        registry.unregister_op("toy")


class Board:
    """The coordination service of several processes, as threads see it."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000)
            return self.values[key]


def test_the_first_process_decides_and_all_agree(alone, monkeypatch):
    board, ranks = Board(), threading.local()
    monkeypatch.setattr(choice.agree, "shared_store", lambda: (ranks.here, board))
    clocks = [Clock(c1=2.0, c2=1.0, c4=3.0), Clock(c1=1.0, c2=2.0, c4=3.0)]

    def process(rank):
        ranks.here = rank
        monkeypatch.setattr(choice, "_decided", {})
        with autotune.mode("on", timer=clocks[rank], cache=None):
            return chosen()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        late, first = pool.submit(process, 1), pool.submit(process, 0)
        assert first.result() == late.result() == (2, "tuned")
    assert clocks[1].asked == []  # the other process timed nothing


def test_a_miss_of_the_first_process_is_everybodys(alone, monkeypatch):
    board = Board()
    for rank in (0, 1):
        monkeypatch.setattr(choice.agree, "shared_store", lambda rank=rank: (rank, board))
        monkeypatch.setattr(choice, "_decided", {})
        with autotune.mode("cached-only"), pytest.raises(NotTuned):
            chosen()


def test_names_of_tunables_are_their_own():
    toy = dataclasses.replace(TOY, name="toy/once")
    autotune.register(toy)
    try:
        with pytest.raises(ValueError, match="there is a tunable named 'toy/once'"):
            autotune.register(toy)
        assert toy in autotune.tunables("toy") and autotune.tunables("toy/once") == (toy,)
    finally:
        autotune.unregister("toy/once")
    assert isinstance(toy, Tunable)
