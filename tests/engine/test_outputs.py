"""Outputs: what is derived from them."""

import dataclasses

import pytest

from aidx.engine.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    logprobs_of_token,
)


def test_a_request_is_finished_when_all_its_samples_are():
    running = CompletionOutput(0, "a", (1,))
    stopped = CompletionOutput(1, "b", (2,), finish_reason="stop", stop_reason="\n")
    assert not running.finished and stopped.finished
    output = RequestOutput("r", None, (7, 8), outputs=(running, stopped))
    assert not output.finished
    ended = dataclasses.replace(running, finish_reason="abort")
    assert dataclasses.replace(output, outputs=(ended, stopped)).finished
    assert not RequestOutput("r", None, (7, 8)).finished


def test_metrics_are_none_until_they_happened():
    m = RequestMetrics(10.0)
    assert m.queue_time is None and m.time_to_first_token is None and m.inter_token_latency is None
    m = dataclasses.replace(m, first_scheduled_time=10.25, first_token_time=11.0)
    assert m.queue_time == 0.25 and m.time_to_first_token == 1.0 and m.inter_token_latency is None
    one = dataclasses.replace(m, finished_time=11.0, longest_sample=1)
    assert one.inter_token_latency is None
    many = dataclasses.replace(m, finished_time=13.0, num_generation_tokens=15, longest_sample=5)
    assert many.inter_token_latency == 0.5


def test_logprobs_have_the_token_first_and_no_token_twice():
    out = logprobs_of_token(4, -2.0, 3, [9, 4, 1], [-0.5, -2.0, -3.0], decode="t{}".format)
    assert list(out) == [4, 9, 1]
    assert out[4] == Logprob(-2.0, 3, "t4")
    assert out[9] == Logprob(-0.5, 1, "t9") and out[1] == Logprob(-3.0, 3, "t1")
    with pytest.raises(ValueError, match="shorter"):
        logprobs_of_token(4, -2.0, 3, [9, 4], [-0.5])
