"""Which rows of a decode step read a long prefix together: found in the block tables, on the host.

Rows that came from one prompt (samples, beams) or share a system prompt hold the same blocks in
front.  Attention can read these once for all of them and merge the rest by log-sum-exp (Ye et al.,
FlashInfer, 2024).  That pays from some size on only, since the merge costs a few launches.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

MAX_GROUPS = 4  # prefixes that one step can share


@dataclasses.dataclass(frozen=True)
class SharedPrefixes:
    """Groups of members that share their first blocks.

    Attributes:
        group: `[n]` i32, the group of each member, -1 for none.
        leaders: `[groups]` i64, a member whose table begins with the prefix.
        lens: `[groups]` i64, blocks of the prefix.
    """

    group: np.ndarray
    leaders: np.ndarray
    lens: np.ndarray


def shared_prefixes(
    tables: Sequence[np.ndarray], full: np.ndarray, *, least: int
) -> SharedPrefixes | None:
    """Groups in which members x blocks of the common prefix reach `least`; None without any.

    In the order of their tables, members with a common prefix are neighbours.  The best group is
    the largest rectangle under the lengths that neighbours have in common; the next best is looked
    for among the others, up to `MAX_GROUPS`.

    Args:
        tables: block ids of each member, `[num_blocks]` i32.
        full: `[n]`, how many of them are written to the end: only those are shared.
        least: at least 2.

    Example:
        >>> tables = [np.array(t) for t in ([7, 8, 1], [5, 2], [7, 8, 3], [7, 8, 4])]
        >>> found = shared_prefixes(tables, np.array([2, 1, 2, 3]), least=6)
        >>> found.group.tolist(), found.lens.tolist()
        ([0, -1, 0, 0], [2])
        >>> shared_prefixes(tables, np.array([2, 1, 2, 3]), least=7) is None
        True
    """
    if _largest_possible(tables, full) < least:
        return None
    group, leaders, lens = np.full(len(tables), -1, np.int32), [], []
    in_order = lambda i: tables[i][: full[i]].astype(">u4").tobytes()  # bytes sort like the ids
    order = sorted(np.flatnonzero(full > 0).tolist(), key=in_order)
    heights = np.array(
        [_common(tables[a][: full[a]], tables[b][: full[b]]) for a, b in itertools.pairwise(order)],
        np.int64,
    )
    while len(lens) < MAX_GROUPS:
        begin, end, height = _largest(heights)
        if (end - begin + 1) * height < least:
            break
        members = order[begin : end + 1]
        group[members] = len(lens)
        leaders.append(members[0])
        lens.append(height)
        heights[max(begin - 1, 0) : end + 1] = 0  # its members are taken
    if not lens:
        return None
    return SharedPrefixes(group, np.array(leaders, np.int64), np.array(lens, np.int64))


def _largest_possible(tables: Sequence[np.ndarray], full: np.ndarray) -> int:
    """A bound on members x blocks of any group, from first blocks and lengths alone."""
    some = np.flatnonzero(full > 0)
    if len(some) < 2:
        return 0
    firsts = np.array([tables[i][0] for i in some.tolist()])
    blocks, members, counts = np.unique(firsts, return_inverse=True, return_counts=True)
    longest = np.zeros(len(blocks), np.int64)
    np.maximum.at(longest, members, full[some])
    return int((np.where(counts > 1, counts, 0) * longest).max())


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _largest(heights: np.ndarray) -> tuple[int, int, int]:
    """(begin, end, height) of the largest (end - begin + 1) x height under `heights[begin:end]`."""
    best, stack = (0, 0, 0), []  # of (begin, height), heights ascending
    for i, height in enumerate([*heights.tolist(), 0]):
        begin = i
        while stack and stack[-1][1] >= height:
            begin, tall = stack.pop()
            if (i - begin + 1) * tall > (best[1] - best[0] + 1) * best[2]:
                best = begin, i, tall
        stack.append((begin, height))
    return best
