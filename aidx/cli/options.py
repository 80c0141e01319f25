"""Options that several commands share, and what they become."""

import argparse
import importlib.resources
import pathlib
from types import MappingProxyType
from typing import Any

EMBEDDED = "embedded"
DRAFT = "embedded-draft"


def embedded_path(name: str = EMBEDDED) -> pathlib.Path:
    """The directory of an embedded checkpoint: `embedded`, or `embedded-draft`, its draft model.

    Raises:
      FileNotFoundError: the package was installed without its data.

    >>> embedded_path().name
    'embedded'
    """
    path = pathlib.Path(str(importlib.resources.files("aidx"))) / "data" / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no embedded checkpoint {name!r} in this installation (examples/train_embedded.py)"
        )
    return path


def resolve_model(name: str) -> str | pathlib.Path:
    """What `--model` means: the embedded checkpoints by name, anything else as it is.

    >>> resolve_model("org/name")
    'org/name'
    """
    return embedded_path(name) if name in (EMBEDDED, DRAFT) else name


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1.

    >>> positive("3")
    3
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and what the engine is told at its start."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="PATH",
        help="a Hugging Face checkpoint: a directory, or org/name on the hub "
        f"(default: {EMBEDDED}, a small model of Python source; {DRAFT} is its draft)",
    )
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    group.add_argument("--max-model-len", type=positive, metavar="N", help="tokens of a sequence")
    group.add_argument(
        "--allow-long-max-model-len",
        action="store_true",
        default=None,
        help="more of them than the model is made for",
    )
    group.add_argument("--max-num-seqs", type=positive, metavar="N", help="sequences at once")
    group.add_argument(
        "--max-num-batched-tokens", type=positive, metavar="N", help="tokens of a step"
    )
    group.add_argument("--block-size", type=positive, metavar="N", help="tokens of a cache block")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--num-blocks", type=positive, metavar="N", help="blocks of the cache")
    size.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE")


ENGINE_OPTIONS = (
    "max_model_len",
    "allow_long_max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_blocks",
    "gpu_memory_utilization",
)


def engine_options(args: argparse.Namespace, **defaults: Any) -> dict[str, Any]:
    """Keyword arguments of `LLM`: what was given, over a command's own defaults.

    >>> args = argparse.Namespace(dtype="auto", max_num_seqs=4)
    >>> engine_options(args, max_num_seqs=8, block_size=16)
    {'dtype': 'auto', 'max_num_seqs': 4, 'block_size': 16}
    """
    given = {name: getattr(args, name, None) for name in ENGINE_OPTIONS}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {"dtype": args.dtype, **defaults, **chosen}


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How tokens are drawn; what is not given is the checkpoint's generation_config.json."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=positive, default=max_tokens, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0: the most likely token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--seed", type=int, help="the same seed draws the same tokens")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be given repeatedly")


SAMPLING_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "n",
)
ANY = MappingProxyType({"do_sample": True})


def sampling_params(args: argparse.Namespace, generation_config: Any = ANY) -> Any:
    """`SamplingParams`: the checkpoint's defaults under what was given.

    Without a checkpoint's it refuses what none could mend, before one is loaded.

    >>> args = argparse.Namespace(max_tokens=8, temperature=None, seed=3)
    >>> params = sampling_params(args, {"do_sample": True, "temperature": 0.6})
    >>> params.temperature, params.max_tokens, params.seed
    (0.6, 8, 3)
    """
    from aidx.engine import SamplingParams

    given = {name: getattr(args, name, None) for name in SAMPLING_OPTIONS}
    chosen = {name: value for name, value in given.items() if value is not None}
    return SamplingParams.from_generation_config(generation_config, **chosen)
