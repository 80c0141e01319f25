"""A kernel of your own, fused residual + RMSNorm: declared, checked, tuned, used in a model."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from aidx.cli import main as aidx
from aidx.kernels import Case, Fold, KernelBuilder, op_check


def reference(x, residual, scale, *, eps=1e-6):
    """`h = x + residual`, `y = h / sqrt(mean(h^2) + eps) * scale` of x `[rows, D]`: (y, h)."""
    h = x.astype(jnp.float32) + residual.astype(jnp.float32)
    y = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + eps) * scale[None]
    return y.astype(x.dtype), h.astype(x.dtype)


def mosaic(x, residual, scale, eps, config, interpret):
    """One warpgroup a row: one read, one write; a thread loads up to `config` elements at once."""
    (rows, width), like = x.shape, jax.ShapeDtypeStruct(x.shape, x.dtype)
    if rows == 0 or width % 128:
        raise NotImplementedError(f"takes some rows of a multiple of 128 elements, not {x.shape}")
    vector = next(v for v in (config, 4, 1) if width % (128 * v) == 0)

    def body(x_ref, residual_ref, scale_ref, y_ref, h_ref):
        row, layout = jax.lax.axis_index("row"), plgpu.Layout.WG_STRIDED((width,), vector)
        load = lambda ref: plgpu.load(ref, layout=layout).astype(jnp.float32)
        h = load(x_ref.at[row]) + load(residual_ref.at[row])
        y = h * jax.lax.rsqrt(jnp.sum(h * h) / width + eps) * load(scale_ref)
        y_ref[row], h_ref[row] = y.astype(x.dtype), h.astype(x.dtype)

    how = {"grid": (rows,), "grid_names": ("row",), "interpret": interpret}
    return plgpu.kernel(body, out_type=(like, like), **how)(x, residual, scale)


on = lambda machine: lambda x, residual, scale, *, eps=1e-6, config: mosaic(
    x, residual, scale, eps, config, machine)  # fmt: skip
builder = KernelBuilder("add_rms_norm").reference(reference).batching(Fold(("x", "residual")))
builder = builder.sharding("n d, n d, d -> n d, n d", replicated=("d",))
builder = builder.tuning((4, 8), shapes=["8192x4096:bfloat16 8192x4096:bfloat16 4096:bfloat16"])
add_rms_norm = builder.implementation("mosaic_gpu", on(None), platforms=("cuda",)).build()
emulated = builder.implementation("own", on(plgpu.InterpretGPUParams())).build(registry=None)


def model(layers, x):
    delta = jnp.zeros_like(x)
    for layer in layers:
        y, x = add_rms_norm(x, delta, layer["scale"])
        delta = jax.nn.gelu(y @ layer["up"]) @ layer["down"]
    return x + delta


if __name__ == "__main__":
    cases = [Case(f"{n} x 128", ((n, 128), (n, 128), (128,))) for n in (3, 1)]
    op_check(emulated, cases, laws=("reference", "gradient", "determinism"))
    op_check(add_rms_norm, cases)  # every law, on what this machine takes
    aidx(["tune", "--op", "add_rms_norm", "--import", "examples.custom_kernel"])
    layers = [{"scale": jnp.ones(128), "up": jnp.eye(128), "down": jnp.eye(128)}] * 2
    gradient = jax.jit(jax.grad(lambda p: jnp.mean(model(p, jnp.eye(128)) ** 2)))(layers)
    print("gradient of the first scale:", jnp.linalg.norm(gradient[0]["scale"]))
