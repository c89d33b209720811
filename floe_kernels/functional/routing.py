"""Routing: which experts see a token, and how much each counts."""

from typing import NamedTuple

from torch import Tensor

from floe_kernels import reference
from floe_kernels.ops import routing as ops


class Routing(NamedTuple):
    """Where each token goes."""

    gates: Tensor  #: ``(N, K)``, dtype of the logits; renormalised, rows sum to 1
    experts: Tensor  #: ``(N, K)``, int64


def topk_softmax(logits: Tensor, k: int, *, renormalize: bool | None = None) -> Routing:
    r"""Keep each token's ``k`` best experts, weighted by a softmax.

    .. math:: g_{nk} = \frac{\exp z_{n e_k}}{\sum_{j} \exp z_{n e_j}},
              \qquad e_0, e_1, \dots = \text{the experts of token } n \text{, best first}

    The sum runs over the kept experts if ``renormalize``, else over all. One kept expert would
    then always weigh 1 and its router never learn, so the default renormalises for ``k > 1`` only.
    The softmax is taken in float32 (float64 for float64 input). Equal logits keep index order, on
    every device. A row with NaN gives NaN gates in that row alone; no rows give empty results.
    Differentiable in ``logits``, twice; the choice of experts is not differentiated. Memory: the
    results alone, ``N * k * (b + 8)`` bytes with b the size of a logit, with a native kernel.

    Args:
        logits: Router scores, ``(N, E)`` for N tokens and E experts, floating point.
        k: Experts to keep per token, ``1 <= k <= E``.
        renormalize: Whether the kept gates sum to 1; None means ``k > 1``.

    Returns:
        Gates ``(N, k)`` in the dtype of ``logits`` and experts ``(N, k)`` in int64, best first.

    Raises:
        ValueError: ``logits`` is not a floating point matrix, or ``k`` is out of range.

    Example:
        >>> import torch
        >>> gates, experts = topk_softmax(torch.tensor([[0.0, 2.0, 2.0]]), k=2)
        >>> experts
        tensor([[1, 2]])
        >>> gates
        tensor([[0.5000, 0.5000]])
    """
    _check_logits(logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be in 1..E = 1..{logits.shape[1]}, got {k}")
    return Routing(*ops.topk_softmax(logits, k, k > 1 if renormalize is None else renormalize))


def load_balance_loss(
    logits: Tensor, experts: Tensor, *, token_mask: Tensor | None = None
) -> Tensor:
    r"""Return the Switch Transformer's load balancing loss (arXiv 2101.03961, eq. 4).

    .. math:: E \sum_e f_e P_e

    with :math:`f_e` the share of all picks that expert e got (they sum to 1, whatever k is) and
    :math:`P_e` the mean of its softmax probability. The least value, 1, means perfect balance.
    Computed in float32 (float64 for float64). Differentiable in ``logits`` through P, as often as
    wanted; f is not differentiated. No tokens give 0. Memory: the probabilities and a weight a
    pick, ``4 * N * (E + K)`` bytes, or ``8 * N * E`` where ``logits`` are not float32.

    Args:
        logits: Router scores, ``(N, E)``, floating point.
        experts: The experts kept, ``(N, K)`` int64.
        token_mask: ``(N,)`` bool, False on padding, which counts neither in f nor in P.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> load_balance_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    _check_logits(logits)
    _check_rows("experts", experts, logits, 2)
    _check_rows("token_mask", token_mask, logits, 1)
    return reference.load_balance_loss(logits, experts, token_mask)


def router_z_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    r"""Return ST-MoE's router z-loss (arXiv 2202.08906, eq. 5), which keeps logits small.

    .. math:: \frac1N \sum_n \Big(\log \sum_e \exp z_{ne}\Big)^2

    Computed in float32 (float64 for float64). Differentiable. No tokens give 0. Memory:
    ``4 * N * (E + 2)`` bytes, or ``8 * N * (E + 1)`` where ``logits`` are not float32.

    Args:
        logits: Router scores, ``(N, E)``, floating point.
        token_mask: ``(N,)`` bool, False on padding, which does not count.

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> router_z_loss(torch.zeros(4, 1))
        tensor(0.)
    """
    _check_logits(logits)
    _check_rows("token_mask", token_mask, logits, 1)
    return reference.router_z_loss(logits, token_mask)


def expert_load(experts: Tensor, num_experts: int, *, token_mask: Tensor | None = None) -> Tensor:
    r"""Return the share of all picks that each expert got, :math:`f_e` of the balancing loss.

    Exact for fewer than 2**24 picks. No unmasked token gives zeros. Not differentiable. Memory: a
    weight a pick, ``4 * N * K`` bytes.

    Args:
        experts: The experts kept, ``(N, K)`` int64.
        num_experts: E.
        token_mask: ``(N,)`` bool, False on padding, which does not count.

    Returns:
        ``(E,)`` float32.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> expert_load(torch.tensor([[0, 1], [0, 2]]), 3)
        tensor([0.5000, 0.2500, 0.2500])
    """
    _check_rows("token_mask", token_mask, experts, 1)
    return reference.expert_load(experts, num_experts, token_mask)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits must be a floating point (N, E) matrix, got {got}")


def _check_rows(name: str, tensor: Tensor | None, logits: Tensor, ndim: int) -> None:
    if tensor is not None and (tensor.ndim != ndim or len(tensor) != len(logits)):
        shape = ("(N,)", "(N, K)")[ndim - 1]
        raise ValueError(
            f"{name} must be {shape} with N = {len(logits)}, the number of tokens, "
            f"got {tuple(tensor.shape)}"
        )
