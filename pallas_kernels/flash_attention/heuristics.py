"""Which tiles a shape gets: a table of what measured best on an H200 (docs/kernels.md)."""

import dataclasses

from pallas_kernels._mgpu import cdiv
from pallas_kernels.flash_attention.config import BackwardConfig, ForwardConfig
from pallas_kernels.flash_attention.mask import TILE, Band
from pallas_kernels.flash_attention.problem import Options

SHORT = 2048  # keys from which the blocks of a causal tile are worth chaining to the next tile's
LONG = 8192  # keys from which the ends of tiles no longer count
ROWS = 128  # of a tile of two consumers
TABLE = 1024  # rows from which a table of packed tiles is worth the kernels that make it


def forward_config(
    head_dim: int, head_dim_v: int, options: Options, keys: int = LONG
) -> ForwardConfig:
    """Tiles of the forward for padded head widths.

    >>> from pallas_kernels.flash_attention.mask import Band
    >>> forward_config(64, 64, Options(Band(), 0.125)).consumers
    3
    >>> causal = Options(Band(right=0), 0.1)
    >>> [forward_config(128, 128, causal, keys).chained for keys in (1024, 4096, 16384)]
    [False, True, False]
    >>> windows = [Options(Band(left=n - 1, right=0), 0.1) for n in (512, 1024)]
    >>> [forward_config(128, 128, window).block_kv for window in windows]
    [128, 192]
    """
    plain, slopes = _plain(options), options.alibi_slopes is not None
    bare = plain and options.bounds is None and options.band.left is None
    wide = head_dim > 64  # with heads of 64 exponentials bound, and registers hold no sums of 8
    if head_dim <= 128 and plain and options.bounds is not None and options.blocks is None:
        return ForwardConfig(
            consumers=2 if wide else 3, persistent=True, tight_masks=True,
            longest_first=options.bounds.key_lo.shape[-1] >= TABLE,
            late_sum=wide, lazy_rescale=wide,
        )  # fmt: skip
    if not wide and options.blocks is not None:
        return ForwardConfig(persistent=True, longest_first=True, lazy_rescale=True)
    if not wide:
        return ForwardConfig(consumers=2 if options.loads else 3, lazy_rescale=True)
    if head_dim <= 128 and options.even:
        if not plain or slopes:
            return ForwardConfig(persistent=True)
        window = ForwardConfig(
            persistent=True, row_major=True, tight_masks=True, deal="zigzag back"
        )
        if head_dim == head_dim_v and _slides(options.band):
            return dataclasses.replace(
                window, block_kv=192, sliding_blocks=True, o_in_ring=True, lazy_rescale=True
            )
        return dataclasses.replace(window, late_sum=True)
    middle, causal = bare and keys < LONG, options.band.right is not None
    if head_dim <= 128 and middle and causal and keys >= SHORT and not slopes:
        return ForwardConfig(persistent=True, chained=True, q_stages=2, late_sum=True)
    if head_dim <= 128 and middle and causal:
        return ForwardConfig(persistent=True)
    ring = head_dim <= 128 and head_dim == head_dim_v and keys >= SHORT
    if ring and bare and not causal and not slopes:
        return ForwardConfig(
            block_kv=192, persistent=True, o_in_ring=True, late_sum=True, lazy_rescale=True
        )
    if head_dim <= 128 and middle and not slopes:
        return ForwardConfig(persistent=True, late_sum=True)
    if head_dim <= 128 and bare:
        long = keys >= LONG
        return ForwardConfig(block_kv=192, late_sum=long, lazy_rescale=long and causal)
    if head_dim <= 128 and _scores(options) and keys < LONG:
        return ForwardConfig(persistent=True, late_sum=True)
    if head_dim <= 128:
        return ForwardConfig()
    return ForwardConfig(block_kv=64, release="named", late_sum=True, lazy_rescale=True)


def _slides(band: Band) -> bool:
    """Whether a window meets hardly more keys in blocks of 192 from a tile's first than in 128."""
    if band.left is None or band.right is None:
        return False
    span = cdiv(max(band.left, 0), TILE) * TILE + band.right + ROWS
    return 0.98 * cdiv(span, 192) * 192 <= cdiv(span, 128) * 128


def _scores(options: Options) -> bool:
    """Whether a score_mod without vectors of keys or whole tiles is all that is asked for."""
    alone = options.mask is None and options.dropout is None and not options.loads
    static = options.bounds is None and options.blocks is None and options.band.left is None
    return options.score is not None and alone and static


def _plain(options: Options) -> bool:
    """Whether nothing but structure and scalars is asked for: no programs, no dropout."""
    return options.score is None and options.mask is None and options.dropout is None


def dq_config(head_dim: int, head_dim_v: int) -> ForwardConfig:
    """Tiles of the kernel that computes dQ alone.

    >>> dq_config(256, 256).stages
    2
    """
    widest = max(head_dim, head_dim_v)
    if widest > 192:  # Q, dO and two stages of K and V do not fit with two consumers
        return ForwardConfig(block_kv=64, consumers=1)
    return ForwardConfig(block_kv=64)


def backward_config(head_dim: int, head_dim_v: int, options: Options) -> BackwardConfig:
    """Tiles of the backward for padded head widths.

    >>> from pallas_kernels.flash_attention.mask import Band
    >>> backward_config(128, 128, Options(Band(), 0.125)).block_q
    64
    """
    bounds = options.bounds if options.blocks is None else None
    packed = bounds is not None and bounds.query_lo.shape[-1] >= TABLE
    heads = 4 if packed else 0
    tight = packed and _plain(options) and options.soft_cap is None
    if max(head_dim, head_dim_v) <= 64:
        return BackwardConfig(block_q=128, by_sequence=heads, tight_masks=tight)
    if max(head_dim, head_dim_v) <= 128:
        return BackwardConfig(by_sequence=heads, tight_masks=tight)
    stages = 1 if options.apart else 2
    early = options.band.right is None  # a causal mask is level or loses by it
    return BackwardConfig(
        split="columns", stages=stages, do_stages=1, dq_chunks=2, early_free=early
    )
