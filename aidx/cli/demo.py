"""`aidx demo`: eight prompts at once, live, then what it took."""

import argparse
import asyncio
import time
from typing import Any

from aidx.cli.options import embedded_path, positive

PROMPTS = (
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n',
    "import os\nimport sys\n\ndef main(argv=None):\n",
    "class StringTests(unittest.TestCase):\n\n    def test_upper(self):\n",
    '@contextmanager\ndef temporary_directory():\n    """Create a directory and remove it',
    "async def handle_client(reader, writer):\n",
    "try:\n    import ssl\nexcept ImportError:\n",
    'def read_config(path):\n    """Parse the file at path and return a dictionary.\n',
)
MAX_NUM_BATCHED_TOKENS = 128  # more would prefill faster and compile longer
MOST_TOKENS = 960  # two rounds of them and a prompt are what the embedded model can read


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="serve eight prompts at once with the embedded model",
        description="Serve eight prompts at once with the embedded model, show the streams live, "
        "let every stream go on from where it ended (the prefix cache then holds what it has read "
        "and written), and say what it took.",
        epilog="examples:\n  aidx demo\n  aidx demo --max-tokens 128 --seed 7\n  aidx demo | cat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=64,
        help=f"per prompt and round, at most {MOST_TOKENS}",
    )
    parser.add_argument("--seed", type=int, default=0, help="prompt i is sampled with seed + i")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, two rounds, the table."""
    import rich.console

    from aidx.engine import SamplingParams
    from aidx.llm import LLM, AsyncLLM

    console = rich.console.Console()
    if args.max_tokens > MOST_TOKENS:
        raise ValueError(f"--max-tokens {args.max_tokens} is more than {MOST_TOKENS}")
    params = [
        SamplingParams(
            temperature=0.8, max_tokens=args.max_tokens, seed=args.seed + i, ignore_eos=True
        )
        for i in range(len(PROMPTS))
    ]
    begun = time.perf_counter()
    llm = LLM(
        embedded_path(),
        max_num_seqs=len(PROMPTS),
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        num_blocks=1024,
        warmup=params[0].variant,
    )
    console.print(f"ready in {time.perf_counter() - begun:.1f} s", style="dim", highlight=False)
    with AsyncLLM(llm) as served:
        rounds = asyncio.run(two_rounds(served, params, console))
    if not console.is_terminal:
        show_texts(llm, rounds[-1]["outputs"], console)
    console.print(table(rounds))
    console.print(implementations(llm), style="dim", highlight=False)
    return 0


async def two_rounds(llm: Any, params: list[Any], console: Any) -> list[dict[str, Any]]:
    """All prompts at once, then all that came of them at once."""
    first = await one_round(llm, [llm.llm.encode(p) for p in PROMPTS], params, console)
    so_far = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in first["outputs"]]
    second = await one_round(llm, so_far, params, console)
    return [{"name": "first", **first}, {"name": "continued", **second}]


async def one_round(
    llm: Any, prompts: list[list[int]], params: list[Any], console: Any
) -> dict[str, Any]:
    """Stream all prompts together; the last output of each, and the wall time."""
    latest: list[Any] = [None] * len(prompts)
    texts = [llm.llm.tokenizer.decode(p) for p in prompts]

    async def follow(i: int) -> None:
        async for output in llm.stream(prompts[i], params[i]):
            latest[i] = output

    begun = time.perf_counter()
    streams = asyncio.gather(*(follow(i) for i in range(len(prompts))))
    if console.is_terminal:
        await watch(streams, texts, latest, console)
    await streams
    seconds = time.perf_counter() - begun
    failed = [o.outputs[0] for o in latest if o.outputs[0].finish_reason == "error"]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].stop_reason}")
    return {"outputs": latest, "seconds": seconds}


def show_texts(llm: Any, outputs: list[Any], console: Any) -> None:
    """What came of every prompt, where there was nobody to watch it come."""
    for i, output in enumerate(outputs):
        console.rule(f"prompt {i + 1}")
        text = llm.tokenizer.decode([*output.prompt_token_ids, *output.outputs[0].token_ids])
        console.print(text, markup=False, highlight=False, soft_wrap=True)


async def watch(streams: Any, prompts: list[str], latest: list[Any], console: Any) -> None:
    """Redraw the panels ten times a second until every stream has ended."""
    from rich.live import Live

    with Live(panels(prompts, latest, console), console=console, auto_refresh=False) as live:
        while not streams.done():
            await asyncio.wait([streams], timeout=0.1)
            live.update(panels(prompts, latest, console), refresh=True)


def panels(prompts: list[str], latest: list[Any], console: Any) -> Any:
    """Two columns of panels, each the last lines of a prompt and what has come of it."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    rows = -(-len(prompts) // 2)
    height = max(3, (console.height - 2) // rows - 2)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    made = []
    for i, (prompt, output) in enumerate(zip(prompts, latest, strict=True)):
        tokens = len(output.outputs[0].token_ids) if output else 0
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(prompt, style="dim")
        text.append(output.outputs[0].text if output else "")
        lines = text.split("\n", allow_blank=True)[-height:]
        body = Text("\n").join(lines)
        made.append(Panel(body, title=f"{i + 1}", subtitle=f"{tokens} tokens", height=height + 2))
    for left, right in zip(made[::2], [*made[1::2], ""][:rows], strict=True):
        grid.add_row(left, right)
    return grid


def table(rounds: list[dict[str, Any]]) -> Any:
    """Tokens a second, times and cache hits of each round."""
    from rich.table import Table

    made = Table(title=f"{len(PROMPTS)} prompts at once")
    made.add_column("")
    for r in rounds:
        made.add_column(r["name"], justify="right")
    for name, of in {
        "prompt tokens": lambda r: f"{sum(len(o.prompt_token_ids) for o in r['outputs'])}",
        "of them cached": lambda r: f"{hits(r):.0%}",
        "generated tokens": lambda r: f"{generated(r)}",
        "tokens/s": lambda r: f"{generated(r) / r['seconds']:,.0f}",
        "time to first token, ms": lambda r: f"{mean_ms(r, 'time_to_first_token'):.1f}",
        "between tokens, ms": lambda r: f"{mean_ms(r, 'inter_token_latency'):.1f}",
    }.items():
        made.add_row(name, *(of(r) for r in rounds))
    return made


def generated(r: dict[str, Any]) -> int:
    """Tokens that a round made."""
    return sum(len(o.outputs[0].token_ids) for o in r["outputs"])


def hits(r: dict[str, Any]) -> float:
    """Share of a round's prompt tokens that came from the prefix cache."""
    cached = sum(o.num_cached_tokens for o in r["outputs"])
    return cached / sum(len(o.prompt_token_ids) for o in r["outputs"])


def mean_ms(r: dict[str, Any], metric: str) -> float:
    """Mean of a metric of the requests, in milliseconds."""
    values = [getattr(o.metrics, metric) for o in r["outputs"]]
    known = [v for v in values if v is not None]
    return 1e3 * sum(known) / len(known) if known else float("nan")


def implementations(llm: Any) -> str:
    """The device, the dtype, and what attention ran on."""
    import jax

    from aidx.cli.info import explain_paged

    model = llm.model
    chosen = {
        kind: next((line.name for line in explain_paged(model, kind) if line.chosen), "none")
        for kind in ("decode", "prefill")
    }
    device = jax.devices()[0]
    return (
        f"{device.device_kind} ({device.platform}), {model.dtype}; paged attention: "
        + ", ".join(f"{kind} {name}" for kind, name in chosen.items())
    )
