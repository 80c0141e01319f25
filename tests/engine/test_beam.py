"""Beam search against a recomputation of every hypothesis, and against transformers itself."""

import dataclasses
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from aidx.engine import BeamSearchParams
from aidx.engine.beam import Beams, Hypothesis, select

from .tiny import GREEDY, PROMPTS, dense_logits, engine, generate, model, run, tokens_of


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def reference(prompt, width, max_tokens, eos, penalty):
    """transformers' rule (early_stopping=False) over a full recomputation, in float64."""
    running, finished = [((), 0.0)], []
    for length in range(1, max_tokens + 1):
        options = []
        for tokens, score in running:
            logprobs = log_softmax(dense_logits([*prompt, *tokens])[-1])
            options += [((*tokens, t), score + logprobs[t]) for t in range(len(logprobs))]
        options.sort(key=lambda o: -o[1])
        options = options[: max(2, 1 + len(eos)) * width]
        ends = [o[0][-1] in eos or length == max_tokens for o in options]
        finished += [
            (score / length**penalty, tokens)
            for (tokens, score), end in list(zip(options, ends, strict=True))[:width]
            if end
        ]
        finished = sorted(finished, key=lambda f: -f[0])[:width]
        running = [o for o, end in zip(options, ends, strict=True) if not end][:width]
        if not running:
            break
        if len(finished) == width and running[0][1] / length**penalty <= finished[-1][0]:
            break
    return [list(tokens) for _, tokens in finished]


@pytest.mark.parametrize(
    "width,ends,penalty,hold",
    [
        (3, (), 1.0, 0),
        pytest.param(3, (3,), 0.0, 0, marks=pytest.mark.slow),
        (3, (2,), 1.0, 29),
        (2, (2, 5), 2.0, 29),
    ],
)
def test_beams_are_those_of_a_full_recomputation(width, ends, penalty, hold):
    """With `hold` the pool is too small for all beams at once: they are preempted and come back."""
    made = engine(hold=hold)
    free = reference(PROMPTS[2], width, 8, (), penalty)[0]
    eos = tuple(free[at] for at in ends)
    made.config = dataclasses.replace(made.config, eos_token_ids=eos)
    params = BeamSearchParams(beam_width=width, max_tokens=8, length_penalty=penalty)
    outputs = generate([PROMPTS[0], PROMPTS[2]], params, made=made)
    for prompt, output in zip([PROMPTS[0], PROMPTS[2]], outputs, strict=True):
        assert tokens_of([output])[0] == reference(prompt, width, 8, eos, penalty)
    reasons = {beam.finish_reason for beam in outputs[1].outputs}
    assert ("stop" in reasons) == bool(eos)
    assert made.pool.stats().held == hold
    assert made.stats().preempted > 0 or not hold


def test_more_beams_than_seats():
    """Two others sit there: three beams share two seats."""
    made = engine()
    for prompt in PROMPTS[:2]:
        made.add_request(prompt, dataclasses.replace(GREEDY, max_tokens=50))
    name = made.add_request(PROMPTS[3], BeamSearchParams(beam_width=3, max_tokens=6))
    done = run(made)
    assert tokens_of([done[name]])[0] == reference(PROMPTS[3], 3, 6, (), 1.0)
    others = [o.metrics.finished_time for n, o in done.items() if n != name]
    assert done[name].metrics.finished_time < min(others)


def test_beams_run_beside_other_requests_and_stream():
    made = engine()
    name = made.add_request(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=6), stream=True)
    made.add_request(PROMPTS[3])
    seen = []
    while made.has_unfinished:
        seen += [o for o in made.step() if o.request_id == name]
    assert [len(o.outputs[0].token_ids) for o in seen] == [1, 2, 3, 4, 5, 6]
    assert not any(o.finished for o in seen[:-1])
    assert tokens_of(seen[-1:])[0] == reference(PROMPTS[0], 3, 6, (), 1.0)


def test_beams_can_be_cancelled():
    made = engine()
    name = made.add_request(PROMPTS[0], BeamSearchParams(beam_width=3, max_tokens=30))
    for _ in range(5):
        made.step()
    assert made.abort(name)
    done = run(made)
    assert [beam.finish_reason for beam in done[name].outputs] == ["abort"] * 3
    assert made.pool.stats().held == 0


def test_a_width_that_needs_more_logprobs_is_refused():
    with pytest.raises(ValueError, match=r"beam_width=4 .* needs max_logprobs >= 8, which is 6"):
        engine().add_request([1, 2], BeamSearchParams(beam_width=4, max_tokens=4))


def test_a_beam_that_cannot_win_any_more_ends_the_search():
    beams = Beams(width=1, max_tokens=9, eos_ids=frozenset({0}), length_penalty=0.0)
    options = [np.array([0, 5])], [np.array([-0.1, -2.0], np.float32)]
    beams, parents = select(beams, *options)
    assert parents == [] and beams.finished[0][1] == Hypothesis((0,), np.float32(-0.1), True)


LIVE = """
import json, sys, torch, transformers
directory, cases = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
for case in cases:
    prompt = torch.tensor([case["prompt"]])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=case["width"],
        num_return_sequences=case["width"], max_new_tokens=9, do_sample=False,
        length_penalty=case["penalty"], early_stopping=False, pad_token_id=0,
        eos_token_id=case["eos"] or None,
    )
    case["beams"] = out[:, prompt.shape[1]:].tolist()
print("RESULT" + json.dumps(cases))
"""


@pytest.mark.oracle
def test_beams_are_those_of_transformers(tmp_path):
    from aidx.models import save_model

    save_model(model(), tmp_path)
    cases = [
        {"prompt": prompt, "width": width, "penalty": penalty, "eos": eos}
        for prompt in PROMPTS
        for width, eos in ((3, []), (3, [88]), (2, [88, 19]), (2, [19, 28]))
        for penalty in (0.0, 1.0, 2.0)
    ]
    script = tmp_path / "beams.py"
    pathlib.Path(script).write_text(LIVE)
    command = [os.environ["AIDX_TORCH_PYTHON"], str(script), str(tmp_path), json.dumps(cases)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for case in json.loads(text.split("RESULT")[1]):
        params = BeamSearchParams(
            beam_width=case["width"], max_tokens=9, length_penalty=case["penalty"]
        )
        [output] = generate([case["prompt"]], params, eos_token_ids=tuple(case["eos"]))
        got = tokens_of([output])[0]
        assert got == [b[: len(g)] for b, g in zip(case["beams"], got, strict=True)], case
