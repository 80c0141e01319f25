"""`aidx bench`: tokens a second and latencies at several concurrencies."""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from aidx.cli.options import add_model_options, engine_options, positive, resolve_model


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "bench",
        help="measure tokens/s and latencies",
        description="Serve random prompts (the same for every run of a seed), so many at once, and "
        "measure. Greedy, and every answer has its full length.",
        epilog="examples:\n"
        "  aidx bench\n"
        "  aidx bench --concurrency 1 8 32 --num-prompts 64 --input-len 8 256 --output-len 16 256\n"
        "  aidx bench --model org/name --dtype bfloat16 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    length = {"type": positive, "nargs": "+", "metavar": "N"}
    parser.add_argument("--num-prompts", type=positive, default=32)
    parser.add_argument("--concurrency", **length, default=[1, 8], help="requests at once")
    parser.add_argument("--input-len", **length, default=[64], help="tokens, or a range: LOW HIGH")
    parser.add_argument("--output-len", **length, default=[64], help="tokens, or a range: LOW HIGH")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths")
    parser.add_argument("--json", action="store_true", help="one JSON object per concurrency")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from aidx.llm import LLM

    if args.num_prompts < max(args.concurrency):
        raise ValueError(
            f"--num-prompts {args.num_prompts} is less than --concurrency {max(args.concurrency)}"
        )
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")
    for name in ("input_len", "output_len"):
        low_high = getattr(args, name)
        if len(low_high) > 2 or low_high[0] > low_high[-1]:
            raise ValueError(f"--{name.replace('_', '-')} {low_high}: give N, or LOW HIGH")
    llm = LLM(
        resolve_model(args.model),
        warmup="greedy",
        **engine_options(args, max_num_seqs=max(args.concurrency)),
    )
    requests = random_requests(
        args.num_prompts, args.input_len, args.output_len, llm.model.vocab_size, args.seed
    )
    longest = max(len(prompt) + new for prompt, new in requests)
    if longest > llm.engine.config.max_model_len:
        raise ValueError(
            f"--input-len and --output-len make {longest} tokens, more than "
            f"{llm.engine.config.max_model_len}"
        )
    rows = []
    for concurrency in args.concurrency:
        serve(llm, requests[:1], 1)
        rows.append({"concurrency": concurrency, **measure(llm, requests, concurrency)})
    if args.json:
        print("\n".join(json.dumps(row) for row in rows))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{args.model}: {args.num_prompts} prompts, {llm.model.dtype}")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" for v in row.values()))
    Console().print(table)
    return 0


def random_requests(
    count: int, inputs: Sequence[int], outputs: Sequence[int], vocab_size: int, seed: int
) -> list[tuple[list[int], int]]:
    """(prompt ids, tokens to generate) with lengths uniform in their ranges.

    >>> [(len(p), n) for p, n in random_requests(2, [3], [5, 5], 10, seed=0)]
    [(3, 5), (3, 5)]
    """
    rng = np.random.default_rng(seed)
    draw = lambda bounds: int(rng.integers(bounds[0], bounds[-1] + 1))
    return [
        (rng.integers(1, vocab_size, draw(inputs)).tolist(), draw(outputs)) for _ in range(count)
    ]


def serve(
    llm: Any, requests: Sequence[tuple[Sequence[int], int]], concurrency: int
) -> tuple[float, list[Any]]:
    """Seconds and outputs of requests of which at most `concurrency` are in the engine."""
    from aidx.engine import SamplingParams

    waiting = iter(requests)
    outputs: list[Any] = []
    in_flight = 0
    begun = time.perf_counter()
    while len(outputs) < len(requests):
        while in_flight < concurrency and (request := next(waiting, None)) is not None:
            prompt, new = request
            params = SamplingParams(
                temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
            )
            llm.engine.add_request(prompt, params)
            in_flight += 1
        done = [o for o in llm.engine.step() if o.finished]
        in_flight -= len(done)
        outputs += done
    return time.perf_counter() - begun, outputs


def measure(
    llm: Any, requests: Sequence[tuple[Sequence[int], int]], concurrency: int
) -> dict[str, Any]:
    """Rates and latencies of one run.

    Raises:
      RuntimeError: a request failed.
    """
    seconds, outputs = serve(llm, requests, concurrency)
    failed = [o for o in outputs if o.outputs[0].finish_reason == "error"]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].outputs[0].stop_reason}")
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    row = {"output_tokens": made, "seconds": seconds, "tokens_per_second": made / seconds}
    for name, metric in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
        known = [v for o in outputs if (v := getattr(o.metrics, metric)) is not None]
        p50, p95 = np.percentile(known, (50, 95)) * 1e3 if known else (float("nan"),) * 2
        row |= {f"{name}_p50_ms": float(p50), f"{name}_p95_ms": float(p95)}
    return row
