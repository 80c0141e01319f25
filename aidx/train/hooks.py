"""Scopes for the profiler around an optimiser and around the layers of a Flax model."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import optax
from flax import linen, nnx

from ..telemetry.profiler import profile_scope


def profile_optimizer(
    optimizer: optax.GradientTransformation, name: str = "optimizer"
) -> optax.GradientTransformationExtraArgs:
    """The same optimiser; its init and its update are scopes, on the device as well.

    >>> import jax.numpy as jnp
    >>> from aidx.telemetry.profiler import Profiler
    >>> optimizer = profile_optimizer(optax.sgd(0.1))
    >>> with Profiler() as profiler:
    ...     state = optimizer.init(jnp.ones(2))
    ...     updates, state = optimizer.update(jnp.ones(2), state)
    >>> [row.path for row in profiler.report().host]
    [('optimizer',), ('optimizer_init',)]
    """
    inner = optax.with_extra_args_support(optimizer)
    return optax.GradientTransformationExtraArgs(
        profile_scope(f"{name}_init")(inner.init), profile_scope(name)(inner.update)
    )


@contextlib.contextmanager
def profile_layers(*models: nnx.Module) -> Iterator[None]:
    """While it is open, calls of Flax modules are scopes, nested and named as the modules are.

    Linen modules by interception, whichever they are; of NNX the classes that occur in models.
    Code that was compiled before keeps the names that it has.

    Args:
      models: NNX models; none for Linen.

    >>> import jax.numpy as jnp
    >>> from aidx.telemetry.profiler import Profiler
    >>> linear = lambda i, o: nnx.Linear(i, o, rngs=nnx.Rngs(0))
    >>> model = nnx.Sequential(linear(2, 3), linear(3, 1))
    >>> with Profiler() as profiler, profile_layers(model):
    ...     _ = model(jnp.ones((1, 2)))
    >>> [row.path for row in profiler.report().host]
    [('Sequential',), ('Sequential', 'layers_0'), ('Sequential', 'layers_1')]
    """
    here = threading.local()
    kinds = {type(module) for model in models for _, module in nnx.iter_modules(model)}
    own = {kind: kind.__dict__["__call__"] for kind in kinds if "__call__" in kind.__dict__}
    with contextlib.ExitStack() as stack:
        stack.enter_context(linen.intercept_methods(_linen_scope))
        for kind, call in own.items():
            stack.callback(setattr, kind, "__call__", call)
            kind.__call__ = _nnx_scope(call, here)
        yield


def _linen_scope(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    # Linen names the instructions itself.
    name = context.module.name or type(context.module).__name__
    with profile_scope(name, named=False):
        return call(*args, **kwargs)


def _nnx_scope(call: Callable, here: threading.local) -> Callable:
    @functools.wraps(call)
    def scoped(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        open_modules: list[nnx.Module] = here.__dict__.setdefault("modules", [])
        if any(module is other for other in open_modules):  # super().__call__
            return call(module, *args, **kwargs)
        name = name_within(open_modules[-1] if open_modules else None, module)
        open_modules.append(module)
        try:
            with profile_scope(name):
                return call(module, *args, **kwargs)
        finally:
            open_modules.pop()

    return scoped


def name_within(parent: Any, module: Any) -> str:
    """The attribute that a module is of the one that calls it, or the name of its class.

    Under a transformation modules are made anew, and what names them is where they are.

    >>> name_within(None, nnx.Dropout(0.5))
    'Dropout'
    """
    for name, value in vars(parent).items() if parent is not None else ():
        if value is module:
            return name
        for i, item in enumerate(value if isinstance(value, list | tuple | nnx.List) else ()):
            if item is module:
                return f"{name}_{i}"
    return type(module).__name__
