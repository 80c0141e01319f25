"""Pytrees as bytes and back: exact, checked, without pickle.

    bytes 0-7     b"AIDXTREE"
    bytes 8-11    version, u32 (little-endian, as everything here)
    bytes 12-15   crc32 of bytes 16 to the end of the header
    bytes 16-23   length of what follows, u64
    bytes 24-     a safetensors file: header length u64, header (JSON), tensors

The header's `__metadata__` holds the tree (containers, registered classes and their static fields,
Python scalars; an array is its number) and the crc32 of every 16 MiB of every tensor.  Anything
that reads safetensors reads the tensors from byte 24 on.  Dtypes that safetensors does not know
travel as bytes, and their names in the tree.

Classes are never found by name in a module: a room registers its own with `register`, and bytes
that name another class are refused.
"""

import concurrent.futures
import dataclasses
import enum
import functools
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MAGIC, VERSION = b"AIDXTREE", 1
PREFIX = struct.Struct("<8sIIQ")
CHUNK = 16 << 20  # bytes under one crc32
BLOCK = 1 << 20  # bytes that stay in a core's cache between two passes
LINE = 64  # bytes of a cache line; XLA takes over what is aligned to it
MAX_DEPTH = 64

NATIVE = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32",
    "F64": "float64", "C64": "complex64", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""safetensors' names of the dtypes that it knows."""
TAGS = {name: tag for tag, name in NATIVE.items()}
FOREIGN = (
    "complex128", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4", "uint2", "uint4",
)  # fmt: skip
"""Dtypes that travel as bytes; of fewer than 8 bits, one value takes a byte, as in NumPy."""
NARROW = ("float4_e2m1fn", "int2", "int4", "uint2", "uint4")

ARRAYS = (jax.Array, np.ndarray, np.generic)

_CLASSES: dict[str, type] = {}
_NAMES: dict[type, str] = {}
_CHECKS: dict[type, Callable[[Any], None]] = {}


def register(
    cls: type, *, name: str | None = None, validate: Callable[[Any], None] | None = None
) -> type:
    """Let instances of a class be serialised: a dataclass, a named tuple or an enum.

    Its fields, static ones included, are what is written; it is made again by
    `cls(**fields)`.  Registering a class again changes nothing.

    Args:
        cls: the class; it can be used as a decorator.
        name: in the bytes, hence for ever; None is `aidx.<class>` (the top package's name).
        validate: called with what was read; raises ValueError for what must not exist.

    Raises:
        TypeError: another kind of class.
        ValueError: the name belongs to another class.

    Example:
        >>> @register
        ... @dataclasses.dataclass(frozen=True)
        ... class Point:
        ...     x: int
        >>> deserialize(serialize(Point(3)))
        Point(x=3)
    """
    if not (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields") or issubclass(cls, enum.Enum)):
        raise TypeError(f"{cls.__qualname__} is neither a dataclass nor a named tuple nor an enum")
    name = name or f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"
    holder = _CLASSES.get(name)
    if holder is not None and _identity(holder) != _identity(cls):
        raise ValueError(f"the name {name!r} belongs to {_identity(holder)}")
    _CLASSES[name], _NAMES[cls] = cls, name
    if validate is not None:
        _CHECKS[cls] = validate
    return cls


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def serialize(tree: Any) -> memoryview:
    """A pytree as read-only bytes: exact, in one pass at the speed of memory.

    Containers are dicts (string or integer keys), lists, tuples, None and registered classes;
    leaves are JAX and NumPy arrays of every dtype, typed PRNG keys, Python scalars and strings.

    Returns:
        All the bytes, as a read-only memoryview: `file.write` and `deserialize` take it as it is,
        `bytes(...)` copies it.

    Raises:
        TypeError: something else; the message says where.
        ValueError: the tree is nested more than 64 deep.

    Example:
        >>> data = serialize({"w": jnp.ones((2, 3), jnp.bfloat16), "step": 7})
        >>> tree = deserialize(data)
        >>> tree["w"].dtype.name, tree["step"]
        ('bfloat16', 7)
    """
    arrays: list[tuple[str, tuple[int, ...], np.ndarray]] = []
    node = _encode(tree, arrays, "", 0)
    # First what keeps its successor aligned to a cache line, where `deserialize` need not copy;
    # then wide elements before narrow ones: every tensor is aligned to its own width.
    place = lambda i: (arrays[i][2].nbytes % LINE != 0, -arrays[i][2].itemsize)
    order = sorted(range(len(arrays)), key=place)
    entries, views, end = [], [], 0
    for i in order:
        tag, shape, array = arrays[i]
        stop = end + array.nbytes
        entries.append(
            f',"{i}":{{"dtype":"{tag}","shape":{list(shape)},"data_offsets":[{end},{stop}]}}'
        )
        views.append(array.reshape(-1).view(np.uint8))
        end = stop
    prologue = f'{{"__metadata__":{{"tree":{json.dumps(json.dumps(node))},"crc32":'
    blank = _sums_text(order, [[0] * max(1, -(-view.size // CHUNK)) for view in views])
    room = len(prologue) + len(blank) + 1 + sum(map(len, entries)) + 1  # all of it is ASCII
    room += -(PREFIX.size + 8 + room) % LINE
    start = PREFIX.size + 8 + room
    out = _aligned(start + end)
    sums = _checksums(views, out[start:])
    text = "".join([prologue, _sums_text(order, sums), "}", *entries, "}"]).encode().ljust(room)
    body = struct.pack("<Q", room) + text
    total = len(body) + end
    checksum = zlib.crc32(body, zlib.crc32(struct.pack("<Q", total)))
    out[:start] = np.frombuffer(PREFIX.pack(MAGIC, VERSION, checksum, total) + body, np.uint8)
    return _sealed(out)


def deserialize(data: bytes | bytearray | memoryview, *, numpy: bool = False) -> Any:
    """The tree that `serialize` wrote.

    NumPy arrays are read-only views of `data`; JAX arrays are on the default device.  On a CPU
    those of 1 MiB and more share the memory of data that cannot change: what `serialize` returned,
    what `load_tree` read, `bytes` that happen to be aligned.  Nothing is believed before its
    checksum, and nothing is allocated that the input does not hold.

    Args:
        data: all the bytes.
        numpy: return JAX arrays as NumPy's, for 64-bit ones where x64 is off.

    Raises:
        ValueError: anything that `serialize` did not write: truncated, corrupted, of another
            version, with a class that is not registered; or a 64-bit JAX array while x64 is off.

    Example:
        >>> deserialize(b"AIDXTREE" + bytes(24))
        Traceback (most recent call last):
        ValueError: version 0 of the format; this reads version 1
    """
    buffer = memoryview(data).cast("B")
    header, tensors = _read_header(buffer.toreadonly())
    arrays, tree = _read_tensors(header, tensors)
    put = _keep if numpy else functools.partial(_to_jax, constant=_is_constant(buffer))
    return _decode(tree, arrays, put, 0)


def save_tree(path: str | Path, tree: Any) -> None:
    """`serialize` into a file, which is there completely or not at all.

    Raises:
        TypeError, ValueError: as `serialize`; OSError: as the file system says.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree(f"{folder}/tree.aidx", [1, 2.5])
        ...     load_tree(f"{folder}/tree.aidx")
        [1, 2.5]
    """
    path, data = Path(path), serialize(tree)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def load_tree(path: str | Path, *, numpy: bool = False) -> Any:
    """`deserialize` a file of `save_tree`.

    Raises:
        ValueError: as `deserialize`; FileNotFoundError: there is no such file.

    Example:
        >>> load_tree("no/such/file")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = _aligned(size)
        read = file.readinto(data.data)
    return deserialize(_sealed(data[:read]), numpy=numpy)


# --- writing -------------------------------------------------------------------------------------


def _encode(x: Any, arrays: list, where: str, depth: int) -> Any:
    """The JSON node of a value; its arrays are appended to `arrays`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where or 'the tree'} is nested more than {MAX_DEPTH} deep")
    inner = lambda value, key: _encode(value, arrays, f"{where}/{key}", depth + 1)
    if type(x) is np.ndarray:
        return _encode_array(x, arrays, where)
    if type(x) in _NAMES:
        return _encode_object(x, inner)
    if x is None or type(x) in (bool, str):
        return {"value": x}
    if type(x) is int:
        return {"int": str(x)}
    if type(x) is float:
        return {"float": x.hex()}
    if type(x) is complex:
        return {"complex": [x.real.hex(), x.imag.hex()]}
    if type(x) in (list, tuple):
        return {type(x).__name__: [inner(value, i) for i, value in enumerate(x)]}
    if type(x) is dict:
        if bad := [key for key in x if type(key) not in (str, int)]:
            raise TypeError(f"key {bad[0]!r} in {where or 'the tree'} is no string and no integer")
        return {"dict": [[key, inner(value, key)] for key, value in x.items()]}
    if isinstance(x, np.dtype) or (isinstance(x, type) and hasattr(x, "dtype")):
        return {"dtype": np.dtype(x).name}
    if isinstance(x, ARRAYS):
        return _encode_array(x, arrays, where)
    raise TypeError(
        f"{where or 'the tree'} is a {_identity(type(x))}, which is not registered; registered: "
        f"{', '.join(sorted(_CLASSES)) or 'none'}"
    )


def _encode_object(x: Any, inner: Callable) -> Any:
    name = _NAMES[type(x)]
    if isinstance(x, enum.Enum):
        return {"enum": [name, x.name]}
    return {"class": name, "fields": [[f, inner(getattr(x, f), f)] for f in _fields(type(x))]}


def _fields(cls: type) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [f.name for f in dataclasses.fields(cls) if f.init]
    return list(cls._fields)  # pyright: ignore - a named tuple


def _encode_array(x: Any, arrays: list, where: str) -> Any:
    node: dict[str, Any] = {"array": len(arrays), "of": "numpy"}
    if type(x) is np.ndarray:
        pass
    elif isinstance(x, Tracer):
        raise TypeError(f"{where or 'the tree'} is traced: serialise outside jit")
    elif isinstance(x, jax.Array):
        node["of"] = "jax"
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            node["key"] = str(jax.random.key_impl(x))
            x = jax.random.key_data(x)
    elif isinstance(x, np.generic):
        node["of"] = "scalar"
    array = np.asarray(x, order="C")
    dtype = array.dtype
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    name = _name_of(dtype)
    if name in TAGS:
        arrays.append((TAGS[name], array.shape, array))
    elif name in FOREIGN:
        flat = array.reshape(-1).view(np.uint8)
        node |= {"dtype": name, "shape": list(array.shape)}
        arrays.append(("U8", flat.shape, flat))
    else:
        raise TypeError(f"{where or 'the tree'} has dtype {array.dtype}, which has no bytes")
    return node


@functools.cache
def _name_of(dtype: np.dtype) -> str:
    return dtype.name  # NumPy puts it together anew each time


class _Written(np.ndarray):
    """Bytes that only this module writes, and only until it hands them out."""


def _aligned(size: int) -> np.ndarray:
    """Bytes that begin with a cache line, as XLA wants them."""
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size]


def _sealed(out: np.ndarray) -> memoryview:
    """The bytes, read-only, in a form that `deserialize` may share."""
    out.flags.writeable = False
    return out.view(_Written).data


def _sums_text(order: list[int], sums: list[list[int]]) -> str:
    """The checksums as a JSON string of JSON, as long whatever they are."""
    pairs = zip(order, sums, strict=True)
    inner = [f'\\"{i}\\":[{",".join([f"{s:10d}" for s in of])}]' for i, of in pairs]
    return f'"{{{",".join(inner)}}}"'


def _checksums(views: list[np.ndarray], out: np.ndarray | None = None) -> list[list[int]]:
    """The crc32 of every `CHUNK` of every view, which are copied one after another into `out`."""
    pieces, counts, end = [], [], 0
    for view in views:
        counts.append(max(1, -(-view.size // CHUNK)))
        for i in range(counts[-1]):
            part = view[i * CHUNK : (i + 1) * CHUNK] if counts[-1] > 1 else view
            pieces.append((part, None if out is None else out[end : end + part.size]))
            end += part.size
    sums = iter(_parallel(_checksum, pieces, end))
    return [[next(sums) for _ in range(count)] for count in counts]


def _checksum(pair: tuple[np.ndarray, np.ndarray | None]) -> int:
    """The crc32 of a piece, which is copied while it is in the cache."""
    source, target = pair
    if target is None:
        return zlib.crc32(source)
    checksum = 0
    for i in range(0, source.size, BLOCK):
        checksum = zlib.crc32(source[i : i + BLOCK], checksum)
        target[i : i + BLOCK] = source[i : i + BLOCK]
    return checksum


def _parallel(f: Callable, pieces: list, size: int) -> list:
    """`map`, in threads where there is much to do: zlib and NumPy let each other run."""
    if size < CHUNK:
        return [f(piece) for piece in pieces]
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(f, pieces))


# --- reading -------------------------------------------------------------------------------------


def _read_header(buffer: memoryview) -> tuple[dict[str, Any], memoryview]:
    """The checked header and the bytes of the tensors."""
    if len(buffer) < PREFIX.size + 8:
        raise ValueError(f"{len(buffer)} bytes are too few for a tree")
    magic, version, checksum, total = PREFIX.unpack_from(buffer)
    if magic != MAGIC:
        raise ValueError(f"no tree: the bytes begin with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"version {version} of the format; this reads version {VERSION}")
    if total != len(buffer) - PREFIX.size:
        here = len(buffer) - PREFIX.size
        raise ValueError(f"{total} bytes were written after the prefix, {here} are here")
    (length,) = struct.unpack_from("<Q", buffer, PREFIX.size)
    start = PREFIX.size + 8
    if length > len(buffer) - start:
        raise ValueError(f"a header of {length} bytes in {len(buffer)}")
    if zlib.crc32(buffer[16 : start + length]) != checksum:
        raise ValueError("the header is corrupted: its checksum differs")
    return _json(bytes(buffer[start : start + length]), dict), buffer[start + length :]


def _json(text: bytes | str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _get(node: Any, name: str, kind: type) -> Any:
    if type(node) is not dict or type(node.get(name)) is not kind:
        raise ValueError(f"no {kind.__name__} {name!r} in {str(node)[:80]}")
    return node[name]


def _sizes(node: Any, name: str) -> list[int]:
    """A list of sizes; every one fits an index, and their product is counted by Python."""
    sizes = _get(node, name, list)
    for n in sizes:
        if type(n) is not int or not 0 <= n < 2**62:
            break
    else:
        if len(sizes) <= 64:
            return sizes
    raise ValueError(f"{name} {str(sizes)[:80]} are no sizes")


def _read_tensors(header: dict, tensors: memoryview) -> tuple[dict[int, np.ndarray], Any]:
    """Every tensor as a view, checked against its checksum; and the tree."""
    metadata = _get(header, "__metadata__", dict)
    tree = _json(_get(metadata, "tree", str), dict)
    sums = _json(_get(metadata, "crc32", str), dict)
    entries = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tag, shape = _get(entry, "dtype", str), _sizes(entry, "shape")
            offsets = _sizes(entry, "data_offsets")
            if tag not in NATIVE or len(offsets) != 2 or not name.isdecimal():
                raise ValueError(f"tensor {name[:40]!r}: {str(entry)[:80]}")
            dtype, (start, stop) = _dtype(NATIVE[tag]), offsets
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name}: {tag}{shape} in bytes {offsets}")
            entries[name] = (start, stop, dtype, shape)
    end = 0
    for start, stop, *_ in sorted(entries.values(), key=lambda e: e[:2]):
        if start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != len(tensors):
        raise ValueError(f"tensors of {end} bytes in {len(tensors)}")
    every = np.frombuffer(tensors, np.uint8)
    views = [every[start:stop] for start, stop, *_ in entries.values()]
    for name, found in zip(entries, _checksums(views), strict=True):
        if sums.get(name) != found:
            raise ValueError(f"tensor {name} is corrupted: its checksum differs")
    arrays = {}
    for view, (name, (_, _, dtype, shape)) in zip(views, entries.items(), strict=True):
        if dtype == np.bool_ and view.size and view.max() > 1:
            raise ValueError(f"tensor {name}: a bool is neither 0 nor 1")
        arrays[int(name)] = _shaped(view.view(dtype), shape)
    return arrays, tree


def _shaped(flat: np.ndarray, shape: list[int]) -> np.ndarray:
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as error:  # an empty array whose other sizes are absurd
        raise ValueError(f"no array of shape {shape}: {error}") from error


@functools.cache
def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(jnp, name, name))  # JAX knows the dtypes that NumPy has no name for


def _decode(node: Any, arrays: dict[int, np.ndarray], put: Callable, depth: int) -> Any:
    """The value of a JSON node."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    inner = lambda child: _decode(child, arrays, put, depth + 1)
    if type(node) is not dict or not node:
        raise ValueError(f"{str(node)[:80]} is no node")
    kind = next(iter(node))
    if kind == "array":
        return _decode_array(node, arrays, put)
    if kind == "class":
        return _decode_object(node, inner)
    if kind == "value" and (node["value"] is None or type(node["value"]) in (bool, str)):
        return node["value"]
    if kind == "list":
        return [inner(child) for child in _get(node, kind, list)]
    if kind == "tuple":
        return tuple(inner(child) for child in _get(node, kind, list))
    if kind == "dict":
        return _decode_dict(_pairs(_get(node, kind, list), (str, int)), inner)
    if kind in ("int", "float", "complex", "dtype", "enum"):
        return _decode_scalar(kind, node[kind])
    raise ValueError(f"{str(node)[:80]} is no node")


def _decode_scalar(kind: str, value: Any) -> Any:
    try:
        if kind == "int":
            return int(value) if type(value) is str else _refuse(value)
        if kind == "float":
            return float.fromhex(value)
        if kind == "complex":
            real, imaginary = value
            return complex(float.fromhex(real), float.fromhex(imaginary))
        if kind == "dtype":
            return _dtype(value) if value in TAGS or value in FOREIGN else _refuse(value)
        name, member = value
        cls = _CLASSES.get(name)
        if cls is None or not issubclass(cls, enum.Enum):
            return _refuse(name)
        return cls[member]
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{str(value)[:80]} is no {kind}") from error


def _refuse(value: Any) -> Any:
    raise ValueError(f"unknown: {str(value)[:80]}")


def _pairs(pairs: list, keys: tuple[type, ...]) -> list:
    if not all(type(p) is list and len(p) == 2 and type(p[0]) in keys for p in pairs):
        raise ValueError(f"{str(pairs)[:80]} are no pairs")
    if len({p[0] for p in pairs}) < len(pairs):
        raise ValueError(f"{str(pairs)[:80]}: a key twice")
    return pairs


def _decode_dict(pairs: list, inner: Callable) -> dict:
    return {key: inner(child) for key, child in pairs}


def _decode_object(node: Any, inner: Callable) -> Any:
    name = _get(node, "class", str)
    pairs = _pairs(_get(node, "fields", list), (str,))
    cls = _CLASSES.get(name)
    if cls is None or issubclass(cls, enum.Enum):
        known = ", ".join(sorted(_CLASSES)) or "none"
        raise ValueError(f"class {name[:80]!r} is not registered; registered: {known}")
    if [f for f, _ in pairs] != _fields(cls):
        raise ValueError(f"{name} has fields {_fields(cls)}, not {[f for f, _ in pairs]}")
    fields = {field: inner(child) for field, child in pairs}
    try:
        made = cls(**fields)
        if cls in _CHECKS:
            _CHECKS[cls](made)
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{name} refuses what was read: {error}") from error
    return made


def _decode_array(node: Any, arrays: dict[int, np.ndarray], put: Callable) -> Any:
    number, of = _get(node, "array", int), _get(node, "of", str)
    if number not in arrays or of not in ("jax", "numpy", "scalar"):
        raise ValueError(f"{str(node)[:80]} is no array")
    array = arrays[number]
    if "dtype" in node:
        array = _foreign(array, _get(node, "dtype", str), _sizes(node, "shape"))
    if of == "scalar":
        if array.shape:
            raise ValueError(f"a scalar of shape {array.shape}")
        return array[()]
    if of == "numpy":
        return array
    if "key" in node:
        return _to_key(array, _get(node, "key", str))
    return put(array)


def _foreign(array: np.ndarray, name: str, shape: list[int]) -> np.ndarray:
    """Bytes as a dtype that safetensors does not know."""
    if name not in FOREIGN or array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{array.dtype}{list(array.shape)} as {name[:40]!r}")
    dtype = _dtype(name)
    if array.size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{array.size} bytes for {name}{shape}")
    values = array.view(dtype)
    if name in NARROW and (values.astype(np.float32).astype(dtype).view(np.uint8) != array).any():
        raise ValueError(f"a byte is no {name}")
    return _shaped(values, shape)


def _to_key(array: np.ndarray, impl: str) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.array(array), impl=impl)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{array.dtype}{list(array.shape)} is no PRNG key: {error}") from error


def _keep(array: np.ndarray) -> np.ndarray:
    return array


def _to_jax(array: np.ndarray, *, constant: bool) -> jax.Array:
    """An array on the default device; a large one on a CPU shares memory that is constant.

    JAX's own copy would be three times slower than NumPy's, for it lies in pages of 4 KiB that the
    kernel clears one by one, where NumPy asks for large ones.
    """
    if array.itemsize >= 8 and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(f"a JAX array of {array.dtype} needs x64: jax.enable_x64, or numpy=True")
    if max(array.shape, default=0) >= 2**31:
        raise ValueError(f"shape {array.shape} is too large for a device")
    if array.nbytes < 1 << 20:
        return jax.device_put(np.array(array))
    if jax.default_backend() == "cpu" and not (constant and array.ctypes.data % LINE == 0):
        copy = _aligned(array.nbytes).view(array.dtype).reshape(array.shape)
        np.copyto(copy, array)
        array = copy
    return jax.device_put(array)


def _is_constant(buffer: memoryview) -> bool:
    """Whether nobody can write to the bytes: `toreadonly` of a bytearray only looks so."""
    return isinstance(buffer.obj, bytes | _Written)
