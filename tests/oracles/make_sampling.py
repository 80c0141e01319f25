"""What transformers' logits processors leave of random logits: golden values of tests/ops.

    python tests/oracles/make_sampling.py --out tests/oracles
    python tests/oracles/make_sampling.py --out DIR --seed 7 --rows 200

Needs torch, transformers and numpy, not aidx.  The processors are called in the order that aidx
defines (repetition penalty, temperature, min_p, top_k, top_p); the logits are stored with the
scores that come out, -inf for a token that may not be drawn.
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers

VOCAB, SEEN = 96, 10
torch.set_num_threads(1)


def row(rng):
    """One row's inputs and what the processors make of them."""
    logits = (3 * rng.standard_normal(VOCAB)).astype(np.float32)
    seen = rng.randint(0, VOCAB, SEEN)
    p = {
        "temperature": rng.choice([0.4, 0.7, 1.0, 1.5]),
        "top_k": rng.choice([0, 1, 8, 50]),
        "top_p": rng.choice([1.0, 0.95, 0.8, 0.3]),
        "min_p": rng.choice([0.0, 0.01, 0.1]),
        "repetition_penalty": rng.choice([1.0, 1.2, 0.8]),
        "stop": rng.randint(0, VOCAB),
        "min_tokens": rng.choice([0, SEEN + 1]),
        "bias_token": rng.randint(0, VOCAB),
        "bias": rng.choice([0.0, 4.0, -4.0]),
    }
    processors = []
    if p["min_tokens"]:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(0, int(p["min_tokens"]), int(p["stop"]))
        )
    processors.append(
        transformers.SequenceBiasLogitsProcessor([[[int(p["bias_token"])], float(p["bias"])]])
    )
    processors.append(transformers.RepetitionPenaltyLogitsProcessor(float(p["repetition_penalty"])))
    processors.append(transformers.TemperatureLogitsWarper(float(p["temperature"])))
    if p["min_p"]:
        processors.append(transformers.MinPLogitsWarper(float(p["min_p"])))
    if p["top_k"]:
        processors.append(transformers.TopKLogitsWarper(int(p["top_k"])))
    if p["top_p"] < 1:
        processors.append(transformers.TopPLogitsWarper(float(p["top_p"])))
    scores, ids = torch.from_numpy(logits)[None], torch.from_numpy(seen)[None]
    for processor in processors:
        scores = processor(ids, scores)
    return {"logits": logits, "seen": seen.astype(np.int32), "scores": scores[0].numpy(), **p}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    rng = np.random.RandomState(args.seed)
    rows = [row(rng) for _ in range(args.rows)]
    stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
    np.savez_compressed(args.out / "sampling.npz", **stacked)


if __name__ == "__main__":
    main()
