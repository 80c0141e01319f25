"""Fine-tune a checkpoint through low-rank adapters (Hu et al., 2021): the base stays as it is.

    python examples/lora.py chat.jsonl --model org/name --rank 16 --out tuned

The model knows nothing of it.  `Lora.merge` is a function of (base, adapters) and runs inside the
loss; the step trains the adapters, and is given the base as a further argument, which it neither
donates nor differentiates.  The base may be bf16: its memory is that of inference.
"""

import argparse
import pathlib

import jax
import optax

from aidx.cli.options import resolve_model
from aidx.models import load_model, save_model
from aidx.train import (
    Lora,
    PackedTokens,
    ProgressBar,
    fit,
    init_state,
    language_model_loss,
    make_train_step,
    read_documents,
    write_tokens,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="+", type=pathlib.Path, help="files or folders")
    parser.add_argument("--model", default="embedded", help="a directory or a name on the hub")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tuned"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(argv)

    model = load_model(resolve_model(args.model))
    documents = read_documents(args.text, model.tokenizer)
    data = PackedTokens(
        write_tokens(args.out / "tokens", documents, model.vocab_size), args.batch, args.length
    )

    lora = Lora(rank=args.rank, alpha=2.0 * args.rank)
    adapters = lora.init(model.params, jax.random.key(1))
    optimizer = optax.adamw(optax.cosine_decay_schedule(args.learning_rate, args.steps))
    loss_fn = language_model_loss(model.forward, params_of=lora.params_of)
    step = make_train_step(loss_fn, optimizer, clip_norm=1.0)
    state = init_state(adapters, optimizer, jax.random.key(0))
    trained = sum(x.size for x in jax.tree.leaves(adapters))
    print(f"{trained:,} parameters of {sum(x.size for x in jax.tree.leaves(model.params)):,}")

    result = fit(
        step,
        state,
        data.batch,
        steps=args.steps,
        rest=(model.params,),
        callbacks=[ProgressBar()],
    )
    save_model(model.replace(params=lora.merge(model.params, result.state.params)), args.out)
    print(f"loss {result.metrics['loss']:.4f}; the merged model is in {args.out}")


if __name__ == "__main__":
    main()
