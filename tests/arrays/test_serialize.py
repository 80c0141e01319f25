"""Bytes of pytrees: exact round trips, and nothing but ValueError from bytes that lie."""

import contextlib
import dataclasses
import enum
import importlib
import json
import struct
import tracemalloc
import zlib
from typing import NamedTuple

import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from aidx.arrays.serialize import deserialize, load_tree, register, save_tree, serialize
from aidx.cache import KVCache, KVCacheConfig, PagedKVCache

module = importlib.import_module("aidx.arrays.serialize")  # the package's name is the function
DTYPES = [*module.TAGS, *module.FOREIGN]


class Mood(enum.Enum):
    CALM = "calm"
    WILD = "wild"


class Pair(NamedTuple):
    left: object
    right: object


@flax.struct.dataclass
class State:
    weights: jax.Array
    mood: Mood = flax.struct.field(pytree_node=False, default=Mood.CALM)
    size: int = flax.struct.field(pytree_node=False, default=3)


@dataclasses.dataclass(frozen=True)
class Positive:
    value: float

    def __post_init__(self):
        if not self.value > 0:
            raise ValueError(f"{self.value=} must be positive")


for cls in (Mood, Pair, State, Positive):
    register(cls, name=f"test.{cls.__name__}")


def same(a, b):
    """Equal in type, structure, dtype, shape and every bit."""
    if isinstance(a, np.ndarray | np.generic | jax.Array):
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a.dtype == b.dtype and same(jax.random.key_data(a), jax.random.key_data(b))
        x, y = np.asarray(a), np.asarray(b)
        kinds = isinstance(a, jax.Array) == isinstance(b, jax.Array)
        return (kinds and x.dtype == y.dtype and x.shape == y.shape
                and x.tobytes() == y.tobytes())  # fmt: skip
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b or (a != a and b != b)


def bits(dtype, n=48, seed=0):
    """Random bits of a dtype, NaNs of every kind included."""
    raw = np.random.default_rng(seed).integers(0, 256, n, np.uint8)
    dtype = module._dtype(dtype)
    if dtype.name in module.NARROW:
        return (raw % 4).view(np.int8).astype(np.float32).astype(dtype)
    return raw % 2 == 0 if dtype.kind == "b" else raw.view(dtype)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_exact_in_numpy_and_jax(dtype):
    x = bits(dtype)
    tree = {"flat": x, "square": x.reshape(-1, 1)[::-1], "empty": x[:0].reshape(0, 5), "one": x[0]}
    assert same(deserialize(serialize(tree)), tree)
    if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype:
        tree = [jnp.array(x), jnp.array(x[:1].reshape(()))]
        assert same(deserialize(serialize(tree)), tree)


def test_sixty_four_bits_of_jax_need_x64():
    big = 2**53 + 1  # not a float64
    with jax.enable_x64(True):
        data = serialize(jnp.array([big, -(2**63)]))
        back = deserialize(data)
        assert back.dtype == jnp.int64 and back.tolist() == [big, -(2**63)]
    with pytest.raises(ValueError, match="needs x64"):
        deserialize(data)
    assert deserialize(data, numpy=True).tolist() == [big, -(2**63)]


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.complex_numbers(), st.sampled_from(DTYPES).map(bits), st.sampled_from(list(Mood)),
    st.builds(np.float32, st.floats(width=32)),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(State, inner, st.sampled_from(list(Mood)), st.integers()),
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(trees)
def test_any_tree_comes_back(tree):
    assert same(deserialize(serialize(tree)), tree)


def test_prng_keys_dtypes_and_orders_come_back():
    key = jax.random.key(7, impl="rbg")
    tree = [jax.random.split(jax.random.key(3), 2), key, np.dtype("float32"), jnp.bfloat16]
    back = deserialize(serialize(tree))
    assert same(back[:2], tree[:2]) and back[2:] == [np.dtype("float32"), jnp.bfloat16]
    assert jax.random.uniform(back[1]) == jax.random.uniform(key)
    big_endian = np.arange(5, dtype=">i4")
    assert deserialize(serialize(big_endian)).tolist() == [0, 1, 2, 3, 4]
    fortran = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert same(deserialize(serialize(fortran)), np.ascontiguousarray(fortran))


def test_caches_come_back():
    config = KVCacheConfig(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, max_seq_len=8)
    cache = KVCache.create(config)
    back = deserialize(serialize((config, cache)))
    assert back[0] == config
    assert jax.tree.structure(back[1]) == jax.tree.structure(cache)
    assert all(same(a, b) for a, b in zip(*map(jax.tree.leaves, (cache, back[1])), strict=True))
    sizes = dict(num_layers=2, num_blocks=3, block_size=2, num_kv_heads=1, head_dim=4)
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        paged = PagedKVCache.create(**sizes, dtype=dtype)
        assert same(deserialize(serialize(paged)), paged)


def test_the_tensors_are_a_safetensors_file():
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.int8([1, -1])}
    found = safetensors.numpy.load(bytes(serialize(tree)[module.PREFIX.size :]))
    assert {k: v.tolist() for k, v in found.items()} == {
        "0": tree["a"].tolist(),
        "1": tree["b"].tolist(),
    }


def test_what_cannot_be_written_is_refused_with_its_place():
    class Unknown:
        pass

    for bad, where in (
        ({"a": [1, Unknown()]}, "/a/1 is a .*Unknown"),
        ({"f": print}, "/f is a builtins"),
        ({1.5: 0}, "key 1.5 in the tree"),
        ({"s": np.array(["x"])}, "/s has dtype"),
        ({"s": {1, 2}}, "/s is a builtins.set"),
    ):
        with pytest.raises(TypeError, match=where):
            serialize(bad)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda x: serialize({"x": x}) and x)(1.0)
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 64"):
        serialize(deep)
    with pytest.raises(TypeError, match="neither a dataclass"):
        register(int)
    with pytest.raises(ValueError, match="belongs to"):
        register(Positive, name="test.State")


def forge(node, tensors=(), payload=b"", header=None, sums=None):
    """Bytes whose checksums are right and whose content is the caller's."""
    views = dict(tensors)
    if sums is None:
        sums = {}
        for name, entry in views.items():
            try:
                a, b = entry["data_offsets"]
                sums[name] = [zlib.crc32(payload[a:b])]
            except (TypeError, ValueError, KeyError):
                pass
    if header is None:
        metadata = {"tree": json.dumps(node), "crc32": json.dumps(sums)}
        header = json.dumps({"__metadata__": metadata, **views}).encode()
    body = struct.pack("<Q", len(header)) + header
    total = struct.pack("<Q", len(body) + len(payload))
    checksum = zlib.crc32(body, zlib.crc32(total))
    prefix = module.PREFIX.pack(b"AIDXTREE", 1, checksum, len(body) + len(payload))
    return prefix + body + payload


def tensor(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ARRAY = {"array": 0, "of": "numpy"}
HOSTILE = {
    "class of no one": forge({"class": "os.system", "fields": []}),
    "class that is an enum": forge({"class": "test.Mood", "fields": []}),
    "enum that is a class": forge({"enum": ["test.State", "CALM"]}),
    "enum member": forge({"enum": ["test.Mood", "FURIOUS"]}),
    "missing fields": forge({"class": "test.State", "fields": []}),
    "fields of no one": forge({"class": "test.Positive", "fields": [["evil", {"int": "1"}]]}),
    "refused value": forge({"class": "test.Positive", "fields": [["value", {"float": "-0x1p0"}]]}),
    "wrong type": forge({"class": "test.Positive", "fields": [["value", {"value": "x"}]]}),
    "no node": forge({}),
    "list": forge([]),
    "unknown kind": forge({"pickle": "gASV"}),
    "value of a value": forge({"value": {"value": 1}}),
    "a number as value": forge({"value": 1}),
    "float": forge({"float": "0x1p99999999"}),
    "int": forge({"int": "9" * 5000}),
    "complex": forge({"complex": ["0x0p0"]}),
    "dtype": forge({"dtype": "object"}),
    "dict key": forge({"dict": [[None, {"value": None}]]}),
    "dict key twice": forge({"dict": [["a", {"value": None}], ["a", {"value": None}]]}),
    "unhashable key": forge({"dict": [[[], {"value": None}]]}),
    "deep": forge(json.loads('{"list":[' * 200 + '{"value":null}' + "]}" * 200)),
    "very deep": forge(None, header=b"[" * 200_000),
    "no such array": forge(ARRAY),
    "array of what": forge({"array": 0, "of": "gpu"}, {"0": tensor()}, b"1234"),
    "no scalar": forge({"array": 0, "of": "scalar"}, {"0": tensor()}, b"1234"),
    "huge shape": forge(ARRAY, {"0": tensor(shape=(2**40,), offsets=(0, 2**40))}, b"1234"),
    "huge and empty": forge(ARRAY, {"0": tensor(shape=(0, 2**61, 2**61), offsets=(0, 0))}),
    "overflowing shape": forge(ARRAY, {"0": tensor(shape=(2**32, 2**32), offsets=(0, 0))}),
    "negative shape": forge(ARRAY, {"0": tensor(shape=(-1, -4))}, b"1234"),
    "float shape": forge(ARRAY, {"0": tensor(shape=(4.0,))}, b"1234"),
    "bool shape": forge(ARRAY, {"0": tensor(shape=(True,), offsets=(0, 1))}, b"1"),
    "many axes": forge(ARRAY, {"0": tensor(shape=(1,) * 65, offsets=(0, 1))}, b"1"),
    "offsets backwards": forge(ARRAY, {"0": tensor(offsets=(4, 0))}, b"1234"),
    "gap": forge(ARRAY, {"0": tensor(offsets=(1, 5))}, b"12345"),
    "overlap": forge(ARRAY, {"0": tensor(), "1": tensor(offsets=(2, 6))}, b"123456"),
    "beyond": forge(ARRAY, {"0": tensor(offsets=(0, 4))}, b"123"),
    "left over": forge(ARRAY, {"0": tensor()}, b"12345"),
    "unknown dtype": forge(ARRAY, {"0": tensor("F4")}, b"1234"),
    "name": forge(ARRAY, {"zero": tensor()}, b"1234"),
    "no bool": forge(ARRAY, {"0": tensor("BOOL")}, b"\x00\x01\x02\x00"),
    "wrong sum": forge(ARRAY, {"0": tensor()}, b"1234", sums={"0": [5]}),
    "no sums": forge(ARRAY, {"0": tensor()}, b"1234", sums={}),
    "int4": forge(ARRAY | {"dtype": "int4", "shape": [4]}, {"0": tensor()}, b"\x01\x7f\x00\x00"),
    "foreign size": forge(ARRAY | {"dtype": "complex128", "shape": [1]}, {"0": tensor()}, b"1234"),
    "foreign name": forge(ARRAY | {"dtype": "object", "shape": [4]}, {"0": tensor()}, b"1234"),
    "key": forge({"array": 0, "of": "jax", "key": "evil"}, {"0": tensor()}, b"1234"),
    "key data": forge({"array": 0, "of": "jax", "key": "threefry2x32"}, {"0": tensor()}, b"1234"),
    "header no object": forge(None, header=b"[]"),
    "header no utf-8": forge(None, header=b"\xff\xfe"),
    "no metadata": forge(None, header=b"{}"),
    "tree no json": forge(None, header=b'{"__metadata__":{"tree":"{","crc32":"{}"}}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_that_lie_are_refused(name):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            deserialize(HOSTILE[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * len(HOSTILE[name]) + 1_000_000  # a JAX call may import something


TREE = {"w": np.arange(40, dtype=np.float32), "n": [1, 2.5, None, "x"], "s": State(np.ones(3))}


@pytest.fixture(scope="module")
def written():
    return bytes(serialize(TREE))


def test_truncated_bytes_are_refused(written):
    for end in range(len(written)):
        with pytest.raises(ValueError):
            deserialize(written[:end])
    with pytest.raises(ValueError, match="bytes were written"):
        deserialize(written + b"x")


def test_every_flipped_bit_is_found(written):
    for i in range(len(written)):
        broken = bytearray(written)
        broken[i] ^= 1 << (i % 8)
        with pytest.raises(ValueError):
            deserialize(broken)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.data())
def test_headers_with_right_checksums_and_random_content_are_refused_or_read(data):
    """What a fuzzer does that knows the format: one JSON value is exchanged for another."""
    written = bytes(serialize(TREE))
    (length,) = struct.unpack_from("<Q", written, module.PREFIX.size)
    start = module.PREFIX.size + 8
    header = json.loads(written[start : start + length])
    meta = {k: json.loads(v) for k, v in header["__metadata__"].items()}
    document = {**header, "__metadata__": meta}
    places = []

    def walk(x):
        for key in list(x) if isinstance(x, dict) else range(len(x)):
            places.append((x, key))
            if isinstance(x[key], dict | list):
                walk(x[key])

    walk(document)
    x, key = places[data.draw(st.integers(0, len(places) - 1))]
    scalars = st.none() | st.booleans() | st.integers(-2, 2**65) | st.floats() | st.text(max_size=4)
    x[key] = data.draw(st.recursive(scalars, lambda s: st.lists(s, max_size=3), max_leaves=4))
    if isinstance(document["__metadata__"], dict):
        document["__metadata__"] = {k: json.dumps(v) for k, v in document["__metadata__"].items()}
    text = json.dumps(document).encode()
    with contextlib.suppress(ValueError):
        deserialize(forge(None, header=text, payload=written[start + length :]))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    for data in (noise, module.MAGIC + noise):
        with pytest.raises(ValueError):
            deserialize(data)


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "tree.aidx"
    save_tree(path, TREE)
    assert same(load_tree(path), TREE)
    with pytest.raises(TypeError):
        save_tree(path, {"f": print})
    assert same(load_tree(path), TREE) and list(tmp_path.iterdir()) == [path]


def test_numpy_arrays_are_read_only_views_and_jax_arrays_are_not(written):
    data = bytearray(written)
    back = deserialize(data)
    with pytest.raises(ValueError, match="read-only"):
        back["w"][0] = 1
    on_device = deserialize(source := bytearray(serialize(jnp.arange(4))))
    source[-16:] = bytes(16)
    assert on_device.tolist() == [0, 1, 2, 3]
    large = deserialize(source := bytearray(serialize(jnp.ones(1 << 18))))
    source[-(1 << 20) :] = bytes(1 << 20)
    assert float(large.min()) == 1  # above the size where JAX takes over a copy of ours


def test_large_tensors_have_a_checksum_per_chunk(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    x = np.arange(100, dtype=np.float64)
    data = bytearray(serialize([x, ml_dtypes.bfloat16(1.5)]))
    assert same(deserialize(bytes(data))[0], x)
    data[-9] ^= 1
    with pytest.raises(ValueError, match="tensor 0 is corrupted"):
        deserialize(data)


def test_large_jax_arrays_share_memory_that_cannot_change_and_no_other():
    x = jnp.arange(1 << 18, dtype=jnp.float32)  # 1 MiB
    data = serialize({"odd": np.ones(3, np.int8), "x": x})
    assert data.readonly
    low = np.frombuffer(data, np.uint8).ctypes.data
    inside = lambda a: low <= a.unsafe_buffer_pointer() < low + data.nbytes
    back = deserialize(data)["x"]
    assert same(back, x) and inside(back)
    # A donated buffer is written to: what it was shared with must not notice.
    doubled = jax.jit(lambda y: y * 2, donate_argnums=0)(back)
    assert doubled[3] == 6 and same(deserialize(data)["x"], x)
    loose = bytearray(data)
    for lent in (loose, memoryview(loose).toreadonly(), np.frombuffer(loose, np.uint8).data):
        back = deserialize(lent)["x"]
        loose[-1:] = bytes([loose[-1] ^ 0xFF])
        assert same(back, x)
        loose[:] = data


def test_a_file_that_was_cut_is_refused(tmp_path):
    save_tree(tmp_path / "tree", jnp.arange(1000.0))
    assert same(load_tree(tmp_path / "tree"), jnp.arange(1000.0))
    whole = (tmp_path / "tree").read_bytes()
    (tmp_path / "tree").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="are here"):
        load_tree(tmp_path / "tree")
