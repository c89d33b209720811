"""Sensitivity of the frozen matrices: LoRA-SMoE (arXiv 2505.06272)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from floe_kernels.scores.fisher import block_linears, collect


def sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    how: str = "sum",
    modules: Sequence[str] | None = None,
    aggregate: str = "module",
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, float]:
    r"""Score every frozen linear by its per-sample squared gradients.

    .. math:: S(W) = \frac1n \sum_i \Big\| \frac{\partial \ell_i}{\partial W} \Big\|_F^2

    LoRA-SMoE's sensitivity (arXiv 2505.06272), defined cleanly: per sample rather than per step,
    in float32, nothing clipped, no optimiser step, the same samples for every matrix. Needs no
    adapter, and no memory of the size of a weight. Empty ``batches`` raise.

    Args:
        model: Any model whose output has ``.loss``.
        batches: Keyword arguments of the model, with ``labels``.
        how: ``"sum"`` over the matrix's elements, or ``"mean"`` per element.
        modules: Names of the linears; None means all those inside numbered blocks.
        aggregate: ``"module"`` or ``"layer"`` (block).
        progress: Called with the number of batches done, after each.
        options: Passed to :class:`~floe_kernels.FisherCollector`.

    Returns:
        Module or layer name to score, in model order.

    Raises:
        ValueError: No batches, no linears, or an unknown choice.

    Example:
        >>> import types
        >>> import torch
        >>> class Toy(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, inputs_embeds):
        ...         for layer in self.layers:
        ...             inputs_embeds = layer(inputs_embeds)
        ...         return types.SimpleNamespace(loss=inputs_embeds.square().sum())
        >>> data = [{"inputs_embeds": torch.randn(2, 5, 4)}]
        >>> list(sensitivity(Toy(), data, loss_reduction="sum"))
        ['layers.0', 'layers.1', 'layers.2']
    """
    names = block_linears(model) if modules is None else tuple(modules)
    if not names:
        raise ValueError("the model must have linears inside numbered blocks, got none")
    record = collect(model, batches, progress=progress, frozen=names, **options)
    return record.read(aggregate=aggregate, how=how, parameters=("weight",))
