"""`aidx profile` runs a script as `python` would, and reports."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from aidx.cli import main
from aidx.telemetry.profiler import ProfileReport

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from aidx.telemetry.profiler import profile_scope
assert __name__ == "__main__" and sys.path[0].endswith("place")
import beside
f = jax.jit(jax.named_scope("product")(lambda x: x @ x))
with profile_scope("work"):
    for _ in range(3):
        f(jnp.ones((64, 64)))
print(sys.argv[1:])
if "--fail" in sys.argv: sys.exit(7)
"""


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("")
    return folder


def command(place, *args):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-m", "aidx.cli", "profile", *args], cwd=place, env=env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.smoke
def test_a_script_is_run_and_reported_in_every_form(place):
    done = command(place, "--out", "p", "script.py", "--out", "own", "-x")
    assert done.returncode == 0, done.stderr
    assert "['--out', 'own', '-x']" in done.stdout and "product" in done.stdout
    report = ProfileReport.from_json((place / "p" / "report.json").read_text())
    assert {row.path: row.count for row in report.host} == {("work",): 1}
    (product,) = (row for row in report.device if row.path == ("product",))
    assert product.flops == 3 * 2 * 64**3  # although the script dropped its results
    assert json.loads((place / "p" / "trace.json").read_text())["traceEvents"]
    assert {f.suffix for f in (place / "p").iterdir()} == {".json", ".html", ".md", ".csv"}
    assert not (place / "own").exists()


def test_the_exit_code_is_the_scripts_or_the_comparisons(place):
    base = place / "base.json"
    quick = '{"seconds": 1, "host": [%s], "device": [], "device_busy": 0, "programs": [], "peak": null, "host_peak": 0}'  # noqa: E501
    numbers = dict.fromkeys(("total", "mean", "min", "p50", "p95", "p99", "max"), 1e-9)
    base.write_text(quick % json.dumps({"path": ["work"], "count": 1, **numbers}))
    both = ("--host-only", "--baseline", str(base), "--least", "0")
    slower = command(place, *both, "--", "script.py")
    assert slower.returncode == 1 and "host work:" in slower.stdout
    failed = command(place, *both, "--", "script.py", "--fail")
    assert failed.returncode == 7 and "host work:" in failed.stdout
    same = command(place, *both, "--tolerance", "1e12", "script.py")
    assert same.returncode == 0 and "nothing became slower" in same.stdout


def test_what_is_not_there_is_said_before_anything_runs(place, capsys):
    assert main(["profile", str(place / "none.py")]) == 1
    assert main(["profile", "--baseline", "none.json", str(place / "script.py")]) == 1
    assert "none.py" in capsys.readouterr().err
    assert not pathlib.Path("profile").exists()
