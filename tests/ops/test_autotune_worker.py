"""The tuner's worker process: what hangs is killed, what dies is recorded, the rest goes on."""

import json
import os
import threading
import time

import pytest

from aidx.ops.autotune import Tuning, store
from aidx.ops.autotune.tune import table, tune
from aidx.ops.autotune.worker import Worker, WorkerFailure

TOYS = "tests.ops.toy_tunables"


@pytest.fixture(scope="module")
def worker():
    environment = {"AIDX_TEST_TOYS": "1", "JAX_PLATFORMS": "cpu"}
    with Worker([TOYS], environment=environment) as process:
        yield process


def test_every_configuration_of_a_case_has_an_answer(worker, tmp_path):
    seen = []
    (outcome,) = tune([("toy/scale", "n=8")], worker, cache=str(tmp_path), report=seen.append)
    found = {json.loads(m.config): m for m in outcome.entry.measurements}
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert all(found[c].seconds > 0 and found[c].error <= 1e-3 for c in (1, 2, 4))
    assert found[3].failure == "refused: three pieces do not fit"
    assert found[5].failure.startswith("wrong: error")
    assert outcome.default == "1"
    assert outcome.gain >= 1.0
    assert [p.done for p in seen] == [0, 1, 2, 3, 4, 5]
    # A second run knows it all; `again` does not.
    starts, known = worker.starts, []
    (same,) = tune([("toy/scale", "n=8")], worker, cache=str(tmp_path), report=known.append)
    assert same.entry == outcome.entry
    assert [p.done for p in known] == [5]
    store._read.clear()  # as another process would find it
    assert store.read(str(tmp_path), outcome.entry.place) == outcome.entry
    assert worker.starts == starts == 1


def test_what_hangs_is_killed_and_what_dies_is_recorded(worker, tmp_path):
    (outcome,) = tune([("toy/deadly", "n=8")], worker, cache=None, timeout=4)
    found = {json.loads(m.config): m for m in outcome.entry.measurements}
    assert found[7].failure == "timed out after 4 s; its process was killed"
    assert found[9].failure.startswith("its process died with exit status 9")
    assert found[1].seconds > 0
    assert found[2].seconds > 0  # timed after both, in another process
    assert Tuning.from_json(table([outcome]).to_json()) == table([outcome])


def test_a_run_ends_at_its_deadline_with_what_it_knows(worker):
    """Nothing is begun after it, and a failure for want of time is none."""
    (late,) = tune([("toy/scale", "n=8")], worker, cache=None, deadline=time.monotonic())
    assert late.problem == "not begun: the time was up"
    ends, device = time.monotonic() + 8, threading.Lock()
    how = dict(cache=None, timeout=60, deadline=ends, device=device)
    (cut,) = tune([("toy/deadly", "n=8")], worker, **how)
    found = {json.loads(m.config): m for m in cut.entry.measurements} if cut.entry else {}
    assert 7 not in found and time.monotonic() < ends + 5  # 7 hangs
    assert not device.locked()


def test_a_case_that_means_nothing_is_a_problem_of_its_own(worker):
    cases = [("toy/scale", "m=8"), ("toy/none", "n=8"), ("toy/scale", "n=2")]
    first, second, third = tune(cases, worker, cache=None)
    assert "names no shapes of toy/scale" in first.problem
    assert "no tunable named 'toy/none'" in second.problem
    assert [json.loads(m.config) for m in third.entry.measurements] == [1, 2]


def test_the_memory_pool_of_the_worker_is_bounded():
    worker = Worker(memory_fraction=0.25)
    assert worker._environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.25"
    assert worker._environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


def test_a_module_that_cannot_be_imported_is_said():
    with Worker(["no_such_module"]) as worker, pytest.raises(WorkerFailure) as died:
        worker.ask(60, do="describe", op="toy/scale", case="n=8")
    assert "No module named 'no_such_module'" in str(died.value)
    assert os.environ.get("AIDX_TEST_TOYS") is None
