"""Power-law tails of weight spectra, in plain PyTorch.

Dims: B spectra, N eigenvalues in ascending order, O and I the sides of a weight.
"""

import math

import torch
from torch import Tensor

BINS = 100  # of the histogram whose peak starts the tail
WINDOW = (0.95, 1.5)  # how far from the peak the tail may start
BLOCK = 2**18  # float64 numbers of a temporary, 2 MiB: at 8 MiB they leave the cache, and cost 1.4x
SLICE = 2**22  # float64 numbers of a weight widened at once: 32 MiB


def hill_alpha(eigenvalues: Tensor, method: str, k: int | None) -> Tensor:
    """See :func:`floe_kernels.functional.hill_alpha`."""
    rows = eigenvalues.detach().to(torch.float64)
    rows = rows.reshape(eigenvalues.shape[:-1].numel(), eigenvalues.shape[-1])  # (B, N)
    rows = rows.sort(-1).values
    positive = (rows > 0).sum(-1)  # (B,)
    if method == "median":
        # the index of the median is P // 2 of P eigenvalues, and the tail starts with it
        sizes = positive - positive // 2 if k is None else torch.full_like(positive, k)
        alpha = tail_alpha(rows, sizes)
    else:
        alpha = rows.new_empty(len(rows))
        for b, count in enumerate(positive.tolist()):
            alpha[b] = fix_finger(rows[b, rows.shape[1] - count :], method == "fix_finger_compat")
    return alpha.view(eigenvalues.shape[:-1])


def tail_alpha(rows: Tensor, sizes: Tensor) -> Tensor:
    """Return ``1 + k / sum ln(x / xmin)`` over the ``k = sizes[b]`` largest of every row."""
    start = rows.shape[1] - sizes[:, None]  # (B, 1)
    logs = rows.log()
    above = logs - logs.gather(1, start)  # (B, N)
    in_tail = torch.arange(rows.shape[1], device=rows.device) >= start
    return 1 + sizes / torch.where(in_tail, above, 0.0).sum(-1)


def fix_finger(x: Tensor, compat: bool) -> Tensor:
    """Return alpha of the tail that lies closest to its own power law, of ascending ``x`` > 0."""
    logs = x.log() - x[-1].log()  # (N,), and exactly 0 wherever the tail is flat
    first, stop = finger_window(x, compat)
    size = torch.arange(len(x), len(x) - stop, -1, device=x.device, dtype=x.dtype)  # (stop,)
    size, start = size[first:], logs[first:stop]
    sums = logs.flip(0).cumsum(0).flip(0)[first:stop]
    alpha = 1 + size / (sums - size * start)  # (C,) for C candidates; inf where the tail is flat
    # a finite slope, for inf * ln 1 would be NaN where the law puts the whole mass on xmin
    slope = (1 - alpha).clamp(min=-torch.finfo(x.dtype).max)
    distance = torch.empty_like(alpha)
    step = max(1, BLOCK // (len(x) - first))
    for begin in range(0, len(alpha), step):
        part = slice(begin, begin + step)
        tail = logs[first + begin :]
        rank = torch.arange(len(tail), device=x.device) - torch.arange(
            len(alpha[part]), device=x.device
        ).unsqueeze(1)  # (c, T): place of each eigenvalue in the candidate's own tail
        law = 1 - torch.exp(slope[part, None] * (tail - start[part, None]))
        gap = (law - rank / size[part, None]).abs()
        distance[part] = gap.masked_fill(rank < 0, 0.0).amax(1)
    return alpha[distance.argmin()]


def finger_window(x: Tensor, compat: bool) -> tuple[int, int]:
    """Return the range of indices, ``first <= i < stop``, at which the tail may start."""
    logs = x.log10()
    edges = torch.linspace(logs[0], logs[-1], BINS + 1, dtype=x.dtype, device=x.device)
    # counting in sorted data is a search, and deterministic where a histogram is not
    bounds = torch.searchsorted(logs, edges)
    bounds[0], bounds[-1] = 0, len(x)
    peak = float(edges[bounds.diff().argmax()])  # log10 of the left edge
    low, high = (peak + math.log10(factor) for factor in WINDOW)
    # the released code forgets to go back from the logarithm on the lower side only
    first = int(torch.searchsorted(x, low) if compat else torch.searchsorted(logs, low))
    stop = min(int(torch.searchsorted(logs, high, right=True)), len(x) - 1)
    # bins wider than the window can leave it empty: then the tail starts right above the edge
    return first, max(stop, first + 1)


def gram(weight: Tensor) -> Tensor:
    """Return ``W^T W`` or ``W W^T``, whichever is smaller, in float64."""
    weight = weight.detach()
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    short = tall.shape[1]
    product = weight.new_zeros(short, short, dtype=torch.float64)
    # a slice of the long side at a time: the weight is never copied whole at eight bytes a number
    step = max(1, SLICE // max(1, short))
    for begin in range(0, len(tall), step):
        rows = tall[begin : begin + step].to(torch.float64)
        product.addmm_(rows.T, rows)
    return product


def gram_eigenvalues(product: Tensor) -> Tensor:
    """Return the eigenvalues of a finite Gram matrix, ascending, zero where they are rounding."""
    values = torch.linalg.eigvalsh(product)
    rounding = len(product) * torch.finfo(product.dtype).eps * values[-1:]
    return torch.where(values > rounding, values, 0.0)
