"""`aidx train`: text on disk in, a model that `aidx generate` serves out."""

import argparse
import contextlib
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train or fine-tune on text",
        description="Train a model from scratch or fine-tune a checkpoint (all of it, or a LoRA) "
        "on text and JSONL files. A run that was stopped goes on when it is started again.",
        epilog="examples:\n"
        "  aidx train --config run.toml\n"
        "  aidx train --config run.toml --set train.steps=100 --set optimizer.learning_rate=1e-4\n"
        '  aidx generate --model run/model "Once upon a time"\n\n'
        "run.toml (docs/training.md lists every option):\n"
        '  [model]\n  path = "embedded"\n'
        '  [data]\n  train = ["notes/"]\n  heldout = ["heldout.txt"]\n  length = 1024\n'
        "  [train]\n  epochs = 3\n"
        "  [lora]\n  rank = 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a .toml or .json recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.OPTION=VALUE",
        help="change one option of the recipe (the value as TOML)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and print where the model is."""
    from aidx.cli.options import resolve_model
    from aidx.train.loop import ProgressBar
    from aidx.train.recipe import Recipe, run_recipe

    sections = read_sections(args.config, args.set)
    path = sections.get("model", {}).get("path")
    if path is not None:
        sections["model"]["path"] = str(resolve_model(path))
    recipe = Recipe.parse(sections)
    with contextlib.ExitStack() as stack:
        callbacks: list[Any] = [] if args.quiet else [ProgressBar()]
        if recipe.output.tensorboard:
            from aidx.telemetry.tensorboard import SummaryWriter, TensorBoardCallback

            writer = stack.enter_context(SummaryWriter(f"{recipe.output.folder}/tensorboard"))
            callbacks.append(TensorBoardCallback(writer))
        result, _ = run_recipe(recipe, callbacks)
    report = {"reason": result.reason, "steps": int(result.state.step), **result.metrics}
    report |= {f"heldout_{name}": value for name, value in result.evaluation.items()}
    print(json.dumps(report | {"model": f"{recipe.output.folder}/model"}))
    return 0


def read_sections(file: str, changes: list[str]) -> dict[str, Any]:
    """The recipe's file as nested dicts, with `section.option=value` laid over it.

    Raises:
      ValueError: the file or a change cannot be read.
    """
    import pathlib
    import tomllib

    text = pathlib.Path(file).read_text(encoding="utf-8")
    try:
        sections = json.loads(text) if file.endswith(".json") else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for change in changes:
        name, equals, value = change.partition("=")
        section, dot, option = name.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set {change!r} is not SECTION.OPTION=VALUE")
        try:
            sections.setdefault(section, {})[option] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:  # a bare word is a string
            sections.setdefault(section, {})[option] = value
    return sections
