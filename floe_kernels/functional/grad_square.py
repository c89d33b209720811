"""Per-sample squared gradients: the diagonal of the empirical Fisher information.

Dims: N tokens, R rows of the weight (rank, or outputs), D its columns, S samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from floe_kernels.ops import grad_square as ops


class SegmentGradSquare(NamedTuple):
    """A weight gradient, and the squares of its samples' shares."""

    grad: Tensor  #: ``(R, D)``, the promoted dtype of g and x
    fisher: Tensor  #: ``(R, D)``, ``(R,)`` or ``()`` by ``reduce``; float32, or float64 for float64
    norms: Tensor  #: ``(S,)`` squared Frobenius norm of each sample's gradient; dtype of fisher


def segment_grad_square(
    g: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    scale: Tensor | None = None,
    reduce: str = "element",
) -> SegmentGradSquare:
    r"""Return a linear map's weight gradient and the sum of its per-sample squares.

    .. math:: F = \sum_i \Big(\sigma_i \sum_{t \in i} g_t x_t^\top\Big)^2 \quad\text{elementwise},
              \qquad \nabla = \sum_t g_t x_t^\top

    Squared after summing the tokens of one sample and before summing samples: with g the gradient
    of a summed log-likelihood this is the diagonal of the empirical Fisher information (arXiv
    1905.12558, eq. 3). Sums and squares are float32 (float64 for float64) whatever the inputs
    are. An empty sample adds nothing. Rows outside ``offsets`` count in the gradient alone. A
    non-finite row spoils the scores of every entry it reaches. Not differentiable. F is within S
    roundings of float32; :class:`~floe_kernels.FisherCollector` adds calls up in float64.

    Memory at the peak, on a CPU with the C++ kernel, in bytes beyond the arguments:
    ``b * R * (N + D)``, and ``4 * R * D`` more for ``"element"``, with b the size of an element
    of g and x; up to 2 MiB a thread; and at most ``S * D / 2``.

    Args:
        g: Gradient of the map's output, ``(N, R)``, floating point.
        x: Input of the map, ``(N, D)``, floating point.
        offsets: ``(S + 1,)`` int64, not decreasing, within ``0..N``: sample i owns the rows
            ``offsets[i]:offsets[i + 1]``.
        scale: Factor of each sample's gradient before it is squared, ``()`` or ``(S,)`` float32;
            undoes a mean over tokens, or a loss scale. None means 1.
        reduce: How far F is summed: ``"element"`` not at all, ``"rank"`` over columns,
            ``"matrix"`` over both.

    Returns:
        The gradient, F and the per-sample norms.

    Raises:
        ValueError: A shape or dtype does not fit, or ``reduce`` is unknown.

    Example:
        >>> import torch
        >>> g, x = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
        >>> out = segment_grad_square(g, x, torch.tensor([0, 2, 3]))
        >>> out.fisher  # (1 + 2)^2 + 4^2, neither (1 + 2 + 4)^2 nor 1 + 4 + 16
        tensor([[25.]])
        >>> out.norms
        tensor([ 9., 16.])
    """
    _check(g, x, offsets, scale)
    if reduce not in ("element", "rank", "matrix"):
        raise ValueError(f"reduce must be 'element', 'rank' or 'matrix', got {reduce!r}")
    return SegmentGradSquare(*ops.segment_grad_square(g, x, offsets, scale, reduce))


def linear_grad_square(
    g: Tensor, x: Tensor, offsets: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    r"""Return the squared Frobenius norm of every sample's weight gradient.

    .. math:: \Big\| \sigma_i \sum_{t \in i} g_t x_t^\top \Big\|_F^2

    For the wide frozen matrices, whose per-sample gradients are too large to keep: a sample of
    :math:`T_i < RD / (R + D)` tokens goes through its two Gram matrices (arXiv 1510.01799), a
    longer one through its gradient, one at a time. Float32 (float64 for float64). An empty sample
    gives 0. Not differentiable.

    Memory at the peak, on a CPU with the C++ kernel, in bytes beyond the arguments: for short
    samples of up to T tokens ``12 * T**2``, or ``8 * T * (R + D)`` where g and x are not float32;
    for long ones what :func:`segment_grad_square` takes, ``b * R * (N + D)``.

    Args:
        g: Gradient of the map's output, ``(N, R)``, floating point.
        x: Input of the map, ``(N, D)``, floating point.
        offsets: ``(S + 1,)`` int64, not decreasing, within ``0..N``.
        scale: ``()`` or ``(S,)`` float32; None means 1.

    Returns:
        ``(S,)``, float32 or float64.

    Raises:
        ValueError: A shape or dtype does not fit.

    Example:
        >>> import torch
        >>> g, x = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
        >>> linear_grad_square(g, x, torch.tensor([0, 2, 3]))
        tensor([ 9., 16.])
    """
    _check(g, x, offsets, scale)
    norms: Tensor = ops.linear_grad_square(g, x, offsets, scale)
    return norms


def _check(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> None:
    if g.ndim != 2 or x.ndim != 2 or len(g) != len(x):
        got = f"{tuple(g.shape)} and {tuple(x.shape)}"
        raise ValueError(f"g must be (N, R) and x (N, D) with one N, got {got}")
    if not (g.is_floating_point() and x.is_floating_point()):
        raise ValueError(f"g and x must be floating point, got {g.dtype} and {x.dtype}")
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        got = f"{offsets.dtype} {tuple(offsets.shape)}"
        raise ValueError(f"offsets must be int64 (S + 1,), got {got}")
    if scale is not None and scale.shape not in ((), (len(offsets) - 1,)):
        raise ValueError(
            f"scale must be () or (S,) with S = {len(offsets) - 1}, got {tuple(scale.shape)}"
        )
