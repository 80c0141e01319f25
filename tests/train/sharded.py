"""A training step over four devices beside one device, in a process of its own."""

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from aidx.kernels import fused
from aidx.models import LlamaConfig, bind_forward, init_params
from aidx.train import init_state, language_model_loss, make_train_step, prefetch


def main():
    config = LlamaConfig(31, 16, 32, 1, 2, 1, 8, tied=True)
    optimizer = optax.sgd(0.5)
    loss_fn = language_model_loss(bind_forward(config), chunk_tokens=16)

    def batch(i):
        draw = np.random.default_rng(i)
        tokens = draw.integers(0, 31, (8, 9), dtype=np.int32)
        targets = np.where(draw.random((8, 8)) < 0.6, tokens[:, 1:], -1)
        return {"tokens": tokens[:, :-1], "targets": targets.astype(np.int32)}

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    found = []
    spread = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    for rows, everywhere, small in ((None, None, 8 << 20), (*spread, 8 << 20), (*spread, 0)):
        fused.SMALL = small  # 0: norms and gates go through their kernels' sharding rules
        step = make_train_step(loss_fn, optimizer, microbatches=2, clip_norm=1.0)
        params = init_params(config, jax.random.key(0))
        state = init_state(params, optimizer, jax.random.key(1))
        state = jax.device_put(state, everywhere)
        for _, data in prefetch(batch, range(3), sharding=rows):
            state, metrics = step(state, data)
        found.append((state.params, metrics.loss, metrics.grad_norm))
        if rows is not None:
            assert data["tokens"].sharding.shard_shape((8, 8)) == (2, 8)
            assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
    for one, *others in zip(*map(jax.tree.leaves, found), strict=True):
        for four in others:
            np.testing.assert_allclose(one, four, rtol=2e-5, atol=1e-6)
    print("equal")


if __name__ == "__main__":
    main()
