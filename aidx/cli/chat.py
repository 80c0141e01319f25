"""`aidx chat`: a conversation on the terminal, or over a pipe, a line a turn."""

import argparse
import asyncio
import sys
from typing import Any

from aidx.cli.generate import exit_code, follow
from aidx.cli.options import (
    DRAFT,
    EMBEDDED,
    add_model_options,
    add_sampling_options,
    engine_options,
    resolve_model,
    sampling_params,
)


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation through the checkpoint's chat template, a line a turn. The "
        "embedded model has only read Python: it takes what you say for an interactive session "
        "and plays the interpreter. /reset forgets the conversation; /exit or end of file leaves.",
        epilog="examples:\n"
        "  aidx chat\n"
        '  aidx chat --model org/name --system "Answer in one sentence."\n'
        '  echo "import this" | aidx chat --temperature 0',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_model_options(parser)
    add_sampling_options(parser, max_tokens=256)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, then talk until the input ends."""
    from aidx.llm import LLM, AsyncLLM

    if args.model in (EMBEDDED, DRAFT) and not args.stop:
        args.stop = [">>>"]
    sampling_params(args)
    llm = LLM(resolve_model(args.model), warmup=False, **engine_options(args, max_num_seqs=1))
    if llm.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, hence no chat template")
    params = sampling_params(args, llm.model.generation_config)
    with AsyncLLM(llm) as served:
        return asyncio.run(talk(served, args.system, params))


async def talk(llm: Any, system: str | None, params: Any) -> int:
    """Read, answer, remember."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (said := await asyncio.to_thread(ask)) is not None:
        if said.strip() == "/exit":
            return 0
        if said.strip() == "/reset":
            messages = list(opening)
            continue
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        prompt, messages = fit(llm.llm, messages, len(opening), params.max_tokens)
        sample = await follow(llm.stream(prompt, params))
        print(flush=True)
        if exit_code([sample]):
            return 1
        messages.append({"role": "assistant", "content": sample.text.strip("\n")})
    return 0


def ask() -> str | None:
    """The next line of the user, None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def fit(
    llm: Any, messages: list[dict[str, str]], kept: int, room: int | None
) -> tuple[list[int], list[dict[str, str]]]:
    """The conversation's tokens, without the oldest turns where they leave no room to answer.

    Raises:
      ValueError: not even the last message fits.
    """
    limit = llm.engine.config.max_model_len
    while True:
        prompt = llm.tokenizer.encode_chat(messages)
        if len(prompt) + min(room or 1, limit // 2) <= limit:
            return prompt, messages
        if len(messages) <= kept + 2:
            raise ValueError(f"a message of {len(prompt)} tokens leaves no room in {limit}")
        messages = messages[:kept] + messages[kept + 2 :]
        print("(the oldest turn is forgotten)", file=sys.stderr)
