"""What the README tells a newcomer to type, works; its tables are those of bench/results."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_first_example_runs(capsys):
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(block, "README.md", "exec"), {})
    assert "def fibonacci(n):" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/arrays.md", "docs/kernels_sparse.md"])
def test_the_tables_are_current(page):
    run = [sys.executable, "bench/report.py", "--check", page]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tree_names_what_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    names = re.findall(r"^( *)([\w.]+/?)(?= |$)", tree, re.MULTILINE)
    base = ROOT
    for indent, name in names:
        folder = base if indent else ROOT
        assert (folder / name).exists(), name
        if not indent:
            base = ROOT / name
