"""Samples as rows of a matrix: cut into blocks of tokens, and summed, on the device.

Dims: N tokens, S samples. Rows before the first sample and after the last are segments 0 and S + 1,
beside samples 1..S.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_kernels.triton.launch import options

SEGMENTS_A_STEP = 1024  # offsets one program scans at once: 8 KB


@triton.jit(do_not_specialize=["N", "S"])
def first_blocks_kernel(
    offsets_ptr,  # (S + 1,) int64
    first_ptr,  # (S + 3,) int32: the first block of each segment, then how many there are
    N,
    S,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Count the blocks of each segment and scan the counts."""
    total = 0
    for step in range(tl.cdiv(S + 2, BLOCK_S)):
        s = step * BLOCK_S + tl.arange(0, BLOCK_S)
        begin = tl.load(offsets_ptr + s - 1, mask=(s > 0) & (s <= S + 1), other=0)
        end = tl.load(offsets_ptr + s, mask=s <= S, other=0)
        end = tl.where(s == S + 1, N, end)
        blocks = tl.where(s < S + 2, (end - begin + BLOCK_T - 1) // BLOCK_T, 0).to(tl.int32)
        last = tl.cumsum(blocks, axis=0) + total
        tl.store(first_ptr + s, last - blocks, mask=s < S + 2)
        total += tl.sum(blocks, axis=0)
    tl.store(first_ptr + S + 2, total)


@triton.jit(do_not_specialize=["N", "S", "bound", "halvings"])
def list_blocks_kernel(
    offsets_ptr,  # (S + 1,) int64
    first_ptr,  # (S + 3,) int32
    row_ptr,  # (bound,) int64: a block's first row
    rows_ptr,  # (bound,) int32: its rows, negated where it ends its segment
    segment_ptr,  # (bound,) int32
    N,
    S,
    bound,
    halvings,  # enough to search S + 2 segments
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the list of blocks, in the order of the tokens; beyond the last one, empty blocks."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_b = b < bound
    live = in_b & (b < tl.load(first_ptr + S + 2))
    # the last segment whose first block is not after b: empty ones before it own no block
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), 0, tl.int32) + S + 2
    for _ in range(halvings):
        middle = (low + high) // 2
        left = tl.load(first_ptr + middle, mask=live, other=0) <= b
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    index = b - tl.load(first_ptr + low, mask=live, other=0)
    begin = tl.load(offsets_ptr + low - 1, mask=live & (low > 0), other=0)
    end = tl.load(offsets_ptr + low, mask=live & (low <= S), other=0)
    end = tl.where(low == S + 1, N, end)
    row = begin + index.to(tl.int64) * BLOCK_T
    left_over = (end - row).to(tl.int32)
    rows = tl.where(left_over > BLOCK_T, BLOCK_T, -left_over)
    tl.store(row_ptr + b, tl.where(live, row, 0), mask=in_b)
    tl.store(rows_ptr + b, tl.where(live, rows, 0), mask=in_b)
    tl.store(segment_ptr + b, tl.where(live, low, 0), mask=in_b)


@triton.jit
def segment_sum_kernel(
    value_ptr,  # (N,) float32
    offsets_ptr,  # (S + 1,) int64
    out_ptr,  # (S,) float32
    BLOCK: tl.constexpr,
) -> None:
    """Add up one sample's rows in their order, a block at a time."""
    sample = tl.program_id(0)
    begin = tl.load(offsets_ptr + sample)
    rows = tl.load(offsets_ptr + sample + 1) - begin
    t = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.cdiv(rows, BLOCK).to(tl.int32)):
        row = step * BLOCK + t
        total += tl.load(value_ptr + begin + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + sample, tl.sum(total, axis=0))


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum over each sample's rows, ``(S,)`` float32, the same bits in every run."""
    out = values.new_empty(len(offsets) - 1)
    if len(out):
        segment_sum_kernel[(len(out),)](values, offsets.contiguous(), out, BLOCK=256, **options())
    return out


class Blocks(NamedTuple):
    """The samples cut into blocks of tokens, on the device."""

    row: Tensor
    rows: Tensor
    segment: Tensor
    first: Tensor


def list_blocks(offsets: Tensor, n: int, block_t: int) -> Blocks:
    """Cut every sample into blocks of at most ``block_t`` rows; the bound on them needs no sync."""
    s = len(offsets) - 1
    bound = triton.cdiv(n, block_t) + s + 2
    first = offsets.new_empty(s + 3, dtype=torch.int32)
    narrow = offsets.new_empty(2, bound, dtype=torch.int32)
    out = Blocks(offsets.new_empty(bound), narrow[0], narrow[1], first)
    offsets = offsets.contiguous()
    first_blocks_kernel[(1,)](
        offsets, first, n, s, BLOCK_T=block_t, BLOCK_S=SEGMENTS_A_STEP, **options()
    )
    list_blocks_kernel[(triton.cdiv(bound, 256),)](
        offsets, first, out.row, out.rows, out.segment, n, s, bound, (s + 2).bit_length(),
        BLOCK_T=block_t, BLOCK=256, **options(),
    )  # fmt: skip
    return out
