"""Per-sample squared gradients of a linear map, in plain PyTorch.

Dims: N tokens, R rows of the weight (rank, or outputs), D columns, S samples.
Sample i owns the rows ``offsets[i]:offsets[i + 1]``; its gradient is ``g_i^T x_i`` (R, D).
"""

import itertools

import torch
from torch import Tensor


def segment_grad_square(
    g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`floe_kernels.functional.segment_grad_square`."""
    wide = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
    rows, cols = g.shape[1], x.shape[1]
    bounds = offsets.tolist()
    score = torch.float64 if wide == torch.float64 else torch.float32
    fisher = g.new_zeros(
        {"element": (rows, cols), "rank": (rows,), "matrix": ()}[reduce], dtype=score
    )
    norms = g.new_zeros(len(bounds) - 1, dtype=score)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        sample = g[begin:end].to(wide).T @ x[begin:end].to(wide)
        if scale is not None:
            sample = sample * (scale if scale.ndim == 0 else scale[i])
        square = sample.square()
        norms[i] = square.sum()
        fisher += {"element": square, "rank": square.sum(1), "matrix": norms[i]}[reduce]
    grad = (g.T @ x) if g.dtype == x.dtype else g.to(wide).T @ x.to(wide)
    return grad.to(torch.promote_types(g.dtype, x.dtype)), fisher, norms


def linear_grad_square(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """See :func:`floe_kernels.functional.linear_grad_square`."""
    wide = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
    rows, cols = g.shape[1], x.shape[1]
    bounds = offsets.tolist()
    norms = g.new_zeros(len(bounds) - 1, dtype=wide)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        gi, xi = g[begin:end].to(wide), x[begin:end].to(wide)
        # ||g^T x||^2 = <g g^T, x x^T>: two Gram matrices cost less than the gradient itself
        # while the sample is shorter than the harmonic half of the weight's sides
        if (end - begin) * (rows + cols) < rows * cols:
            norms[i] = ((gi @ gi.T) * (xi @ xi.T)).sum().clamp(min=0)
        else:
            norms[i] = (gi.T @ xi).square().sum()
    return norms if scale is None else norms * scale.to(wide).square()
