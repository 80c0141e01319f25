"""`pallas_kernels.sparse._warp` in numpy: 32 lanes in step, with the checks a GPU does not make.

`run(kernel, module, ...)` puts it in the place of the module's `w` and walks a grid warp by warp.
It refuses reads and writes outside of an array, shuffles and branches that lanes do not take
together, and shared memory that one lane reads before the warp met after another lane wrote it.
"""

import contextlib
import dataclasses

import numpy as np

LANES = 32
SPACE = 40  # bits of an address within an array


@dataclasses.dataclass(frozen=True)
class Lanes:
    """One value a lane; `type` is "i1", "i32", "i64" or "f32"."""

    v: np.ndarray
    type: str


KINDS = {"i1": np.bool_, "i32": np.int32, "i64": np.int64, "f32": np.float32}


def lanes(v, kind):
    return Lanes(np.broadcast_to(np.asarray(v).astype(KINDS[kind]), (LANES,)), kind)


def plain(f):
    """A function of equal types."""

    def op(a, b):
        assert a.type == b.type
        with np.errstate(over="ignore", invalid="ignore"):
            return lanes(f(a.v, b.v), a.type)

    return op


class Arith:
    """The part of MLIR's dialect that kernels use directly."""

    addf = mulf = None
    addf, mulf = plain(np.add), plain(np.multiply)
    andi, ori, xori = plain(np.bitwise_and), plain(np.bitwise_or), plain(np.bitwise_xor)
    maxsi = plain(np.maximum)
    divui, remui = plain(np.floor_divide), plain(np.remainder)
    shrui = plain(lambda a, b: a.view(np.uint32) >> b.view(np.uint32))

    class CmpIPredicate:
        ne = "ne"

    @staticmethod
    def constant(kind, value):
        return lanes(value, kind)

    @staticmethod
    def cmpi(predicate, a, b):
        assert predicate == "ne" and a.type == b.type
        return lanes(a.v != b.v, "i1")


class Warp:
    """The functions of `_warp`, for one warp at a time."""

    LANES, arith = LANES, Arith

    def __init__(self):
        self.arrays, self.bases, self.warp = [], {}, 0
        self.active = np.ones(LANES, bool)

    # ---------------------------------------------------------------- numbers

    def i32(self):
        return "i32"

    def f32(self):
        return "f32"

    def const(self, x):
        return lanes(x, "f32" if isinstance(x, float) else "i32")

    def _both(self, a, b):
        return [self.const(x) if isinstance(x, int) else x for x in (a, b)]

    def _binary(f):
        return lambda self, a, b: plain(f)(*self._both(a, b))

    add, minus, mul = _binary(np.add), _binary(np.subtract), _binary(np.multiply)
    smallest, greatest = _binary(np.minimum), _binary(np.maximum)
    both = _binary(np.logical_and)

    def less(self, a, b):
        a, b = self._both(a, b)
        return lanes(a.v < b.v, "i1")

    def equal(self, a, b):
        a, b = self._both(a, b)
        return lanes(a.v == b.v, "i1")

    def neither(self, a):
        return lanes(~a.v, "i1")

    def select(self, condition, a, b):
        assert a.type == b.type
        return lanes(np.where(condition.v, a.v, b.v), a.type)

    def fma(self, a, b, c):
        with np.errstate(over="ignore", invalid="ignore"):
            return lanes(a.v.astype(np.float64) * b.v + c.v, "f32")

    def long_product(self, a, b):
        return lanes(a.v.astype(np.int64) * b, "i64")

    def long_min(self, a, b, most):
        return lanes(np.minimum(a.v.astype(np.int64) * b, most), "i32")

    def widened(self, a, b):
        return lanes(a.v + b.v.astype(np.int64), "i64")

    def ones(self, bits):
        return lanes([int(b).bit_count() for b in bits.v.view(np.uint32)], "i32")

    # ---------------------------------------------------------------- memory

    def lane_and_warp(self):
        return lanes(np.arange(LANES), "i32"), self.const(self.warp)

    def address(self, array):
        assert isinstance(array, np.ndarray)
        if id(array) not in self.bases:
            self.bases[id(array)] = len(self.arrays) + 1
            self.arrays.append(array)
        return lanes(self.bases[id(array)] << SPACE, "i64")

    def offset(self, base, index, size):
        return lanes(base.v + index.v.astype(np.int64) * size, "i64")

    def _places(self, pointer, count, where):
        """(array, [lane, place]) of the lanes where it holds."""
        who = np.flatnonzero(where)
        if not len(who):
            return None, who, None
        (space,) = np.unique(pointer.v[who] >> SPACE)
        array = self.arrays[space - 1].reshape(-1)
        byte = pointer.v[who] & (1 << SPACE) - 1
        assert not (byte % (array.itemsize * count)).any(), "an address is not aligned"
        at = byte // array.itemsize
        assert at.max() + count <= array.size, f"{at.max() + count} of {array.size}"
        return array, who, at

    def _load(self, pointer, count, kind):
        out = np.zeros((count, LANES), KINDS[kind])
        array, who, at = self._places(pointer, count, self.active)
        if array is not None:
            for i in range(count):
                out[i, who] = array[at + i].astype(KINDS[kind])
        return [lanes(v, kind) for v in out]

    def load(self, pointer, kind=None):
        return self._load(pointer, 1, "f32" if kind == self.f32 else "i32")[0]

    def load_ints(self, pointer, count, once=False):
        return self._load(pointer, count, "i32")

    def load_floats(self, pointer, count, dtype, once=False):
        return self._load(pointer, count, "f32")

    def _put(self, pointer, values, where, add):
        array, who, at = self._places(pointer, len(values), where.v & self.active)
        for i, value in enumerate(values):
            if array is None:
                return
            if add:
                np.add.at(array, at + i, value.v[who])
            else:
                assert len(set(at)) == len(at), "two lanes store at one place"
                array[at + i] = value.v[who]

    def store_floats(self, pointer, values, where):
        self._put(pointer, values, where, add=False)

    def add_floats(self, pointer, values, where):
        self._put(pointer, values, where, add=True)

    def shared_address(self, array):
        self.shared = array.reshape(-1)
        self.writer = np.full(array.size, -1)  # the lane of what the warp has not met over
        return self.const(0)

    def keep(self, address, values):
        for i, value in enumerate(values):
            at = address.v[self.active] // 4 + i
            assert not (address.v % 16).any()
            self.shared[at], self.writer[at] = value.v[self.active], np.flatnonzero(self.active)

    def kept(self, address):
        at, out = address.v[self.active] // 4, np.zeros(LANES, np.float32)
        writer = self.writer[at]
        assert ((writer < 0) | (writer == np.flatnonzero(self.active))).all(), "a race"
        out[self.active] = self.shared[at]
        return lanes(out, "f32")

    # ---------------------------------------------------------------- lanes together

    def _all(self):
        assert self.active.all(), "not all lanes are here"

    def meet(self):
        self._all()
        self.writer[:] = -1

    def from_lane(self, x, lane):
        self._all()
        lane = self.const(lane) if isinstance(lane, int) else lane
        return lanes(x.v[lane.v & LANES - 1], x.type)

    def across(self, x, distance):
        self._all()
        return lanes(x.v[np.arange(LANES) ^ distance], x.type)

    def ballot(self, condition):
        self._all()
        bits = sum(int(b) << i for i, b in enumerate(condition.v))
        return lanes(np.uint32(bits).view(np.int32), "i32")

    @contextlib.contextmanager
    def _only(self, where):
        before, self.active = self.active, self.active & where
        yield
        self.active = before

    def loop(self, start, stop, step, f, *carried):
        start, stop = self._both(start, stop)
        i, carried = start.v.astype(np.int64), list(carried)
        while True:
            on = self.active & (i < stop.v)
            if not on.any():
                return carried
            with self._only(on):
                new = list(f(lanes(i, "i32"), *carried) or ())
            carried = [
                self.select(Lanes(on, "i1"), a, b) for a, b in zip(new, carried, strict=True)
            ]
            i = np.where(on, i + step, i)

    def _uniform(self, condition):
        (one,) = set(condition.v[self.active])
        return bool(one)

    def when(self, condition, f):
        if self._uniform(condition):
            f()

    def either(self, condition, f, other):
        return list(f()) if self._uniform(condition) else list(other)


def run(emit, modules, refs, ctas, warps, monkeypatch):
    """`emit(refs, cta)` for every warp of every CTA, with `_warp` replaced in the modules."""
    w = Warp()
    for module in modules:
        monkeypatch.setattr(module, "w", w)
    for cta in range(ctas):
        for w.warp in range(warps):
            emit(refs, w.const(cta))
