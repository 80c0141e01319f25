"""One tiny model and one set of limits for all engine tests, so that they share compiled steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aidx.cache import no_cache_attend
from aidx.engine import Engine, EngineConfig, SamplingParams
from aidx.models import LlamaConfig, Model, init_params
from aidx.ops.sampling import sample, sampling_rows

VOCAB, LENGTH = 97, 64
CONFIG = LlamaConfig(VOCAB, 32, 64, 2, 4, 2, 8)
LIMITS = dict(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    num_blocks=41,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    max_model_len=LENGTH,
    max_logprobs=6,
)


@functools.cache
def model() -> Model:
    # Norm scales of their own and a wide spread, so that every position and layer matters.
    params = init_params(CONFIG, jax.random.key(0), std=0.3)
    return Model(CONFIG, params)


class Letters:
    """A byte tokenizer: ids 0-95 are printable characters, 96 is the end of sequence."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - 32 for c in text]

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(chr(i + 32) if i < 96 else "" for i in ids)


def engine(*, hold=0, tokenizer=None, forward=None, params=None, **options) -> Engine:
    """An engine of the shared limits; `hold` blocks of its pool are somebody else's."""
    made = Engine(
        forward or model().forward,
        params if params is not None else model().params,
        EngineConfig(**(LIMITS | options)),
        tokenizer=tokenizer,
    )
    if hold:
        pool, _ = made.pool.allocate(hold)
        made._batch = made._batch.__class__(**{**vars(made._batch), "pool": pool})
    return made


def run(made, limit=2000):
    """Step until everything is done; finished outputs by request id."""
    done = {}
    for _ in range(limit):
        if not made.has_unfinished:
            return done
        for output in made.step():
            if output.finished:
                done[output.request_id] = output
    raise AssertionError(f"not done after {limit} steps: {made.stats()}")


def generate(prompts, params, *, made=None, **options):
    """Outputs in order; one `SamplingParams` for all or one each."""
    made = made or engine(**options)
    each = params if isinstance(params, list) else [params] * len(prompts)
    names = [made.add_request(p, q) for p, q in zip(prompts, each, strict=True)]
    done = run(made)
    return [done[name] for name in names]


def tokens_of(outputs):
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


@jax.jit
def _dense(params, tokens):
    positions = jnp.arange(LENGTH, dtype=jnp.int32)
    return model().forward(params, tokens, positions, no_cache_attend(), None)[0]


def dense_logits(tokens, params=None):
    """Logits [len(tokens), V] by the plain forward without any cache."""
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_dense(model().params if params is None else params, padded))[: len(tokens)]


_draw = jax.jit(functools.partial(sample, variant="plain"))


def dense_tokens(prompt, params, index=0):
    """What the engine must give: recompute everything for every token, sample by the public op."""
    tokens = list(prompt)
    for _ in range(params.max_tokens):
        rows = sampling_rows(1, seed=params.seed or 0, sample=index, temperature=params.temperature)
        logits = jnp.asarray(dense_logits(tokens)[-1:])
        tokens.append(int(_draw(logits, rows, jnp.array([len(tokens)])).tokens[0]))
    return tokens[len(prompt) :]


def assert_same(prompt, got, wanted):
    """Equal, or different from a tie on: the reference's best two logits within 1e-4 of the scale.

    Returns whether there was a tie.
    """
    if list(got) == list(wanted):
        return False
    at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
    logits = dense_logits([*prompt, *wanted[:at]])[-1]
    best = np.sort(logits)[-2:]
    assert best[1] - best[0] <= 1e-4 * np.abs(logits).max(), (prompt, at, got, wanted)
    print(f"tie at token {at} of {prompt}")
    return True


PROMPTS = [
    np.random.default_rng(n).integers(0, VOCAB - 1, size=n).tolist() for n in (3, 7, 30, 12, 1, 20)
]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
SEEDED = [SamplingParams(temperature=0.9, max_tokens=10, seed=i) for i in range(len(PROMPTS))]
