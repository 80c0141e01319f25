"""Tile shapes and schedules of the kernels, and the table that chooses them."""

import dataclasses

from pallas_kernels._mgpu import HOPPER_SMS, SMEM_BYTES


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the forward kernel is laid out.

    Attributes:
      block_kv: keys of one block (a multiple of 64).
      stages: K/V blocks in flight.
      consumers: warpgroups that compute, 64 query rows each.
      pingpong: the consumers issue their matmuls in turn, so that the softmax of one runs under the
        matmuls of the others.
      persistent: one CTA per SM walks many tiles; the next tile's loads run under this one's end.
      release: how K/V slots are freed: "mbar" by an mbarrier (one arrival a thread), "named" by
        named barriers (one instruction a warp).
      late_sum: keep row sums as 8 columns a row and reduce across lanes once per tile.
      chained: of a persistent grid, the first Q K^T of a tile is issued before the last P V of the
        tile before, and its softmax runs under that: no tile begins or ends with idle tensor cores.
        Every consumer then visits every block of its tile.
      q_stages: tiles of Q in flight (2: of a persistent grid).
      o_in_ring: of a persistent grid, O leaves through the slot of the tile's last K, which every
        consumer then visits, and has no memory of its own: 192 keys fit.
      longest_first: with bounds that only the device knows, or listed blocks, tiles start in the
        order of their number of blocks (a table is made for each call).
      tight_masks: bounds that only the device knows are read before the matmuls are awaited, and a
        block takes only the comparison of the border that may cross it.
      row_major: with a window, tiles go row by row over all heads.  The first rows are short, so
        the CTAs of a persistent grid are at different places of their tiles, and what each tile
        reads anew does not come to all of them at once.
      deal: how a persistent grid with a window and `row_major` deals out tiles: "turns" from the
        first row on; "zigzag back" from the last row on, back and forth over the CTAs, so that the
        short first rows even out what the CTAs have, each of which walks its own in the reverse
        order, the short ones first.
      sliding_blocks: with a window, the blocks of a tile begin at the first key that it sees (to a
        multiple of 64), not at multiples of block_kv.
      lazy_rescale: row maxima follow only where they grow by more than a factor of 2^8, and a warp
        none of whose rows do leaves O as it is (FlashAttention-4).
      num_sms: CTAs of a persistent grid.

    >>> ForwardConfig(block_kv=100)
    Traceback (most recent call last):
        ...
    ValueError: block_kv=100 is not a positive multiple of 64 up to 256
    """

    block_kv: int = 128
    stages: int = 2
    consumers: int = 2
    pingpong: bool = True
    persistent: bool = False
    release: str = "mbar"
    late_sum: bool = False
    chained: bool = False
    q_stages: int = 1
    o_in_ring: bool = False
    longest_first: bool = False
    tight_masks: bool = False
    row_major: bool = False
    deal: str = "turns"
    sliding_blocks: bool = False
    lazy_rescale: bool = False
    num_sms: int = HOPPER_SMS

    def __post_init__(self):
        if self.block_kv <= 0 or self.block_kv % 64 or self.block_kv > 256:
            raise ValueError(f"block_kv={self.block_kv} is not a positive multiple of 64 up to 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} is below 2: nothing would overlap")
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"consumers={self.consumers} is not 1, 2 or 3")
        if self.release not in ("named", "mbar"):
            raise ValueError(f"release={self.release!r} is neither 'named' nor 'mbar'")
        if self.q_stages not in (1, 2):
            raise ValueError(f"q_stages={self.q_stages} is not 1 or 2")
        if (self.chained or self.q_stages > 1) and not self.persistent:
            raise ValueError(f"{self.chained=} and {self.q_stages=} need a persistent grid")
        if self.deal not in ("turns", "zigzag back"):
            raise ValueError(f"deal={self.deal!r} is neither 'turns' nor 'zigzag back'")
        if self.deal != "turns" and not (self.persistent and self.row_major):
            raise ValueError(f"{self.deal=} needs persistent and row_major")
        plain = self.persistent and not self.chained and self.block_q <= self.block_kv
        if self.o_in_ring and not plain:
            raise ValueError(
                f"o_in_ring needs a persistent grid, tiles that are not chained, and as many keys "
                f"as query rows, not {self}"
            )
        if self.sliding_blocks and self.chained:
            raise ValueError(f"{self.sliding_blocks=} excludes {self.chained=}")
        if self.num_sms < 1:
            raise ValueError(f"num_sms={self.num_sms} is below 1")
        if self.release == "named" and self.first_named_id + 2 * self.stages > 16:
            raise ValueError(f"{self.stages=} needs more than the 16 named barriers of a CTA")

    @property
    def first_named_id(self) -> int:
        """Named barriers 0..4 belong to Mosaic; the ping-pong takes one per consumer."""
        return 5 + self.consumers

    @property
    def block_q(self) -> int:
        """Query rows of a CTA."""
        return 64 * self.consumers

    def own_o(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether O is staged apart from Q: Q of the next tile may land, or the widths differ."""
        if self.o_in_ring:
            return False
        return self.persistent or head_dim_v != head_dim

    def o_chunks(self, head_dim_v: int) -> int:
        """64-column slots through which a wide O of its own leaves (0: a whole tile)."""
        return 2 if head_dim_v >= 256 else 0

    def smem_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Shared memory of operands and staging, 2-byte elements."""
        q = self.q_stages * self.block_q * head_dim
        kv = self.stages * self.block_kv * (head_dim + head_dim_v)
        o = 0
        if self.own_o(head_dim, head_dim_v):
            chunks = self.o_chunks(head_dim_v)
            o = self.block_q * (64 * chunks if chunks else head_dim_v)
        return 2 * (q + kv + o) + 4 * self.block_q

    def check(self, head_dim: int, head_dim_v: int) -> None:
        """Raises NotImplementedError where the tiles do not fit."""
        if self.o_in_ring and head_dim != head_dim_v:
            raise NotImplementedError(f"{self.o_in_ring=} with {head_dim=} and {head_dim_v=}")
        need = self.smem_bytes(head_dim, head_dim_v)
        if need > SMEM_BYTES - 1024:
            raise NotImplementedError(
                f"{self} needs {need} bytes of shared memory at {head_dim=}, {head_dim_v=}; "
                f"a CTA has {SMEM_BYTES}"
            )


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the KV-stationary backward is laid out.

    Attributes:
      block_q: query rows of one step.
      consumers: warpgroups, each with 64 key rows of K, V, dK and dV.
      stages: Q tiles in flight.
      do_stages: dO tiles in flight.
      split: what the consumers share out, "keys" (64 key rows each) or "columns" (two of them
        and 64 key rows: one computes P, the other dS, and each its half of the columns of dK, dV
        and dQ.  That halves the accumulators and sends P through shared memory as well).
      dq_chunks: pieces in which a consumer computes and stores its columns of dQ.
      early_free: wait for dV before dQ is begun, so that the next dO may load meanwhile: for a ring
        with one slot.
      by_sequence: with bounds that only the device knows, KV heads whose tiles start sequence by
        sequence, the longest first (a table is made for each call); 0 starts tiles as they lie.
        Tiles of one sequence stay together: they read the same Q and dO and add to the same dQ,
        which must be in L2 for that.
      tight_masks: bounds that only the device knows are read once a KV tile.

    >>> BackwardConfig(block_q=32)
    Traceback (most recent call last):
        ...
    ValueError: block_q=32 is not 64 or 128
    """

    block_q: int = 64
    consumers: int = 2
    stages: int = 2
    do_stages: int = 2
    split: str = "keys"
    dq_chunks: int = 1
    early_free: bool = False
    by_sequence: int = 0
    tight_masks: bool = False

    def __post_init__(self):
        if self.split not in ("keys", "columns"):
            raise ValueError(f"split={self.split!r} is neither 'keys' nor 'columns'")
        if self.split == "columns" and (self.consumers, self.block_q) != (2, 64):
            raise ValueError(f"split='columns' needs 2 consumers and block_q=64, not {self}")
        if self.dq_chunks < 1 or (self.dq_chunks > 1 and self.splits_rows):
            raise ValueError(f"dq_chunks={self.dq_chunks} is below 1, or dQ is split by rows")
        if self.block_q not in (64, 128):
            raise ValueError(f"block_q={self.block_q} is not 64 or 128")
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"consumers={self.consumers} is not 1, 2 or 3")
        if self.stages < 1 or self.do_stages < 1:
            raise ValueError(f"{self.stages=} and {self.do_stages=} must be at least 1")

    @property
    def block_kv(self) -> int:
        """Keys of a CTA."""
        return 64 if self.split == "columns" else 64 * self.consumers

    @property
    def parts(self) -> int:
        """Column parts in which K, V, Q and dO lie in shared memory."""
        return self.consumers if self.split == "columns" else 1

    @property
    def splits_rows(self) -> bool:
        """dQ = dS K is shared out over the consumers by query rows; otherwise by columns of H."""
        return self.split == "keys" and self.block_q == 64 * self.consumers

    def dq_tile(self, head_dim: int) -> tuple[int, int]:
        """Rows and columns of dQ that one consumer computes at a time."""
        if self.splits_rows:
            return 64, head_dim
        return self.block_q, head_dim // self.consumers // self.dq_chunks

    def smem_bytes(self, head_dim: int, head_dim_v: int, apart: bool = False) -> int:
        """Shared memory of operands and staging, 2-byte elements."""
        kv = self.block_kv * (head_dim + head_dim_v)
        ring = self.block_q * (self.stages * head_dim + self.do_stages * head_dim_v)
        buffers = 2  # of dS; split by columns: 1, and P twice, its rounding, its form for dS
        if self.split == "columns":
            buffers = 5 if apart else 4
        ds = buffers * self.block_kv * self.block_q
        rows, columns = self.dq_tile(head_dim)
        dq = self.consumers * rows * columns
        return 2 * (kv + ring + ds) + 4 * (dq + self.stages * 3 * self.block_q)

    def check(self, head_dim: int, head_dim_v: int, apart: bool = False) -> None:
        """Raises NotImplementedError where the tiles do not fit."""
        need = self.smem_bytes(head_dim, head_dim_v, apart)
        if need > SMEM_BYTES - 1024:
            raise NotImplementedError(
                f"{self} needs {need} bytes of shared memory at {head_dim=}, {head_dim_v=}; "
                f"a CTA has {SMEM_BYTES}"
            )
        part = 64 * self.parts
        if self.dq_tile(head_dim)[1] % 64 or head_dim % part or head_dim_v % part:
            raise NotImplementedError(f"{head_dim=}, {head_dim_v=} do not split as {self}")
        registers = (head_dim + head_dim_v) // 2 // self.parts + self.block_q
        if registers > {1: 208, 2: 208, 3: 128}[self.consumers]:
            raise NotImplementedError(
                f"dK and dV of {head_dim=}, {head_dim_v=} with {self} do not fit in registers"
            )
