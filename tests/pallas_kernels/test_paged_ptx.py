"""PTX of the paged kernels, run by a small emulator: which byte ends up where.

The interpreter of Pallas does the same by plain arrays and sees none of these permutations.
"""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.paged_attention import exchange, onebyte, quantised, rows, write

E4M3 = ml_dtypes.float8_e4m3fn
THREAD = np.arange(128)
LANE, WARP = THREAD % 32, THREAD // 32
V_BASE, Q_BASE = 0, 1 << 16  # of tiles in the emulated shared memory
CTA_BITS = 17  # of an address in a cluster: what is above names the CTA


class Machine:
    """128 threads: registers by name, shared memory as bytes."""

    def __init__(self, memory, outside=None, **operands):
        self.memory, self.outside, self.registers = memory, outside, operands

    def run(self, ptx):
        for line in ptx.strip()[1:-1].split(";"):
            words = " ".join(line.split())
            if " " not in words or words.startswith(".reg"):
                continue
            self.live = np.ones(128, bool)
            if words.startswith("@"):
                condition, words = words[1:].split(" ", 1)
                self.live = self.value(condition)
            name, rest = words.split(" ", 1)
            given = [x.strip() for x in re.split(r",(?![^{]*})", rest)]
            parts = name.split(".")
            methods = ("_".join(parts[:2]), parts[0])
            next(getattr(self, m) for m in methods if hasattr(self, m))(name, *given)

    def value(self, x):
        if x.startswith("$"):
            x = "o" + x[1:]
        if x in self.registers:
            return self.registers[x]
        if x.startswith("0f"):
            return np.full(128, np.uint32(int(x[2:], 16)).view(np.float32))
        return np.full(128, int(x, 0), np.int64)

    def set(self, x, value):
        self.registers["o" + x[1:] if x.startswith("$") else x] = value

    def names(self, braces):
        return [x.strip() for x in braces.strip("{}").split(",")]

    def binary(self, f):
        def do(_, target, a, b):
            self.set(target, f(self.value(a), self.value(b)))

        return do

    def __getattr__(self, name):
        simple = {
            "and": np.bitwise_and,
            "xor": np.bitwise_xor,
            "shr": np.right_shift,
            "shl": np.left_shift,
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "div": np.floor_divide,
            "rem": np.remainder,
        }
        if name not in simple:
            raise AttributeError(name)
        return self.binary(simple[name])

    def mad(self, _, target, a, b, c):
        self.set(target, self.value(a) * self.value(b) + self.value(c))

    def bfe(self, _, target, a, begin, size):
        self.set(target, (self.value(a) >> int(begin)) & ((1 << int(size)) - 1))

    def setp(self, name, target, a, b, also=None):
        compare = dict(eq=np.equal, ne=np.not_equal, lt=np.less, ge=np.greater_equal, gt=np.greater)
        number = dict(f32=self.float, u32=self.unsigned).get(name.split(".")[-1], self.signed)
        result = compare[name.split(".")[1]](number(a), number(b))
        self.set(target, result if also is None else result & self.value(also))

    def bits(self, x):
        """The 32 bits of a register."""
        x = self.value(x)
        return x.view(np.uint32).astype(np.int64) if x.dtype == np.float32 else x

    def unsigned(self, x):
        return self.bits(x) & 0xFFFFFFFF

    def signed(self, x):
        return (self.unsigned(x) ^ 1 << 31) - (1 << 31)

    def float(self, x):
        return self.bits(x).astype(np.uint32).view(np.float32)

    def shfl_sync(self, name, target, source, apart, *_):
        assert ".bfly." in name
        self.set(target, self.value(source)[THREAD ^ int(apart)])

    def floats(self, target, f, *sources):
        with np.errstate(divide="ignore"):
            self.set(target, f(*map(self.float, sources)).astype(np.float32))

    def mul_f32(self, _, target, a, b):
        self.floats(target, np.multiply, a, b)

    def add_f32(self, _, target, a, b):
        self.floats(target, np.add, a, b)

    def sub_f32(self, _, target, a, b):
        self.floats(target, np.subtract, a, b)

    def abs_f32(self, _, target, a):
        self.floats(target, np.abs, a)

    def max_f32(self, _, target, a, b):
        self.floats(target, np.maximum, a, b)

    def min_f32(self, _, target, a, b):
        self.floats(target, np.minimum, a, b)

    def div_rn(self, _, target, a, b):
        self.floats(target, np.divide, a, b)

    def rcp_rn(self, _, target, a):
        self.floats(target, np.reciprocal, a)

    def fma_rn(self, _, target, a, b, c):
        self.floats(target, lambda a, b, c: a.astype(np.float64) * b + c, a, b, c)

    def selp_f32(self, _, target, a, b, where):
        self.set(target, np.where(self.value(where), self.float(a), self.float(b)))

    def place(self, address):
        base, _, offset = address.strip("[]").partition("+")
        return self.value(base) + int(offset or 0)

    def space(self, name):
        return self.memory if ".shared." in name else self.outside

    def ld(self, name, targets, address):
        at, targets = self.place(address), self.names(targets)
        assert (at % (4 * len(targets)) == 0).all()
        for i, x in enumerate(targets):
            words = np.array(self.bits(x) if x in self.registers else np.zeros(128, np.int64))
            for thread in np.flatnonzero(self.live):
                octets = self.space(name)[at[thread] + 4 * i :][:4]
                words[thread] = int.from_bytes(octets.tobytes(), "little")
            self.set(x, words)

    def st(self, name, address, sources):
        at, sources = self.place(address), self.names(sources)
        assert (at % (4 * len(sources)) == 0)[self.live].all()
        for i, x in enumerate(sources):
            for thread in np.flatnonzero(self.live):
                octets = int(self.bits(x)[thread]).to_bytes(4, "little")
                self.space(name)[at[thread] + 4 * i :][:4] = np.frombuffer(octets, np.uint8)

    def mov(self, name, target, source):
        if name == "mov.b64":
            self.set(target, [self.value(x) for x in self.names(source)])
        elif target.startswith("{"):
            low, high = self.names(target)
            self.set(low, self.bits(source) & 0xFFFF)
            self.set(high, self.bits(source) >> 16)
        elif source.startswith("{"):
            low, high = (self.value(x) for x in self.names(source))
            self.set(target, low | high << 16)
        else:
            new = self.value(source)
            if not self.live.all():  # of a register's bits, what others hold stays
                new = np.where(self.live, self.bits(source), self.bits(target))
            self.set(target, new)

    def mapa(self, _, target, address, cta):
        self.set(target, self.value(address) + (self.value(cta) << CTA_BITS))

    def prmt(self, _, target, a, b, order):
        octets = [(self.bits(x) >> 8 * i) & 255 for x in (a, b) for i in range(4)]
        self.set(target, sum(octets[int(order, 0) >> 4 * i & 7] << 8 * i for i in range(4)))

    def matrices(self, address):
        """(matrix, thread, half of its word, address of the two bytes), transposed."""
        base, offset = re.match(r"\[(\w+)\+(\d+)\]", address).groups()
        rows = self.value(base) + int(offset)
        assert (rows % 16 == 0).all()
        for thread in range(128):
            for half in range(2):
                row, column = 2 * (thread % 4) + half, thread % 32 // 4
                yield thread, half, rows[thread // 32 * 32 + row :: 8], 2 * column

    def ldmatrix(self, _, targets, address):
        out = [np.zeros(128, np.int64) for _ in self.names(targets)]
        for thread, half, starts, column in self.matrices(address):
            for matrix, words in enumerate(out):
                at = starts[matrix] + column
                pair = int(self.memory[at]) | int(self.memory[at + 1]) << 8
                words[thread] |= pair << 16 * half
        for name, words in zip(self.names(targets), out, strict=True):
            self.set(name, words)

    def stmatrix(self, _, address, sources):
        for thread, half, starts, column in self.matrices(address):
            for matrix, name in enumerate(self.names(sources)):
                pair = int(self.value(name)[thread]) >> 16 * half & 0xFFFF
                at = starts[matrix] + column
                self.memory[at], self.memory[at + 1] = pair & 255, pair >> 8

    def cvt(self, name, target, *sources):
        a = [self.value(x) for x in sources]
        bits = lambda x, kind, size: np.asarray(x, kind).view(size).astype(np.int64)
        if name == "cvt.rni.s32.f32":
            out = np.rint(a[0]).astype(np.int64) & 0xFFFFFFFF
        elif name == "cvt.rn.f32.s32":
            out = np.asarray(a[0], np.uint32).view(np.int32).astype(np.float32)
        elif name == "cvt.rn.satfinite.e4m3x2.f32":
            high, low = (bits(np.clip(x, -448, 448), E4M3, np.uint8) for x in a)
            out = low | high << 8
        elif name == "cvt.rn.f16x2.e4m3x2":
            wide = lambda x: bits(x.astype(np.uint8).view(E4M3), np.float16, np.uint16)
            out = wide(a[0] & 255) | wide(a[0] >> 8) << 16
        else:
            assert name == "cvt.f32.f16"
            out = np.asarray(a[0], np.uint16).view(np.float16).astype(np.float32)
        self.set(target, out)

    def wgmma_fence(self, *_):
        pass

    wgmma_commit_group = wgmma_wait_group = wgmma_fence

    def wgmma_mma_async(self, name, accumulator, first, descriptor, use, *_):
        n, kind = int(name.split("n")[-1].split("k")[0]), np.int8 if "s32" in name else E4M3
        a, b = np.zeros((64, 32)), np.zeros((32, n))
        for i, x in enumerate(self.names(first)):
            words = self.value(x).astype(np.uint32)[:, None].view(np.uint8)
            for thread in range(128):
                row = 16 * WARP[thread] + LANE[thread] // 4 + 8 * (i & 1)
                column = 16 * (i >> 1) + 4 * (LANE[thread] % 4)
                a[row, column : column + 4] = words[thread].view(kind).astype(np.float64)
        low, high = (int(x[0]) for x in self.value(descriptor))
        swizzle, group = {1: 128, 2: 64}[high >> 30], (high & 0x3FFF) << 4
        for row in range(n):
            for k in range(32):
                at = swizzled(swizzle, (low << 4) + row // 8 * group + row % 8 * swizzle + k)
                b[k, row] = np.array([self.memory[at]]).view(kind).astype(np.float64)[0]
        product = a @ b
        for i, x in enumerate(self.names(accumulator)):
            row = 16 * WARP + LANE // 4 + 8 * (i >> 1 & 1)
            own = product[row, 8 * (i >> 2) + 2 * (LANE % 4) + (i & 1)]
            self.set(x, own + (self.value(x) if self.value(use).all() else 0))


def swizzled(swizzle, address):
    """Where TMA and the tensor cores look for the byte at `address`."""
    return address ^ (address >> 7 & (7 if swizzle == 128 else 3)) << 4


def as_copied(x):
    """A tile `[rows, bytes]` as TMA writes it."""
    rows, width = x.shape
    swizzle, out = onebyte.swizzle_of(width), np.zeros(x.size, np.uint8)
    for (r, c), value in np.ndenumerate(x.view(np.uint8)):
        at = r // 8 * 8 * width + c // swizzle * 8 * swizzle + r % 8 * swizzle + c % swizzle
        out[swizzled(swizzle, at)] = value
    assert rows % 8 == 0
    return out


def rows_of_lane(x, row, column):
    """The 4 values of a tile of registers, of every thread."""
    r, c = 64 * row + 16 * WARP + LANE // 4, 8 * column + 2 * (LANE % 4)
    return {f"o{2 * i + j}": x[r + 8 * i, c + j].astype(np.float32) for i in (0, 1) for j in (0, 1)}


def store(memory, x, dtype, terms):
    for row in range(x.shape[0] // 64):
        for column in range(x.shape[1] // 8):
            own = rows_of_lane(x, row, column)
            machine = Machine(memory, **own, o4=np.full(128, Q_BASE), o5=THREAD + 128)
            machine.run(onebyte.store_ptx(*x.shape, dtype, terms, row, column))


def permuted(size):
    """Which key or dim stands in row i of a tile of registers, as `onebyte` describes."""
    i = np.arange(size)
    return i // 16 * 16 + 2 * (i % 8) + i % 16 // 8


CASES = [(128, 64, 8, 2), (64, 64, 8, 2), (256, 64, 8, 2), (192, 64, 8, 3), (128, 128, 16, 2)]


@pytest.mark.parametrize("dim,tile,cols,terms", CASES)
@pytest.mark.parametrize("dtype", [quantised.INT8, quantised.E4M3])
def test_products_of_bytes(dtype, dim, tile, cols, terms):
    """V^T P^T: V as it was copied, P as its terms were stored."""
    rng, integer = np.random.default_rng(0), dtype == quantised.INT8
    terms = 2 if integer else terms
    values = 30 * rng.standard_normal((tile, dim))
    values = (np.rint(values) if integer else values).astype(np.int8 if integer else E4M3)
    p = rng.random((tile, cols)).astype(np.float32)
    memory = np.zeros(1 << 17, np.uint8)
    memory[V_BASE : V_BASE + values.size] = as_copied(values)
    ptx, count = onebyte.load_ptx(dim, tile)
    base = {f"o{count}": np.full(128, V_BASE), f"o{count + 1}": THREAD + 256}
    loaded = Machine(memory, **base)
    loaded.run(ptx)
    words = [loaded.registers[f"o{i}"] for i in range(count)]
    store(memory, p * onebyte.unit(dtype), dtype, terms)
    ptx, count = onebyte.product_ptx(dim, tile, terms * cols, dtype)
    given = {f"o{count + i}": x for i, x in enumerate([*words, np.full(128, Q_BASE)])}
    machine = Machine(memory, **given)
    machine.run(ptx)
    out = np.zeros((dim, terms * cols))
    for i in range(count):
        m, rest = divmod(i, terms * cols // 2)
        row = 64 * m + 16 * WARP + LANE // 4 + 8 * (rest >> 1 & 1)
        out[row, 8 * (rest >> 2) + 2 * (LANE % 4) + (rest & 1)] = machine.registers[f"o{i}"]
    joined = onebyte.join(
        jnp.asarray(out, jnp.int32 if integer else jnp.float32), cols, dtype, terms
    )
    got = np.zeros((dim, cols))
    got[permuted(dim)] = np.asarray(joined) / onebyte.unit(dtype)
    want = values.astype(np.float64).T @ p
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [quantised.INT8, quantised.E4M3])
def test_queries_lie_as_copied(dtype, dim):
    """Terms of queries, loaded with their dims permuted, are stored in order."""
    q = np.random.default_rng(0).uniform(-60, 60, (dim, 16)).astype(np.float32)
    memory = np.zeros(1 << 17, np.uint8)
    store(memory, q[permuted(dim)], dtype, 2)
    terms = np.concatenate([np.asarray(x) for x in onebyte.split(jnp.asarray(q), dtype, 2)], 1)
    want = as_copied(np.ascontiguousarray(terms.T).view(np.uint8))
    np.testing.assert_array_equal(memory[Q_BASE : Q_BASE + want.size], want)


@pytest.mark.parametrize("dim,group", [(64, 4), (128, 3), (192, 1), (256, 8), (128, 64)])
def test_rows_of_a_chunk(dim, group):
    """Queries into a swizzled tile and the output back, past no token that is not the tile's."""
    tokens, heads, first, head, live = 90, 3, 5, 1, 64 // group - (group < 8)
    x = np.random.default_rng(0).integers(0, 256, (tokens, heads, group, 2 * dim), np.uint8)
    operands = [np.full(128, v) for v in (0, Q_BASE, first, head, live)] + [THREAD + 128]
    operands = {f"o{i}": v for i, v in enumerate(operands)}
    memory = np.full(1 << 17, 255, np.uint8)
    Machine(memory, x.reshape(-1).copy(), **operands).run(rows._ptx(True, 64, dim, group, heads))
    want = np.zeros((64, 2 * dim), np.uint8)
    want[: live * group] = x[first : first + live, head].reshape(-1, 2 * dim)
    np.testing.assert_array_equal(memory[Q_BASE : Q_BASE + want.size], as_copied(want))
    out = np.zeros_like(x).reshape(-1)
    Machine(memory, out, **operands).run(rows._ptx(False, 64, dim, group, heads))
    kept = np.zeros_like(x)
    kept[first : first + live, head] = x[first : first + live, head]
    np.testing.assert_array_equal(out.reshape(x.shape), kept)


@pytest.mark.parametrize("dim,heads,fixed", [(64, 8, False), (128, 3, True), (256, 2, False)])
@pytest.mark.parametrize("kind", [None, quantised.INT8, quantised.E4M3])
def test_rows_of_a_write(kind, dim, heads, fixed):
    """Rows end inside the CTA; a slot of -1 keeps what was there, and so do other slots."""
    scaled = not fixed and kind is not None
    rng, blocks, size = np.random.default_rng(0), 5, 16
    tokens, width = 60 if scaled else 64 // heads, 2 if kind is None else 1
    first = heads - 1 if scaled else 16
    x = (rng.standard_normal((tokens * heads, dim)) * 5).astype(ml_dtypes.bfloat16)
    slots = rng.permutation(blocks * size)[:tokens].astype(np.int32)
    slots[-2] = -1
    pool = np.full((blocks, heads, size, dim * width), 77, np.uint8)
    scales = np.full(heads if fixed else pool.shape[:3], 0.02, np.float32)
    arrays = [x, slots, pool, scales]
    begin = np.cumsum([0] + [-(-a.nbytes // 16) * 16 for a in arrays])
    outside = np.zeros(begin[-1], np.uint8)
    for a, b in zip(arrays, begin, strict=False):
        outside[b : b + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    operands = [np.full(128, int(b)) for b in (*begin[:4], first)] + [THREAD + 128]
    part = write._Rows("k", dim, kind, scaled, heads, size, len(x))
    machine = Machine(None, outside, **{f"o{i}": v for i, v in enumerate(operands)})
    machine.run(part.ptx(jnp.dtype(jnp.bfloat16)))
    own = lambda i: outside[begin[i] : begin[i] + arrays[i].nbytes]
    want, want_scales = pool.copy(), scales.copy()
    for row in range(first, len(x), part.step)[:64]:
        token, head = divmod(row, heads)
        if slots[token] < 0:
            continue
        place = (slots[token] // size, head, slots[token] % size)
        value = x[row]
        if kind is not None:
            top = np.float32(write.TOP[kind])
            value = value.astype(np.float32)
            scale = scales[head] if fixed else np.abs(value).max() / top
            if not fixed:
                want_scales[place] = scale
            if not fixed and kind == quantised.INT8:
                value = value.astype(np.float64)  # multiplied and rounded at once
            value = np.clip(value * (np.float32(1) / scale), -top, top)
            value = (np.rint(value) if kind == quantised.INT8 else value).astype(kind)
        want[place] = value.view(np.uint8)
    np.testing.assert_array_equal(own(2).reshape(pool.shape), want)
    np.testing.assert_array_equal(own(3).view(np.float32).reshape(scales.shape), want_scales)


@pytest.mark.parametrize(
    "cluster,warpgroups,cols,first,live,dim",
    [(8, 1, 8, 4, 4, 128), (8, 2, 8, 0, 4, 64), (2, 1, 16, 0, 15, 64), (1, 2, 8, 3, 1, 256)],
)
def test_partials_arrive_where_they_are_merged(cluster, warpgroups, cols, first, live, dim):
    """Every warpgroup's column c in the memory of warpgroup c mod ranks; other columns nowhere."""
    rng, ranks = np.random.default_rng(0), cluster * warpgroups
    x = exchange.Exchange(ranks, warpgroups, live, cols, dim)
    o = rng.standard_normal((ranks, dim, cols)).astype(np.float32)
    lse = rng.standard_normal((ranks, cols)).astype(np.float32)
    memory = np.zeros(cluster << CTA_BITS, np.uint8)
    place = np.full(128, Q_BASE), np.zeros(128, np.int64)
    for rank in range(ranks):
        for j in range(cols // 8):
            columns = 8 * j + 2 * (LANE % 4)
            values = [lse[rank, columns], lse[rank, columns + 1]]
            for i in range(dim // 64):
                values += rows_of_lane(o[rank], i, j).values()
            scalars = THREAD, np.full(128, rank), np.full(128, first)
            given = {f"o{i}": v for i, v in enumerate([*place, *scalars, *values])}
            Machine(memory, memory, **given).run(exchange.send_ptx(x, j))
    shape = (warpgroups, x.turns, ranks)
    size = 4 * int(np.prod(shape))
    for cta in range(cluster):
        own = memory[cta << CTA_BITS :][: 1 << CTA_BITS]
        got_lse = own[:size].view(np.float32).reshape(shape)
        got = own[Q_BASE : Q_BASE + size * dim].view(np.float32).reshape(*shape, dim)
        want, want_lse = np.zeros_like(got), np.zeros_like(got_lse)
        for wg, turn in np.ndindex(warpgroups, x.turns):
            c = turn * ranks + cta * warpgroups + wg
            if c < live:
                want[wg, turn], want_lse[wg, turn] = o[:, :, first + c], lse[:, first + c]
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got_lse, want_lse)
    assert x.bytes == size * (dim + 1)
