"""The live oracle: transformers on torch in another Python, other seeds and the pairwise grid.

    AIDX_TORCH_PYTHON=path/to/python python -m pytest -m oracle tests/models

That Python needs tests/oracles/requirements.txt and torch, not aidx.
"""

import json
import os
import subprocess

import jax
import numpy as np
import pytest

from aidx.models import Tokenizer, load_model, save_model, shard_params
from tests.models.golden import (
    ORACLES,
    TOLERANCE,
    distance,
    golden_cases,
    greedy_tokens,
    prompt_logits,
    read_cases,
)

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(1800)]
SEED = int(os.environ.get("AIDX_ORACLE_SEED", "1"))


def oracle(script, *args):
    """Run a script of tests/oracles under the Python that has torch."""
    python = os.environ.get("AIDX_TORCH_PYTHON")
    if not python:
        pytest.fail("set AIDX_TORCH_PYTHON to a Python with torch and transformers")
    command = [python, str(ORACLES / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def check(cases, directory):
    """Logits and greedy tokens of every case; all failures are reported at once."""
    wrong = {}
    for name, case in cases.items():
        model = load_model(
            case.write(directory / name), max_model_len=case.max_len, allow_long_max_model_len=True
        )
        error = distance(prompt_logits(model.config, model.params, case.tokens), case)
        tokens = greedy_tokens(model.config, model.params, case.tokens, len(case.greedy))
        if error >= TOLERANCE or not np.array_equal(tokens, case.greedy):
            wrong[name] = (error, case.config)
        jax.clear_caches()
    assert not wrong


@pytest.mark.parametrize("grid", ["golden", "pairwise"])
def test_a_fresh_grid_equals_transformers(grid, tmp_path):
    oracle("make_models.py", "--out", tmp_path, "--grid", grid, "--seed", SEED)
    cases = {}
    for file in sorted(tmp_path.glob("models_*.npz")):
        cases |= read_cases(file)
    assert len(cases) >= len(golden_cases())
    check(cases, tmp_path)


def test_golden_files_are_what_the_scripts_make(tmp_path):
    """Within rounding: another torch may sum in another order."""
    oracle("make_models.py", "--out", tmp_path)
    for file in sorted(tmp_path.glob("models_*.npz")):
        fresh = read_cases(file)
        for name, case in fresh.items():
            kept = golden_cases()[name]
            assert case.config == kept.config
            np.testing.assert_array_equal(case.tokens, kept.tokens)
            assert distance(case.logits, kept) < TOLERANCE / 10
    oracle("make_tokenizers.py", "--out", tmp_path)
    kept = json.loads((ORACLES / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8")) == kept


def test_transformers_loads_what_aidx_saves(tmp_path):
    tokenizer = Tokenizer.from_directory(ORACLES / "tokenizer")
    directories, logits = [], {}
    names = [name for name in golden_cases() if name != "llama_rope_dynamic"]
    for name in (*names, "sharded"):
        case = golden_cases()["qwen3" if name == "sharded" else name]
        model = load_model(case.write(tmp_path / "from" / name))
        if name == "sharded":
            mesh = jax.make_mesh((1,), ("tensor",))
            params = shard_params(model.config, model.params, mesh)
            model = model.replace(params=params, tokenizer=tokenizer, eos_token_ids=(3, 7))
            model = model.replace(generation_config={"eos_token_id": [3, 7], "do_sample": True})
        size = 40_000 if name == "sharded" else 2**30
        directory = save_model(model, tmp_path / name, max_shard_bytes=size)
        (directory / "prompt.json").write_text(json.dumps(case.tokens.tolist()))
        directories.append(directory)
        logits[name] = case
    oracle("read_saved.py", "--out", tmp_path / "saved.npz", *directories)
    with np.load(tmp_path / "saved.npz") as saved:
        for name, case in logits.items():
            assert distance(saved[f"{name}/logits"], case) < TOLERANCE, name
        said = json.loads(str(saved["sharded/texts"]))
    assert tokenizer.encode(said["text"]) == said["ids"]
    chat = tokenizer.render_chat(said["messages"], add_generation_prompt=False)
    assert chat == said["chat"]
    assert said["eos"] == [3, 7]
