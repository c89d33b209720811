"""Numbers with a bound on their error: what any right kernel may return, derived step by step.

A ball is a float64 value and a radius. Every operation adds what rounding, in whatever order its
sums are taken, can do at most; an overflow that some order could meet makes the radius infinite.
No constant is chosen: the radius follows from the dtypes, the shapes and the numbers alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: A hardware that flushes subnormal numbers (VDPBF16PS always does) is off by this much.
FLUSH = {torch.float16: 2.0**-24}
F64 = 2.0**-52  # the truth's own rounding, product and sum


class Ball(NamedTuple):
    """All numbers within ``r`` of ``v``; an infinite radius means anything, NaN included."""

    v: Tensor
    r: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude in it."""
        return self.v.abs() + self.r

    def __getitem__(self, index: object) -> "Ball":
        return Ball(self.v[index], self.r[index])

    @property
    def T(self) -> "Ball":
        return Ball(self.v.T, self.r.T)

    def rows(self, keep: Tensor | None) -> "Ball":
        """Zero, exactly, the rows that are not kept."""
        if keep is None:
            return self
        return Ball(
            torch.where(keep[:, None], self.v, 0.0), torch.where(keep[:, None], self.r, 0.0)
        )


def ball(v: Tensor, r: Tensor) -> Ball:
    bad = ~(v.isfinite() & r.isfinite())
    return Ball(torch.where(bad, 0.0, v), torch.where(bad, torch.inf, r))


def exact(t: Tensor) -> Ball:
    v = t.detach().double()
    return ball(v, torch.zeros_like(v))


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def rounded(a: Ball, *dtypes: torch.dtype) -> Ball:
    """Store in each dtype in turn, or in none of them."""
    for dtype in dtypes:
        info = torch.finfo(dtype)
        r = a.r + unit(dtype) * a.size + FLUSH.get(dtype, info.tiny)
        a = ball(a.v, torch.where(a.v.abs() + r > info.max, torch.inf, r))
    return a


def _computed(v: Tensor, r: Tensor, size: Tensor, steps: float, dtype: torch.dtype) -> Ball:
    info = torch.finfo(dtype)
    r = r + steps * (unit(dtype) + F64) * size + info.tiny
    return ball(v, torch.where(size * (1 + steps * info.eps) > info.max, torch.inf, r))


def matmul(a: Ball, b: Ball, dtype: torch.dtype) -> Ball:
    """Multiply matrices, summed in ``dtype`` in any order."""
    r = a.v.abs() @ b.r + a.r @ b.size
    size, terms = a.size @ b.size, a.v.shape[1]
    tiny = torch.finfo(dtype).tiny  # an operand, a product or a partial sum that is flushed
    r = r + tiny * (2 * terms + a.size.sum(1)[:, None] + b.size.sum(0)[None])
    return _computed(a.v @ b.v, r, size, terms + 2, dtype)


def mul(a: Ball, b: Ball, dtype: torch.dtype) -> Ball:
    r = a.v.abs() * b.r + a.r * b.size
    r = r + torch.finfo(dtype).tiny * (a.size + b.size)
    return _computed(a.v * b.v, r, a.size * b.size, 1, dtype)


def add(a: Ball, b: Ball, dtype: torch.dtype) -> Ball:
    return _computed(a.v + b.v, a.r + b.r, a.size + b.size, 1, dtype)


def total(a: Ball, dim: int, dtype: torch.dtype) -> Ball:
    """Sum in any order."""
    count = a.v.shape[dim]
    return _computed(a.v.sum(dim), a.r.sum(dim), a.size.sum(dim), count, dtype)


def scaled(a: Ball, factor: float, dtype: torch.dtype) -> Ball:
    """Multiply or divide by a number that is itself rounded."""
    return _computed(a.v * factor, a.r * abs(factor), a.size * abs(factor), 3, dtype)


def softmax(z: Ball, dtype: torch.dtype) -> Ball:
    """Exponentials with errors of up to 4 roundings each, their sum and one division."""
    if z.v.shape[1] == 0:
        return z
    p = z.v.softmax(1)
    top = z.v.amax(1, keepdim=True)
    u, width = unit(dtype) + F64, z.v.shape[1]
    # subtracting the largest rounds by u times the difference, which the exponential makes relative
    relative = 2 * z.r.amax(1, keepdim=True) + u * ((top - z.v) + width + 12)
    r = p * torch.expm1(relative.clamp(max=1)) + torch.finfo(dtype).tiny * width
    r = torch.where(relative > 1, 1.0, r)  # a finite softmax is in [0, 1], whatever z is
    wild = (z.size > torch.finfo(dtype).max).any(1, keepdim=True)
    return Ball(p, torch.where(wild, torch.inf, r))


def logsumexp(z: Ball, dtype: torch.dtype) -> Ball:
    v = z.v.logsumexp(1, keepdim=True)
    u, width = unit(dtype) + F64, z.v.shape[1]
    size = z.size.amax(1, keepdim=True)
    return ball(v, z.r.amax(1, keepdim=True) + u * (3 * size + v.abs() + 2 * width + 12))


def assert_within(name: str, got: Tensor, want: Ball) -> None:
    """Fail unless every number is in its ball."""
    assert got.shape == want.v.shape, f"{name}: shape {tuple(got.shape)}, {tuple(want.v.shape)}"
    right = ((got.double() - want.v).abs() <= want.r) | want.r.isinf()
    if not right.all():
        at = tuple((~right).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)} is {got[at].item():.9g}, must be {want.v[at].item():.9g} "
            f"to within {want.r[at].item():.3g}; {int((~right).sum())} of {got.numel()} are wrong"
        )
