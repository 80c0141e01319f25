"""bench/report.py: results become tables, and a stale table is found."""

import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    """Import a script of bench/, which is no package."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "bench"))


@pytest.fixture
def results(tmp_path):
    row = lambda case, who, metric, value, unit: {
        "case": case, "implementation": who, "metric": metric, "value": value, "unit": unit,
    }  # fmt: skip
    rows = [
        row("a 1", "peer", "speed", 50.0, "tokens/s"),
        row("a 1", "aidx", "speed", 100.0, "tokens/s"),
        row("a 1", "other", "speed", 80.0, "tokens/s"),
        row("b 2", "aidx", "speed", 12345.6, "tokens/s"),
        row("a 1", "aidx", "step", 2.0, "ms"),
        row("a 1", "peer", "step", 5.0, "ms"),
    ]
    meta = {"command": "python x.py", "device": "d", "date": "2026-01-01", "versions": {"jax": "1"}}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "x.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    return tmp_path


def test_a_table_compares_with_the_best_other(bench, results):
    report = bench("report")
    lines = report.table(report.load("cpu/x", results), "speed").splitlines()
    assert lines[0] == "| speed, tokens/s | aidx | peer | other | aidx / best other |"
    assert lines[2] == "| a 1 | 100 | 50.0 | 80.0 | 1.25x |"
    assert lines[3] == "| b 2 | 12,300 |  |  |  |"
    assert "`python x.py`" in lines[-1]
    step = report.table(report.load("cpu/x", results), "step").splitlines()
    assert step[2] == "| a 1 | 2.00 | 5.00 | 2.50x |"  # fewer milliseconds are better
    assert "b 2" not in report.table(report.load("cpu/x", results), prefix="a")


def test_marked_tables_are_refreshed_in_place(bench, results):
    report = bench("report")
    text = (
        "before\n<!-- bench: cpu/x [speed] cases b -->\nstale\n<!-- /bench -->\nbetween\n"
        "<!-- bench: cpu/x [step] -->\n<!-- /bench -->\nafter\n"
    )
    fresh = report.refresh(text, results)
    assert "stale" not in fresh and "12,300" in fresh and "2.50x" in fresh
    assert fresh.startswith("before\n") and fresh.endswith("-->\nafter\n") and "between" in fresh
    assert report.refresh(fresh, results) == fresh


def test_what_is_missing_is_named(bench, results):
    report = bench("report")
    with pytest.raises(FileNotFoundError, match=r"'h200/y'.*cpu/x"):
        report.load("h200/y", results)
    with pytest.raises(ValueError, match="no metric 'size'"):
        report.table(report.load("cpu/x", results), "size")


def test_every_committed_result_makes_a_table(bench):
    report = bench("report")
    for path in report.all_files():
        assert "| --- |" in report.table(json.loads(path.read_text())), path


def test_the_chat_run_has_the_lengths_that_the_peers_had(bench):
    serving = bench("serving")
    requests = serving.run_requests("chat512", vocab_size=100)
    outputs = sorted(n for _, n in requests)
    assert len(requests) == 512 and 106_000 < sum(outputs) < 108_000
    assert 160 < outputs[256] < 168
    assert [len(p) for p, _ in serving.run_requests("b8", 100)] == [512] * 8
