"""Element dropout whose mask any device can draw again: Philox4x32-10, in plain PyTorch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Return the first of Philox4x32-10's four words, as int64 in ``[0, 2**32)``.

    Args:
        seed: The 64-bit key, an int64 scalar tensor.
        counter: The low 64 bits of the 128-bit counter, int64, any shape; the others are zero.
    """
    key = [seed & _LOW, (seed >> 32) & _LOW]
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, (counter >> 32) & _LOW, zero, zero
    for _ in range(10):
        # a product of two 32-bit words fills 64 bits: int64 wraps to the same bits
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _LOW) ^ c1 ^ key[0],
            right & _LOW,
            ((left >> 32) & _LOW) ^ c3 ^ key[1],
            left & _LOW,
        )
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    return c0


def keep_threshold(p: float) -> int:
    """Return the smallest word that keeps its element: a word is uniform on ``[0, 2**32)``."""
    return round(p * 2**32)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero each element of ``x`` (N, d) with probability ``p``, scale the rest by ``1 / (1 - p)``.

    Element (t, c) is decided by counter ``t * d + c`` alone, so a second call, on any device and
    with any values, drops the same elements.
    """
    if p == 0.0 or seed is None:
        return x
    counter = torch.arange(x.numel(), device=x.device).view(x.shape)
    keep = philox(seed.to(x.device), counter) >= keep_threshold(p)
    return torch.where(keep, x / (1 - p), x.new_zeros(()))
