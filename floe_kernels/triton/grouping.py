"""Sort the (token, slot) pairs by expert, on the device, without a host sync and without atomics.

A counting sort by (expert, chunk of tokens, slot): an expert's pairs are contiguous, and in them
those of a chunk, whose rows of x stay in L2 while its k experts read them, and in them those of a
slot, of which no two share a token. Lists of tiles walk the same order in three ways.

Dims: N tokens, E experts, K experts kept per token, H chunks, J sort blocks in a chunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels.triton.launch import block, options

# tokens a chunk: their rows of 4096 bf16 are 34 MB, inside an H100's 50 MB of L2
CHUNK = 4096
# tile lists: one group of pairs an expert; an expert and a chunk; an expert, a chunk and a slot
BY_EXPERT, BY_CHUNK, BY_SLOT = 0, 1, 2


@triton.jit(do_not_specialize=["N", "H"])
def count_pairs_kernel(
    experts_ptr,  # (N, K) int64
    token_mask_ptr,  # (N,) uint8
    count_ptr,  # (E, H, K, J) int32
    N,
    E,
    H,
    K: tl.constexpr,
    J: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
):
    """Count one block's pairs of one slot by expert."""
    block_n, slot = tl.program_id(0), tl.program_id(1)
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    live = n < N
    if HAS_MASK:
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    expert = tl.load(experts_ptr + n * K + slot, mask=live, other=-1).to(tl.int32)
    count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    place = ((e * H + block_n // J) * K + slot) * J + block_n % J
    tl.store(count_ptr + place, count, mask=e < E)


@triton.jit(do_not_specialize=["N", "H"])
def place_pairs_kernel(
    experts_ptr,  # (N, K) int64
    token_mask_ptr,  # (N,) uint8
    start_ptr,  # (E * H * K * J + 1,) int64
    pair_ptr,  # (N * K,) int64
    N,
    H,
    K: tl.constexpr,
    J: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two >= E
):
    """Write one block's pairs where the scan of the counts says, in the order of the tokens."""
    block_n, slot = tl.program_id(0), tl.program_id(1)
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    live = n < N
    if HAS_MASK:
        live = live & (tl.load(token_mask_ptr + n, mask=live, other=0) != 0)
    expert = tl.load(experts_ptr + n * K + slot, mask=live, other=-1).to(tl.int32)
    own = (expert[:, None] == e[None, :]).to(tl.int32)
    rank = tl.sum(own * tl.cumsum(own, axis=0), axis=1) - 1
    place = ((expert * H + block_n // J) * K + slot) * J + block_n % J
    start = tl.load(start_ptr + place, mask=live, other=0)
    tl.store(pair_ptr + start + rank, n * K + slot, mask=live)


@triton.jit
def _group_range(start_ptr, g, groups, E, H, K: tl.constexpr, J: tl.constexpr, BY: tl.constexpr):
    """Return where the pairs of the groups ``g`` begin and end, and the groups' experts."""
    if BY == 0:
        expert = g
        low = g * H * K
        width = H * K
    elif BY == 1:
        expert = g % E
        low = (expert * H + g // E) * K
        width = K
    else:
        expert = g % E
        low = (expert * H + g // E // K) * K + g // E % K
        width = 1
    begin = tl.load(start_ptr + low * J, mask=g < groups, other=0)
    end = tl.load(start_ptr + (low + width) * J, mask=g < groups, other=0)
    return begin, end, expert


@triton.jit(do_not_specialize=["groups", "H"])
def list_tiles_kernel(
    start_ptr,  # (E * H * K * J + 1,) int64
    tile_ptr,  # (bound, 4) int64: first pair, pairs, expert, place among split groups or -1
    group_ptr,  # (groups + 1, 2) int32: tiles before the group, split tiles before it
    groups,
    E,
    H,
    K: tl.constexpr,
    J: tl.constexpr,
    BY: tl.constexpr,
    ROWS: tl.constexpr,  # pairs a tile
    BLOCK_G: tl.constexpr,
):
    """Write one group's tiles behind those of all groups before it, which every program counts."""
    group = tl.program_id(0)
    before = 0
    split_before = 0
    for step in range(tl.cdiv(groups, BLOCK_G)):
        g = step * BLOCK_G + tl.arange(0, BLOCK_G)
        begin, end, _ = _group_range(start_ptr, g, groups, E, H, K, J, BY)
        tiles = ((end - begin + ROWS - 1) // ROWS).to(tl.int32)
        tiles = tl.where(g < group, tiles, 0)
        before += tl.sum(tiles, axis=0)
        split_before += tl.sum(tl.where(tiles > 1, tiles, 0), axis=0)
    tl.store(group_ptr + group * 2, before)
    tl.store(group_ptr + group * 2 + 1, split_before)
    begin, end, expert = _group_range(start_ptr, group, groups, E, H, K, J, BY)
    tiles = ((end - begin + ROWS - 1) // ROWS).to(tl.int32)
    for i in range(tiles):
        out = tile_ptr + (before + i) * 4
        first = begin + i * ROWS
        tl.store(out, first)
        tl.store(out + 1, tl.minimum(end - first, ROWS))
        tl.store(out + 2, expert.to(tl.int64))
        tl.store(out + 3, tl.where(tiles > 1, split_before + i, -1).to(tl.int64))
    # the program beyond the last group found no pairs: its two counts close the list


class Pairs(NamedTuple):
    """The sorted pairs, ``token * K + slot``, and where each block of each key starts."""

    pair: Tensor  #: ``(N * K,)`` int64; masked tokens have none, and leave the tail unwritten
    start: Tensor
    experts: int
    chunks: int
    slots: int
    blocks: int

    @property
    def total(self) -> int:
        """How many pairs there are at most."""
        return len(self.pair)


class Tiles(NamedTuple):
    """A list of tiles, each in one group; ``bound`` is known without looking."""

    tile: Tensor
    group: Tensor
    bound: int


def sort_pairs(experts: Tensor, num_experts: int, mask: Tensor | None) -> Pairs:
    """Sort by (expert, chunk, slot), stable in the tokens."""
    (n, k), block_e = experts.shape, block(num_experts, 1 << 16)
    rows = max(16, min(256, CHUNK, 4096 // block_e))  # 8192 comparisons a program spill (gfx942)
    chunks, blocks = triton.cdiv(n, CHUNK), triton.cdiv(CHUNK, rows)
    grid = (chunks * blocks, k)
    count = experts.new_empty(num_experts * chunks * k * blocks, dtype=torch.int32)
    shape = {
        "K": k, "J": blocks, "HAS_MASK": mask is not None, "BLOCK_N": rows, "BLOCK_E": block_e,
    }  # fmt: skip
    count_pairs_kernel[grid](experts, mask, count, n, num_experts, chunks, **shape, **options())
    start = F.pad(count.cumsum(0), (1, 0))
    pair = experts.new_empty(n * k)
    place_pairs_kernel[grid](experts, mask, start, pair, n, chunks, **shape, **options())
    return Pairs(pair, start, num_experts, chunks, k, blocks)


def list_tiles(pairs: Pairs, by: int, rows: int) -> Tiles:
    """List tiles of at most ``rows`` pairs; those beyond the last are empty."""
    groups = pairs.experts
    if by != BY_EXPERT:
        groups *= pairs.chunks
    if by == BY_SLOT:
        groups *= pairs.slots
    bound = triton.cdiv(pairs.total, rows) + groups
    tile = pairs.pair.new_zeros(bound, 4)
    group = pairs.pair.new_empty(groups + 1, 2, dtype=torch.int32)
    list_tiles_kernel[(groups + 1,)](
        pairs.start, tile, group, groups, pairs.experts, pairs.chunks,
        K=pairs.slots, J=pairs.blocks, BY=by, ROWS=rows, BLOCK_G=block(groups, 1024), **options(),
    )  # fmt: skip
    return Tiles(tile, group, bound)
