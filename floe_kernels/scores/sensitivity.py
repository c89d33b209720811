"""Sensitivity of the frozen matrices: LoRA-SMoE (arXiv 2505.06272)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from floe_kernels.scores.fisher import block_linears, collect
from floe_kernels.scores.names import layer_of
from floe_kernels.scores.samples import one_by_one


def sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    how: str = "sum",
    modules: Sequence[str] | None = None,
    aggregate: str = "module",
    layers_at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, float]:
    r"""Score every frozen linear by its per-sample squared gradients.

    .. math:: S(W) = \frac1n \sum_i \Big\| \frac{\partial \ell_i}{\partial W} \Big\|_F^2

    LoRA-SMoE's sensitivity (arXiv 2505.06272), defined cleanly: per sample rather than per step,
    in float32, nothing clipped, no optimiser step, the same samples for every matrix. Needs no
    adapter, and no memory of the size of a weight: like LoRA's training, it keeps the inputs of the
    scored linears. With ``layers_at_once`` it keeps those of so many blocks only, and goes over the
    batches once for each such window; the scores are the same. Empty ``batches`` raise.

    Args:
        model: Any model whose output has ``.loss``.
        batches: Keyword arguments of the model, with ``labels``.
        how: ``"sum"`` over the matrix's elements, or ``"mean"`` per element.
        modules: Names of the linears; None means all those inside numbered blocks.
        aggregate: ``"module"`` or ``"layer"`` (block).
        layers_at_once: Blocks of a window; None means all. ``batches`` are then kept.
        progress: Called with the number of batches done, after each, over all windows.
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
    names = _linears(model, modules)
    scores: dict[str, float] = {}
    done = 0
    if layers_at_once is not None:
        batches = list(batches)
    options = {"keep_gates": False, **options}
    for window in _windows(names, layers_at_once):

        def report(count: int, before: int = done) -> None:
            if progress is not None:
                progress(before + count)

        record = collect(model, batches, progress=report, frozen=window, **options)
        scores |= record.read(aggregate=aggregate, how=how, parameters=("weight",))
        done += len(batches) if isinstance(batches, list) else 0
    return scores


def sample_sensitivity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    how: str = "sum",
    modules: Sequence[str] | None = None,
    aggregate: str = "module",
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Score every frozen linear once for each sample: their mean is :func:`sensitivity`.

    The rows are what :func:`floe_kernels.allocation.stability` resamples, to tell whether other
    samples would rank the linears alike. The model sees one sample at a time.

    Args:
        model: As in :func:`sensitivity`.
        batches: As in :func:`sensitivity`.
        how: As in :func:`sensitivity`.
        modules: As in :func:`sensitivity`.
        aggregate: As in :func:`sensitivity`.
        progress: Called with the number of samples done, after each.
        options: As in :func:`sensitivity`.

    Returns:
        For every sample, module or layer name to score.

    Raises:
        ValueError: No samples, one without a finite gradient, no linears, or an unknown choice.

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
        >>> [list(row) for row in sample_sensitivity(Toy(), data, loss_reduction="sum")]
        [['layers.0', 'layers.1', 'layers.2'], ['layers.0', 'layers.1', 'layers.2']]
    """
    names = _linears(model, modules)
    rows, options = [], {"keep_gates": False, **options}
    for sample in one_by_one(batches):
        record = collect(model, [sample], frozen=names, **options)
        rows.append(record.read(aggregate=aggregate, how=how, parameters=("weight",)))
        if progress is not None:
            progress(len(rows))
    if not rows:
        raise ValueError("scoring needs at least one sample, got none")
    return rows


def _linears(model: nn.Module, modules: Sequence[str] | None) -> tuple[str, ...]:
    names = block_linears(model) if modules is None else tuple(modules)
    if not names:
        raise ValueError("the model must have linears inside numbered blocks, got none")
    return names


def _windows(names: Sequence[str], layers: int | None) -> list[tuple[str, ...]]:
    """Group names by blocks, so many blocks at a time."""
    if layers is None:
        return [tuple(names)]
    if layers < 1:
        raise ValueError(f"layers_at_once must be at least 1, got {layers}")
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(layer_of(name), []).append(name)
    groups = list(blocks.values())
    return [
        tuple(name for block in groups[i : i + layers] for name in block)
        for i in range(0, len(groups), layers)
    ]
