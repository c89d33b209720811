"""A mixture of LoRA experts beside one frozen linear: the flagship operation.

Dims: N tokens, I inputs, O outputs, E experts, K experts kept per token,
R packed columns (the sum of the experts' ranks).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from floe_kernels.ops import moe_lora as ops
from floe_kernels.reference.moe_lora import FisherBuffers, wide_dtype


class MoELoRAOutput(NamedTuple):
    """The layer's output and how its tokens were routed."""

    out: Tensor  #: ``(..., O)``, dtype of the base's output
    logits: Tensor  #: ``(N, E)`` float32 (float64 for float64), detached
    experts: Tensor  #: ``(N, K)`` int64, best first
    gates: Tensor  #: ``(N, K)`` float32 (float64 for float64), detached


def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    *,
    ranks: Sequence[int],
    top_k: int | None = None,
    scaling: Tensor | None = None,
    shared_A: bool = False,
    renormalize: bool | None = None,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    aux_coefs: Tensor | None = None,
    fisher: FisherBuffers | None = None,
) -> MoELoRAOutput:
    r"""Apply a frozen linear and a routed mixture of LoRA experts to the same input.

    .. math::
        y = x W^\top + b + \sum_{e \in \mathrm{top}_k(x)} g_e \, s_e \, (x A_e^\top) B_e,
        \qquad g = \mathrm{softmax\ over\ the\ kept\ logits\ of\ } x W_r^\top

    MoLA's layer (arXiv 2402.08562); with ``shared_A`` HydraLoRA's (arXiv 2404.19245): one A, every
    expert kept. Products are taken in ``x.dtype`` and summed in float32, logits and gates are
    float32, gradients come in each parameter's dtype. Equal logits keep index order. A non-finite
    token spoils its own row of the output and the gradients of the parameters, no other row.
    Differentiable once, in x, lora_A, lora_B and router_weight; for second derivatives use
    :func:`floe_kernels.reference.moe_lora`. Deterministic. Saved for the backward: x, and
    R + E + 2K numbers a token.

    Memory at the peak, on a CPU with the C++ kernels, in bytes beyond the arguments: forward
    ``b * (N * (O + C + G) + W) + N * (4 * E + 12 * K)``, backward
    ``b * (N * (I + (3 * G or C + R) + 2 * E) + 2 * W)``, and up to 2 MiB a thread. b is the
    size of an element of x; C is R, or r with ``shared_A``; W is ``C * I + R * O + E * I``, the
    adapter's elements; G is 0, or ``K * max(ranks)`` where so many columns wait for so few experts
    that tokens are sorted by expert. Dropout adds ``N * I / 8``, and ``fisher`` in the backward
    ``b * N * (C + R + E) + 8 * N`` and what :func:`segment_grad_square` takes.

    Args:
        x: Input, ``(..., I)``, floating point.
        weight: Frozen base weight, ``(O, I)``, dtype of x, any strides.
        bias: Frozen base bias ``(O,)``, or None.
        lora_A: ``(R, I)``, expert after expert; with ``shared_A`` ``(r, I)``.
        lora_B: ``(R, O)``, expert after expert; with ``shared_A`` ``(E * r, O)``.
        router_weight: ``(E, I)``, dtype of lora_A and lora_B.
        ranks: Rank of each of the E experts; 0 is legal, and so is no expert at all.
        top_k: Experts kept per token; None means ``min(2, E)``, or E with ``shared_A``.
        scaling: ``(R,)`` float32 factor of every packed column, no gradient; None means ones.
        shared_A: Whether all experts share one A.
        renormalize: Whether kept gates sum to 1; None means ``top_k > 1``.
        token_mask: ``(...)`` bool, False on padding: such a token gets no expert, and does not
            count in the auxiliary losses.
        dropout_p: Probability in [0, 1) of zeroing an element of lora_A's input; the router reads
            x undropped. Needs ``dropout_seed``.
        dropout_seed: int64 scalar tensor, the Philox key; the mask is a function of it alone.
        aux_coefs: ``(2,)`` float32, coefficients of :func:`load_balance_loss` and
            :func:`router_z_loss`; the backward adds their gradient. None means neither.
        fisher: Buffers to which the backward adds per-sample squared gradients.

    Returns:
        The output, and the routing for statistics.

    Raises:
        ValueError: A shape, dtype or number does not fit; the sentence names rule and value.

    Example:
        >>> import torch
        >>> x, w = torch.randn(5, 6), torch.randn(4, 6)
        >>> a, b, router = torch.randn(3, 6), torch.zeros(3, 4), torch.randn(2, 6)
        >>> y = moe_lora_linear(x, w, None, a, b, router, ranks=[1, 2]).out
        >>> torch.allclose(y, x @ w.T, atol=1e-5)  # lora_B is zero: nothing is added yet
        True
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight must be (O, I) with I = {x.shape[-1]}, the last size of x, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    for name, frozen in (("weight", weight), ("bias", bias)):
        if frozen is not None and frozen.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} is frozen here, got one that requires grad: "
                "compute the base yourself and call moe_lora(x, base_out, ...)"
            )
    rows = rows_of(x)
    shared = _shared_arguments(
        rows, weight.shape[0], lora_A, lora_B, router_weight, ranks, top_k, scaling, shared_A,
        renormalize, token_mask, dropout_p, dropout_seed, aux_coefs, fisher,
    )  # fmt: skip
    if shared is None:
        return _no_experts(torch.nn.functional.linear(x, weight, bias), rows)
    out, _z, experts, gates, logits = _no_autocast(ops.call_linear, rows, weight, bias, *shared)
    if x.ndim != 2:
        out = out.view(*x.shape[:-1], weight.shape[0])
    return MoELoRAOutput(out, _detached(logits), experts, _detached(gates))


def moe_lora(
    x: Tensor,
    base_out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    *,
    ranks: Sequence[int],
    top_k: int | None = None,
    scaling: Tensor | None = None,
    shared_A: bool = False,
    renormalize: bool | None = None,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    aux_coefs: Tensor | None = None,
    fisher: FisherBuffers | None = None,
) -> MoELoRAOutput:
    r"""Add a routed mixture of LoRA experts to the output of a base of any kind.

    .. math:: y = \mathrm{base\_out} + \sum_{e \in \mathrm{top}_k(x)} g_e \, s_e \, (x A_e^\top) B_e

    For quantised and foreign bases, and for bases that train: ``base_out`` keeps its own autograd.
    Everything else is as in :func:`moe_lora_linear`, which is faster where it applies: this one
    writes a second output and reads x's gradient once more. Memory: as there, and as much as the
    output twice more where ``base_out`` has another dtype than x.

    Args:
        x: Input, ``(..., I)``, floating point.
        base_out: The base's output for ``x``, ``(..., O)``, floating point; not written to.
        lora_A: As in :func:`moe_lora_linear`, and so is every argument that follows.
        lora_B: ``(R, O)``.
        router_weight: ``(E, I)``.
        ranks: Rank of each expert.
        top_k: Experts kept per token.
        scaling: ``(R,)`` float32.
        shared_A: Whether all experts share one A.
        renormalize: Whether kept gates sum to 1.
        token_mask: ``(...)`` bool, False on padding.
        dropout_p: Probability of zeroing an element of lora_A's input.
        dropout_seed: int64 scalar tensor.
        aux_coefs: ``(2,)`` float32.
        fisher: Buffers to which the backward adds per-sample squared gradients.

    Returns:
        The sum, in the dtype of ``base_out``, and the routing for statistics.

    Raises:
        ValueError: A shape, dtype or number does not fit; the sentence names rule and value.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 6)
        >>> base = torch.nn.Linear(6, 4)
        >>> a, b, router = torch.randn(3, 6), torch.zeros(3, 4), torch.randn(2, 6)
        >>> moe_lora(x, base(x), a, b, router, ranks=[1, 2]).out.shape
        torch.Size([2, 5, 4])
    """
    if base_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base_out must be (..., O) with the leading sizes of x, {tuple(x.shape[:-1])}, "
            f"got {tuple(base_out.shape)}"
        )
    rows = rows_of(x)
    shared = _shared_arguments(
        rows, base_out.shape[-1], lora_A, lora_B, router_weight, ranks, top_k, scaling, shared_A,
        renormalize, token_mask, dropout_p, dropout_seed, aux_coefs, fisher,
    )  # fmt: skip
    if shared is None:
        return _no_experts(base_out.clone(), rows)
    base_rows = rows_of(base_out)
    out, _z, experts, gates, logits = _no_autocast(ops.call, rows, base_rows, *shared)
    return MoELoRAOutput(out.view(base_out.shape), _detached(logits), experts, _detached(gates))


def default_top_k(num_experts: int, shared_A: bool) -> int:
    """Return how many experts a token keeps when nobody says: 2, or all of a shared A's heads."""
    return num_experts if shared_A else min(2, num_experts)


def rows_of(x: Tensor) -> Tensor:
    """Return ``(..., I)`` as ``(N, I)``."""
    if x.ndim == 2:
        return x  # a view is a node of the graph
    return x.flatten(0, -2) if x.ndim > 2 else x[None]  # reshape(-1, 0) cannot tell how many rows


def _detached(routing: Tensor) -> Tensor:
    return routing.detach() if routing.requires_grad else routing


def _no_autocast(operator: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    # the operator's dtype rule is its own; autocast would reach into the readable kernel
    if not torch._C._is_any_autocast_enabled():
        return operator(x, *rest)
    with torch.autocast(x.device.type, enabled=False):
        return operator(x, *rest)


def _no_experts(out: Tensor, rows: Tensor) -> MoELoRAOutput:
    empty = rows.new_empty(len(rows), 0, dtype=wide_dtype(rows))
    return MoELoRAOutput(out, empty, empty.long(), empty)


def _shared_arguments(
    rows: Tensor,
    num_outputs: int,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    ranks: Sequence[int],
    top_k: int | None,
    scaling: Tensor | None,
    shared_A: bool,
    renormalize: bool | None,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    aux_coefs: Tensor | None,
    fisher: FisherBuffers | None,
) -> tuple[Any, ...] | None:
    """Check what both doors share and flatten it for the operator; None for no experts."""
    n, num_inputs = rows.shape
    ranks = [int(r) for r in ranks]
    if not rows.is_floating_point():
        raise ValueError(f"x must be floating point, got {rows.dtype}")
    if ranks and min(ranks) < 0:
        raise ValueError(f"ranks must not be negative, got {ranks}")
    if shared_A and len(set(ranks)) > 1:
        raise ValueError(f"with shared_A all experts have one rank, got {ranks}")
    total = sum(ranks)
    packed_A = ranks[0] if shared_A and ranks else total
    weights = (lora_A, lora_B, router_weight)
    shapes = (packed_A, num_inputs), (total, num_outputs), (len(ranks), num_inputs)
    dtype = lora_A.dtype
    fits = (lora_A.shape, lora_B.shape, router_weight.shape) == shapes
    if not (fits and dtype == lora_B.dtype == router_weight.dtype and dtype.is_floating_point):
        _refuse_weights(weights, shapes)
    if scaling is not None and (scaling.shape != (total,) or scaling.requires_grad):
        got = f"{tuple(scaling.shape)}{' requiring grad' if scaling.requires_grad else ''}"
        raise ValueError(f"scaling must be ({total},) without a gradient, got {got}")
    if not ranks:
        return None
    if top_k is None:
        top_k = default_top_k(len(ranks), shared_A)
    if not 1 <= top_k <= len(ranks):
        raise ValueError(f"top_k must be in 1..E = 1..{len(ranks)}, got {top_k}")
    if token_mask is not None and (token_mask.numel() != n or token_mask.dtype != torch.bool):
        got = f"{token_mask.dtype} {tuple(token_mask.shape)}"
        raise ValueError(f"token_mask must be bool with one element per token, {n}, got {got}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p and dropout_seed is None:
        raise ValueError("dropout_p > 0 needs a dropout_seed, an int64 scalar tensor, got None")
    if aux_coefs is not None and aux_coefs.shape != (2,):
        raise ValueError(f"aux_coefs must be (2,), got {tuple(aux_coefs.shape)}")
    return (
        lora_A, lora_B, router_weight,
        rows.new_ones(total, dtype=torch.float32) if scaling is None else scaling,
        ranks, top_k, shared_A, top_k > 1 if renormalize is None else renormalize,
        None if token_mask is None else token_mask.reshape(-1),
        float(dropout_p), dropout_seed if dropout_p else None, aux_coefs,
        *(fisher or (None,) * 6),
    )  # fmt: skip


def _refuse_weights(weights: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> None:
    """Say which of the adapter's weights has a wrong shape or dtype."""
    origins = (
        ("lora_A", "ranks and the last size of x"),
        ("lora_B", "ranks and the base's outputs"),
        ("router_weight", "len(ranks) and x's last size"),
    )
    for (name, why), tensor, shape in zip(origins, weights, shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} from {why}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != weights[0].dtype:
            raise ValueError(
                f"lora_A, lora_B and router_weight must share one floating point dtype, "
                f"got {weights[0].dtype} and {name} in {tensor.dtype}"
            )
