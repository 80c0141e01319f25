"""Run by test_tensor_parallel.py with two devices: the tokens of one device, from both."""

import dataclasses

import jax
import numpy as np

from aidx.engine import SamplingParams
from aidx.models.sharding import shard_params
from tests.engine.tiny import CONFIG, engine, model

PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [9], list(range(20, 41)))


def tokens(served) -> list[tuple[int, ...]]:
    params = (
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
    )
    names = [served.add_request(p, s) for p, s in zip(PROMPTS, params, strict=True)]
    done = {}
    while served.has_unfinished:
        done |= {o.request_id: o.outputs[0] for o in served.step()}
    assert all(done[name].finish_reason == "length" for name in names), done
    return [done[name].token_ids for name in names]


def main() -> None:
    config = dataclasses.replace(CONFIG, vocab_size=96)  # 97 does not divide over two devices
    params = jax.tree.map(np.asarray, model().params)
    params["embed"], params["lm_head"] = params["embed"][:96], params["lm_head"][:96]
    forward = dataclasses.replace(model(), config=config).forward
    alone = engine(forward=forward, params=jax.device_put(params), vocab_size=96)
    mesh = jax.make_mesh((2,), ("tensor",))
    spread = engine(forward=forward, params=shard_params(config, params, mesh), vocab_size=96)
    assert len(jax.devices()) == 2
    assert tokens(alone) == tokens(spread)
    pool = spread._device.cache.k[0]
    assert pool.sharding.shard_shape(pool.shape)[1] == pool.shape[1] // 2
    print("equal")


if __name__ == "__main__":
    main()
