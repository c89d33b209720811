"""How the kernels are launched: tiles, splits, the choice of regime, small device tables.

Every number here follows from shapes and dtypes alone, so that a run repeats bit for bit; none is
searched for at run time.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from floe_kernels.reference.dropout import keep_threshold

MULTIPROCESSORS = 132  # of an H100
# two programs for each: one loads while the other multiplies
PROGRAMS = 2 * MULTIPROCESSORS
# below, 64 rows a program leave most multiprocessors idle and the sums over I and O are split
SPLIT_BELOW = 4096
# parts of a split sum: at 16 the float32 parts of 1024 tokens by 144 columns are 9 MB, inside L2
MAX_PARTS = 16
MOST_EXPERTS_IN_TILE = 64  # beside 128 columns of z; at 128 the logits alone hold 64 registers


class Tile(NamedTuple):
    """One kernel's block sizes and launch options."""

    rows: int  #: of the result
    columns: int  #: of the result
    depth: int  #: of the sum, a step
    warps: int
    stages: int


@cache
def most_stages(device: torch.device) -> int:
    """Return how many steps' operands may wait in shared memory at once.

    The largest tiles hold 40 KB a step: four of them fit the 163 KB of an A100 and the 227 KB of
    an H100; two, the 99 KB of their consumer relatives and the 64 KB of an MI300, which keeps one
    of its two steps in registers.
    """
    if device.type != "cuda":
        return 4
    capability = torch.cuda.get_device_capability(device)
    large = torch.version.hip is None and capability in ((8, 0), (9, 0), (10, 0), (10, 3))
    return 4 if large else 2


@cache
def products_read_memory(device: torch.device) -> bool:
    """Say whether products take operands from shared memory, as from Hopper on, or registers."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def options(
    warps: int = 4, stages: int = 2, device: torch.device | None = None
) -> dict[str, object]:
    """Return a kernel's launch options; Triton from 3.9 on warns where fusion is left unsaid."""
    if device is not None:
        stages = min(stages, most_stages(device))
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def use_groups(ranks: Sequence[int], top_k: int, shared_A: bool) -> bool:
    """Choose the regime: sort tokens by expert, or compute every packed column and mask.

    All columns cost one read of x while they are memory-bound, that is up to about 256 (the
    ratio of an H100's bf16 arithmetic to its bandwidth); sorted tokens are read ``top_k`` times.
    A tile of the sorted products holds all of an expert's columns, 128 at most.
    """
    fits = not shared_A and max(ranks, default=0) <= 128
    return fits and sum(ranks) > 256 * max(top_k, 1.5)


def block(size: int, most: int, least: int = 16) -> int:
    """Return the power of two that covers ``size``, within what a product of tiles can take."""
    return int(max(least, min(most, triton.next_power_of_2(max(1, size)))))


def parts(programs: int, steps: int) -> int:
    """Return into how many parts to cut a sum of ``steps`` so that the device is filled."""
    return max(1, min(MAX_PARTS, PROGRAMS // max(1, programs), steps))


def is_narrow(x: Tensor) -> bool:
    """Say whether the tensor cores take this dtype; float32 is multiplied as float32."""
    return x.dtype in (torch.bfloat16, torch.float16)


def arithmetic(x: Tensor) -> dict[str, object]:
    """Return the constants of a kernel's products: float32 follows torch's own setting."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": "ieee" if exact else "tf32", "WIDEN": x.device.type == "cpu"}


_COLUMN_EXPERTS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def column_experts(ranks: Sequence[int], device: torch.device) -> Tensor:
    """Return the expert of every packed column, ``(R,)`` int32, copied to the device once.

    Never dropped: a captured graph holds its address.
    """
    key = (tuple(ranks), device)
    if key not in _COLUMN_EXPERTS:
        owners = [e for e, rank in enumerate(ranks) for _ in range(rank)]
        _COLUMN_EXPERTS[key] = torch.tensor(owners, dtype=torch.int32, device=device)
    return _COLUMN_EXPERTS[key]


_EXPERT_COLUMNS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def expert_columns(ranks: Sequence[int], device: torch.device) -> Tensor:
    """Return every expert's first packed column and the end, ``(E + 1,)`` int32; kept likewise."""
    key = (tuple(ranks), device)
    if key not in _EXPERT_COLUMNS:
        columns = [0, *itertools.accumulate(ranks)]
        _EXPERT_COLUMNS[key] = torch.tensor(columns, dtype=torch.int32, device=device)
    return _EXPERT_COLUMNS[key]


def rows_of(x: Tensor) -> Tensor:
    """Return ``x`` with unit stride along its rows, which is all the kernels ask of a layout.

    And rows near enough for a tile of 128 to be addressed by int32 from its first.
    """
    if x.stride(0) >= 1 << 24:
        return x.contiguous()
    return x if x.stride(-1) == 1 or (x.shape[-1] <= 1 and x.is_contiguous()) else x.contiguous()


# Figures below are ptxas' for sm_90 and 128 columns unless said: registers of a thread, of 255,
# and shared memory of a program, of 227 KB. None is a timing: no kernel here has run on a GPU yet.


def most_columns(device: torch.device) -> int:
    """Return the columns of the widest tile: 256 read x once for all of a layer of rank 4 x 64."""
    return 256 if most_stages(device) == 4 else 128


def shrink_tile(x: Tensor, weight: Tensor, num_experts: int = 0) -> Tile:
    """Tokens by packed columns of ``weight`` (C, I), summed over inputs."""
    columns = len(weight)
    if not is_narrow(x):  # multiplied without tensor cores: 72 registers, 7 KB
        return Tile(32, block(columns, 64), 16, 4, 2)
    tile = block(columns, most_columns(x.device))
    # float32 weights are narrowed in registers: for 256 columns, or a router of 64 experts (which
    # is split in three), half the depth, or they spill (sm_80) or overflow shared memory
    # and before Hopper, where beside dropout 8 bytes spill
    crowded = tile > 128 or num_experts > 32 or not products_read_memory(x.device)
    halved = weight.dtype != x.dtype and crowded
    # 64 rows are 128 programs at 8192 tokens, one for each of an H100's 132 multiprocessors. Eight
    # warps take 94 registers, four 254. Four stages keep 24 KB of x in flight in 106 KB; at 256
    # columns three take 185 registers and 129 KB
    return Tile(64, tile, 32 if halved else 64, 8, 3 if tile > 128 else 4)


def gate_tile(dy: Tensor, weight: Tensor) -> Tile:
    """Tokens by packed columns of ``weight`` (R, O), summed over outputs."""
    if not is_narrow(dy):
        return Tile(32, block(len(weight), 64), 16, 4, 2)
    tile = block(len(weight), most_columns(dy.device))
    halved = weight.dtype != dy.dtype and tile > 128
    # with the softmax behind it 239 registers in eight warps, 98 KB; in four it spills
    return Tile(64, tile, 32 if halved else 64, 8, 3 if tile > 128 else 4)


MOST_GATE_COLUMNS = 128  # in one kernel with the gates' gradient: at 256 it spills 152 bytes


def expand_tile(x: Tensor, columns: int) -> Tile:
    """Tokens by outputs, summed over packed columns."""
    if not is_narrow(x):
        return Tile(64, 64, 16, 4, 2)
    # bound by bandwidth, hence small: 64 registers and 49 KB let four programs share a
    # multiprocessor; 128 rows take 122, and spill 1 KB where dx has dropout
    return Tile(64, 128, block(columns, 64), 8, 2)


def weight_tile(x: Tensor, columns: int, crowded: bool = False) -> Tile:
    """Inputs (or outputs) by packed columns, summed over tokens; crowded by dropout or a router."""
    if not is_narrow(x):
        return Tile(64, block(columns, 64), 16, 4, 2)
    # 148 registers and 100 KB; with dropout 128 rows spill 48 bytes and 64 take 133 registers, 254
    # for 256 columns, which spill on sm_80
    tile = block(columns, 128 if crowded else most_columns(x.device))
    if not products_read_memory(x.device):
        # sm_80 spills 8 bytes with 128 rows, and 24 with dropout at a depth of 64
        return Tile(64, tile, 32 if crowded else 64, 8, 3)
    return Tile(64 if crowded or tile > 128 else 128, tile, 64, 8, 3)


def shared_shrink_tile(x: Tensor, weights: Sequence[Tensor]) -> Tile:
    """Tokens by packed columns of each of two or three linears, summed over inputs."""
    columns = block(max(map(len, weights)), 128)
    halved = weights[0].dtype != x.dtype  # float32 weights are narrowed in registers
    # three sums of 64 x 128 and of 64 x 16: 245 registers, 190 KB in three stages
    return Tile(64, columns, 32 if halved else 64, 8, 3)


def shared_weight_tile(columns: int) -> Tile:
    """Inputs by packed columns of each of two or three linears, summed over tokens."""
    return Tile(64, block(columns, 128), 64, 8, 3)  # 227 registers, 174 KB


def square_tile(dtype: torch.dtype, columns: int, rows_a_sample: int, sums: int) -> Tile:
    """Columns of x by columns of g, summed over a sample's tokens, with ``sums`` accumulators."""
    depth = block(rows_a_sample, 64)
    if dtype not in (torch.bfloat16, torch.float16):
        return Tile(64, block(columns, 64 if sums == 1 else 32), 16, 4, 2)
    # three sums of 64 x 128 hold 96 of 168 registers; 50 KB
    return Tile(128 if sums == 1 else 64, block(columns, 128), depth, 8, 3)


def gram_tile(x: Tensor) -> Tile:
    """Tokens by tokens, summed over inputs or outputs."""
    if not is_narrow(x):
        return Tile(32, 32, 16, 4, 3)  # in two stages 16 bytes spill (sm_80, Triton 3.6)
    return Tile(64, 64, 64, 4, 3)  # two Gram matrices of 64 x 64 hold 64 registers


def gram_is_cheaper(n: int, samples: int, rows: int, columns: int) -> bool:
    """Choose the way to a sample's norm: two Gram matrices, or the gradient itself.

    Products a token: rows + columns for each token of its sample, rounded up to a block, against
    rows x columns. Symmetry halves the first; that half is left for samples of unequal length.
    """
    return samples > 0 and (n // samples + 64) * (rows + columns) < rows * columns


def sample_pieces(tiles: int, n: int, samples: int) -> int:
    """Return into how many pieces to cut each of a few samples.

    1024 inputs at rank 16 make 16 tiles: one sample of 8192 tokens would run on 16 of 132
    multiprocessors, each with 50 KB in flight, which at 0.7 us of latency is 1.1 TB/s and 15 us;
    cut in 16, it can have all the bandwidth, 5 us, for 1 MB of pieces. A prediction, not a timing.
    """
    return parts(tiles * samples, triton.cdiv(n // samples, 64))


class Dropout(NamedTuple):
    """Dropout on the input of lora_A, as kernels take it."""

    seed: Tensor | None
    threshold: int
    keep_scale: float

    @property
    def active(self) -> bool:
        """Whether anything is dropped at all."""
        return self.seed is not None


def as_dropout(p: float, seed: Tensor | None) -> Dropout:
    """Return the dropout of probability ``p``; none without a seed."""
    return Dropout(seed if p else None, keep_threshold(p), 1.0 / (1.0 - p))


def adapter_weights(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return contiguous weights no narrower than x; kernels narrow wider ones as they load."""
    wide = [w if w.dtype in (x.dtype, torch.float32) else w.to(x.dtype) for w in weights]
    return tuple(w.contiguous() for w in wide)


def as_bytes(token_mask: Tensor | None) -> Tensor | None:
    """Return the mask as a kernel reads it, without a copy."""
    return None if token_mask is None else token_mask.contiguous().view(torch.uint8)
