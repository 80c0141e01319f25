"""`Tunable`: a function with configurations, and everything that timing them takes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import json
import pathlib
import sys
import tokenize
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of `relative_error`: rounding of operands and of the result, with room for the worst of millions.
TOLERANCE = MappingProxyType(
    {"float64": 1e-6, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Tunable:
    """A function of arrays that may run in several configurations.

    Every function here takes `(*operands, **static)`: operands are pytrees of arrays (or of
    `jax.ShapeDtypeStruct`, where no values are needed), static values are hashable.

    Attributes:
      name: "<op>/<part>"; `aidx tune --op <op>` takes every part.
      run: `run(config, *operands, **static)` -> outputs.
      candidates: the configurations that fit these shapes, the default first.
      reference: what the outputs have to be; it is given float32 copies of float operands and runs
        at the highest matmul precision.
      sources: modules (packages with all they hold) whose code decides the time, by name, or by a
        function of theirs where they cannot be imported by one.
      inputs: `inputs(rng, *operands, **static)` -> operands with values; by default normal floats
        and zeros.  `rng` is a `numpy.random.Generator`.
      key: a dict of what a timing depends on, by default all shapes, dtypes and static values.
      family: a dict of what the compiled code depends on, for the compile gate; by default `key`.
      case: `case(text)` -> (operands, static), what `aidx tune --shapes TEXT` means.
      shapes: the texts that are tuned when none is given.
      tolerance: of `error`, by the dtype of the first float operand.
      error: how far outputs are from the reference's.
      platforms: XLA's names of the platforms it runs on; none means all.
    """

    name: str
    run: Callable[..., Any]
    candidates: Callable[..., Sequence[Hashable]]
    reference: Callable[..., Any]
    sources: tuple[str | Callable[..., Any], ...]
    inputs: Callable[..., tuple[Any, ...]] | None = None
    key: Callable[..., dict[str, Any]] | None = None
    family: Callable[..., dict[str, Any]] | None = None
    case: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    shapes: tuple[str, ...] = ()
    tolerance: Mapping[str, float] = TOLERANCE
    error: Callable[[Any, Any], float] | None = None
    platforms: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether a configuration may hang or corrupt the process: kernels for a GPU do."""
        return "cuda" in self.platforms

    def key_text(self, operands: Any, static: Mapping[str, Any]) -> str | None:
        """The key as JSON; None where a static value has no name that means the same tomorrow."""
        found = (self.key or _default_key)(*operands, **static)
        return None if found is None else canonical(found)

    def family_text(self, operands: Any, static: Mapping[str, Any]) -> str | None:
        """What the compile gate knows these shapes by, as JSON."""
        if self.family is None:
            return self.key_text(operands, static)
        return canonical(self.family(*operands, **static))

    def limit(self, operands: Any) -> float:
        """The tolerance for these operands."""
        floats = [x for x in jax.tree.leaves(operands) if jnp.issubdtype(x.dtype, jnp.floating)]
        return self.tolerance.get(floats[0].dtype.name, 0.0) if floats else 0.0


_TUNABLES: dict[str, Tunable] = {}


def register(tunable: Tunable) -> Tunable:
    """Make a tunable known to `aidx tune`.

    Raises:
      ValueError: there is another of that name, or the name is not "<op>/<part>".

    >>> register(Tunable("nameless", abs, abs, abs, ()))
    Traceback (most recent call last):
    ValueError: the name of a tunable is '<op>/<part>', not 'nameless'
    """
    if not all(tunable.name.partition("/")):
        raise ValueError(f"the name of a tunable is '<op>/<part>', not {tunable.name!r}")
    if tunable.name in _TUNABLES:
        raise ValueError(f"there is a tunable named {tunable.name!r} already")
    _TUNABLES[tunable.name] = tunable
    return tunable


def unregister(name: str) -> None:
    """Forget a tunable.

    Raises:
      ValueError: there is none of that name.

    >>> unregister("nothing/here")
    Traceback (most recent call last):
    ValueError: no tunable named 'nothing/here'; there are ...
    """
    del _TUNABLES[get(name).name]


def get(name: str) -> Tunable:
    """The tunable of that name.

    Raises:
      ValueError: there is none.

    >>> get("nothing/here")
    Traceback (most recent call last):
    ValueError: no tunable named 'nothing/here'; there are ...
    """
    if name not in _TUNABLES:
        raise ValueError(f"no tunable named {name!r}; there are {sorted(_TUNABLES)}")
    return _TUNABLES[name]


def tunables(op: str | None = None) -> tuple[Tunable, ...]:
    """Every part of an op (None: of all ops), by name.

    Raises:
      ValueError: the op has none.

    >>> tunables("no such op")
    Traceback (most recent call last):
    ValueError: nothing of 'no such op' can be tuned; there are ...
    """
    found = [t for n, t in sorted(_TUNABLES.items()) if op in (None, n, n.split("/")[0])]
    if op is not None and not found:
        raise ValueError(f"nothing of {op!r} can be tuned; there are {sorted(_TUNABLES)}")
    return tuple(found)


def load(modules: Sequence[str]) -> None:
    """Import modules for what they register.

    >>> load(["aidx.ops.registry"])
    """
    for name in modules:
        importlib.import_module(name)


# --- what a timing is known by -------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON in one form: keys sorted, no spaces to differ in.

    >>> canonical({"b": 1, "a": (2, None)})
    '{"a": [2, null], "b": 1}'
    """
    return json.dumps(value, sort_keys=True)


def plain(value: Any) -> Any:
    """A configuration, or a static value, as what JSON can hold: dataclasses by name and fields.

    Raises:
      TypeError: something whose name would not mean the same in another process.

    >>> plain((1, np.dtype("int8"), TOLERANCE["float32"]))
    [1, 'int8', 0.001]
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    raise TypeError(f"{value!r} has no name that means the same in another process")


def config_text(config: Hashable) -> str:
    """A configuration as JSON.

    >>> config_text((64, "named"))
    '[64, "named"]'
    """
    return canonical(plain(config))


def _default_key(*operands: Any, **static: Any) -> dict[str, Any] | None:
    """Shapes, dtypes and static values; None where one of those cannot be named."""
    leaf = lambda x: "none" if x is None else f"{x.dtype.name}{list(x.shape)}"
    try:
        named = {name: plain(value) for name, value in static.items()}
    except TypeError:
        return None
    leaves = jax.tree.leaves(operands, is_leaf=lambda x: x is None)
    return {"operands": [leaf(x) for x in leaves], **named}


@functools.lru_cache(maxsize=64)
def code_hash(sources: tuple[str | Callable[..., Any], ...]) -> str:
    """A digest of the code of these modules; comments and blank lines do not count.

    A function stands for its module, or its own file where that is another one (a script that
    runpy ran has left no module behind), or what it compiles to where there is no file at all.

    >>> code_hash(("aidx.ops.rope",)) == code_hash(("aidx.ops.norm",))
    False
    >>> from aidx.ops.rope import apply_rope
    >>> code_hash((apply_rope,)) == code_hash(("aidx.ops.rope",))
    True
    """
    digest = hashlib.sha256()
    for source in sources:
        named = isinstance(source, str)
        name = source if named else source.__module__
        module = sys.modules.get(name) or (importlib.import_module(name) if named else None)
        files = _files(module)
        own = None if named else _code(source)
        if own is not None:
            file = pathlib.Path(own.co_filename)
            known = any(file.resolve() == other.resolve() for other in files)
            files += [file] if file.is_file() and not known else []
        for file in files:
            digest.update(f"{name} {file.name}\0".encode())
            digest.update(_tokens(file.read_text()))
        if not files:  # an interactive session: what its functions compile to
            found = [own] if own is not None else [_code(f) for f in vars(module).values()]
            digest.update("\0".join(_compiled(code) for code in found if code is not None).encode())
    return digest.hexdigest()[:16]


def _files(module: types.ModuleType | None) -> list[pathlib.Path]:
    """The Python files of a module, or of all that a package holds."""
    folders = [pathlib.Path(p) for p in getattr(module, "__path__", ())]
    files = sorted(f for folder in folders for f in folder.rglob("*.py"))
    own = getattr(module, "__file__", None)
    return files or ([] if own is None else [pathlib.Path(own)])


def _code(fn: Any) -> types.CodeType | None:
    """What a function, or an object that is called, compiles to; None for what is no Python."""
    if not callable(fn):
        return None
    fn = inspect.unwrap(fn)
    return getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)


def _compiled(code: types.CodeType) -> str:
    """Instructions, names and constants, those of inner functions too."""
    constants = [
        _compiled(c)
        if isinstance(c, types.CodeType)
        else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return "\0".join([code.co_code.hex(), *code.co_names, *constants])


def _tokens(text: str) -> bytes:
    """The source without comments, blank lines and spaces within lines."""
    skipped = (tokenize.COMMENT, tokenize.NL)
    words = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\0".join(w.string for w in words if w.type not in skipped).encode()


def sizes(text: str) -> dict[str, Any]:
    """`"B=4 T=4096 causal"` as a dict: numbers, words, and True for what has no value.

    >>> sizes("B=4 eps=1e-6 dtype=bfloat16 causal")
    {'B': 4, 'eps': 1e-06, 'dtype': 'bfloat16', 'causal': True}
    """
    found: dict[str, Any] = {}
    for word in text.split():
        name, given, value = word.partition("=")
        found[name] = _number(value) if given else True
    return found


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def case_of(tunable: Tunable, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(operands, static) that a text of the command line stands for.

    Raises:
      ValueError: the tunable has no such texts, or this is none.

    >>> case_of(Tunable("op/part", abs, abs, abs, ()), "B=4")
    Traceback (most recent call last):
    ValueError: op/part says of no text which shapes it means: give its Tunable a `case`
    """
    if tunable.case is None:
        raise ValueError(
            f"{tunable.name} says of no text which shapes it means: give its Tunable a `case`"
        )
    try:
        return tunable.case(text)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{text!r} names no shapes of {tunable.name}: {error!r}") from error


def array_words(text: str) -> tuple[tuple[jax.ShapeDtypeStruct | None, ...], dict[str, Any]]:
    """`"8192x4096:bfloat16 4096:float32 - eps=1e-6"`: operands in order (- is None), then options.

    >>> array_words("8x4:bfloat16 - eps=1e-6")
    ((ShapeDtypeStruct(shape=(8, 4), dtype=bfloat16), None), {'eps': 1e-06})
    """
    operands: list[jax.ShapeDtypeStruct | None] = []
    options: dict[str, Any] = {}
    for word in text.split():
        if "=" in word:
            options |= sizes(word)
        elif word == "-":
            operands.append(None)
        else:
            shape, _, dtype = word.partition(":")
            dims = tuple(int(n) for n in shape.split("x")) if shape else ()
            operands.append(jax.ShapeDtypeStruct(dims, jnp.dtype(dtype or "float32")))
    return tuple(operands), options
