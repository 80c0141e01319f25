"""The engine on a Hopper GPU: its kernels give the tokens that plain XLA gives."""

import inspect
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
