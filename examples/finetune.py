"""Fine-tune all weights of a checkpoint on your text, step by step.

    python examples/finetune.py notes/ --out tuned                # the embedded model
    python examples/finetune.py chat.jsonl --model org/name --steps 200
    aidx generate --model tuned "def main("

Text files, or JSONL with {"text"}, {"prompt", "completion"} or {"messages"} a line.  `aidx train`
does the same from a recipe file; here every part is in sight.  A run that is killed goes on where
its last checkpoint is when the same command is given again.
"""

import argparse
import pathlib

import jax
import optax

from aidx.cli.options import resolve_model
from aidx.models import load_model, save_model
from aidx.train import (
    Checkpoints,
    PackedTokens,
    ProgressBar,
    fit,
    init_state,
    language_model_loss,
    make_train_step,
    read_documents,
    train_flops_per_token,
    write_tokens,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="+", type=pathlib.Path, help="files or folders")
    parser.add_argument("--model", default="embedded", help="a directory or a name on the hub")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tuned"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    args = parser.parse_args(argv)

    model = load_model(resolve_model(args.model), dtype="float32")  # master weights
    documents = read_documents(args.text, model.tokenizer)
    data = PackedTokens(
        write_tokens(args.out / "tokens", documents, model.vocab_size), args.batch, args.length
    )

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, min(20, args.steps // 2), args.steps
    )
    optimizer = optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    step = make_train_step(
        language_model_loss(model.forward), optimizer, clip_norm=1.0, compute_dtype=args.dtype
    )
    state = init_state(model.params, optimizer, jax.random.key(0))

    with Checkpoints(args.out / "checkpoints", keep=1) as checkpoints:
        result = fit(
            step,
            state,
            data.batch,
            steps=args.steps,
            checkpoints=checkpoints,
            save_every=100,
            callbacks=[ProgressBar()],
            flops_per_token=train_flops_per_token(model.config, args.length),
        )
    save_model(model.replace(params=result.state.params), args.out)
    print(f"loss {result.metrics.get('loss', float('nan')):.4f}; the model is in {args.out}")


if __name__ == "__main__":
    main()
