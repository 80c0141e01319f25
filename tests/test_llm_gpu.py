"""The engine on a Hopper GPU: its kernels give the tokens that plain XLA gives."""

import functools
import inspect
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from aidx.cli.options import embedded_path
from aidx.engine import SamplingParams
from aidx.llm import LLM

pytestmark = pytest.mark.gpu

TIE = 0.1  # nats between two tokens that bfloat16 may swap; the model's top tokens are 1-5 apart


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Pieces of textwrap's source, 1 to 600 tokens."""
    tokens = llm.tokenizer.encode(inspect.getsource(textwrap))
    rng = np.random.default_rng(0)
    lengths = np.geomspace(1, 600, count).astype(int)
    starts = rng.integers(0, len(tokens) - 600, count)
    return [tokens[s : s + n] for s, n in zip(starts, rng.permutation(lengths), strict=True)]


def test_the_kernels_give_the_tokens_of_xla_or_a_tie():
    limits = dict(max_num_seqs=64, max_num_batched_tokens=1024, num_blocks=4001, warmup=False)
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    answers = {}
    for implementation in ("mosaic_gpu", "xla"):
        llm = LLM(embedded_path(), dtype="bfloat16", implementation=implementation, **limits)
        asked = prompts(llm, 100)
        answers[implementation] = [o.outputs[0].token_ids for o in llm.generate(asked, greedy)]
    diverged = []
    for prompt, ours, theirs in zip(asked, *answers.values(), strict=True):
        assert len(ours) == len(theirs) == 32
        differ = np.flatnonzero(np.array(ours) != np.array(theirs))
        if len(differ):
            at = differ[0]
            diverged.append(([*prompt, *ours[:at]], ours[at], theirs[at]))
    assert len(diverged) < 30
    judge = LLM(embedded_path(), dtype="float32", implementation="xla", **limits)
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=8)
    verdicts = judge.generate([prompt for prompt, _, _ in diverged], one) if diverged else []
    for (prompt, ours, theirs), verdict in zip(diverged, verdicts, strict=True):
        found = verdict.outputs[0].logprobs[0]
        gap = abs(found[ours].logprob - found[theirs].logprob)
        assert gap < TIE, f"after {len(prompt)} tokens {ours} and {theirs} are {gap:.3f} apart"


def test_a_second_start_reads_its_kernels_and_answers_as_the_first(tmp_path):
    """Programs and lowered kernels come from disk: nothing of the first process is left."""
    script = """if True:
        from aidx.cli.options import embedded_path
        from aidx.engine import SamplingParams
        from aidx.llm import LLM
        greedy = SamplingParams(temperature=0, max_tokens=16)
        llm = LLM(embedded_path(), dtype="bfloat16", num_blocks=64, max_num_seqs=4, warmup=False,
                  max_num_batched_tokens=64)
        print(llm.generate("def main(", greedy)[0].outputs[0].text)
    """
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    start = functools.partial(
        subprocess.check_output, [sys.executable, "-c", script], env=os.environ | own, text=True
    )
    first = start()
    kept = {file.name for file in tmp_path.glob("*.aidx-kernel")}
    assert kept and len(first) > 8
    assert start() == first
    assert {file.name for file in tmp_path.glob("*.aidx-kernel")} == kept
