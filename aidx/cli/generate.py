"""`aidx generate`: prompts in, text out."""

import argparse
import asyncio
import json
import sys
from typing import Any

from aidx.cli.options import (
    add_model_options,
    add_sampling_options,
    engine_options,
    positive,
    resolve_model,
    sampling_params,
)


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue one prompt or many. One sample of one prompt is streamed; several "
        "are served at once and printed in order.",
        epilog="examples:\n"
        '  aidx generate "def fibonacci(n):"\n'
        "  aidx generate --echo --temperature 0 < prompt.txt\n"
        '  aidx generate --json -n 2 --seed 1 "import os" "class Stack:"\n'
        '  aidx generate --model org/name --max-tokens 256 "Once upon a time"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="none, or -: standard input")
    parser.add_argument("-n", type=positive, default=1, help="samples of each prompt")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its text")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample and line")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=128)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    prompts = [sys.stdin.read() if p == "-" else p for p in args.prompts or ["-"]]
    if not all(prompts):
        raise ValueError("a prompt is empty")
    from aidx.llm import LLM, AsyncLLM

    few = min(args.n * len(prompts), 16)
    sampling_params(args)
    llm = LLM(resolve_model(args.model), warmup=False, **engine_options(args, max_num_seqs=few))
    params = sampling_params(args, llm.model.generation_config)
    if len(prompts) == args.n == 1 and not args.json:
        with AsyncLLM(llm) as served:
            return asyncio.run(stream(served, prompts[0], params, args.echo))
    outputs = llm.generate(prompts, params)
    for i, output in enumerate(outputs):
        for sample in output.outputs:
            if args.json:
                print(json.dumps(as_json(output, sample, i)))
                continue
            print(f"--- prompt {i + 1}" + (f", sample {sample.index + 1}" if args.n > 1 else ""))
            print((prompts[i] if args.echo else "") + shown(sample))
    return exit_code([sample for output in outputs for sample in output.outputs])


async def stream(llm: Any, prompt: str, params: Any, echo: bool) -> int:
    """Print one completion as it comes."""
    if echo:
        print(prompt, end="", flush=True)
    sample = await follow(llm.stream(prompt, params))
    print()
    return exit_code([sample])


async def follow(outputs: Any) -> Any:
    """Print what each output adds to the one before; the last sample comes back."""
    written, sample = 0, None
    async for output in outputs:
        sample = output.outputs[0]
        print(sample.text[written:], end="", flush=True)
        written = len(sample.text)
    if sample is not None and not sample.text and sample.token_ids:
        print(shown(sample), end="", flush=True)
    return sample


def shown(sample: Any) -> str:
    """The text, or the token ids where the checkpoint has no tokenizer."""
    return sample.text or " ".join(map(str, sample.token_ids))


def as_json(output: Any, sample: Any, index: int) -> dict[str, Any]:
    """A sample as plain data."""
    return {
        "prompt_index": index,
        "sample": sample.index,
        "prompt": output.prompt,
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "seed": output.seed,
        "cached_tokens": output.num_cached_tokens,
    }


def exit_code(samples: list[Any]) -> int:
    """1 where a sample failed, and its message on standard error."""
    failed = [s for s in samples if s.finish_reason == "error"]
    for sample in failed:
        print(f"aidx: error: {sample.stop_reason}", file=sys.stderr)
    return int(bool(failed))
