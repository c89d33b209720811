"""Layer scores from Fisher information: FLoE (arXiv 2506.00495)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from floe_kernels.nn import FusedMoELoRA
from floe_kernels.scores.collector import FisherCollector
from floe_kernels.scores.names import in_block, plain_name
from floe_kernels.scores.record import FisherRecord

#: variant -> (parameters, how), for those that read squares; the others read gate gradients.
SQUARES = {
    "init": (("lora_B",), "mean"),
    "param_sum": (("lora_A", "lora_B"), "sum"),
    "param_mean": (("lora_A", "lora_B"), "mean"),
    "base": (("weight",), "sum"),
}
VARIANTS = (*SQUARES, "gate", "taylor1")


def fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    variant: str = "init",
    aggregate: str = "layer",
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> dict[str, float]:
    r"""Score every adapted layer by the Fisher information of its adapter.

    ==============  =========================================================================
    ``init``        mean over the elements of lora_B, at zero, of
                    :math:`\frac1n \sum_i (\partial \ell_i / \partial \theta)^2`; needs no warm-up
    ``gate``        :math:`\frac1n \sum_i (\partial \ell_i / \partial m)^2` for a scalar gate m on
                    the layer's whole adapter output (FLoE, arXiv 2506.00495, as we read it); zero
                    while lora_B is zero, so train a little first
    ``param_sum``   the same as ``init`` for lora_A and lora_B, summed over elements
    ``param_mean``  likewise, averaged over elements
    ``taylor1``     :math:`\left| \frac1n \sum_i \partial \ell_i / \partial m \right|`
    ``base``        squared gradients of the frozen base matrices (arXiv 2505.06272), summed
    ==============  =========================================================================

    The model runs in evaluation mode, with gradients, and is left as it was; no parameter's
    ``grad`` is kept. ``batches`` go through ``model(**batch).loss``. Empty ``batches`` raise.

    Args:
        model: A model with adapters (``base``: with or without), whose output has ``.loss``.
        batches: Keyword arguments of the model, with ``labels``.
        variant: One of the table's rows.
        aggregate: ``"layer"`` (block) or ``"module"``.
        progress: Called with the number of batches done, after each.
        options: Passed to :class:`FisherCollector`.

    Returns:
        Layer or module name to score, in model order; not normalised to any range.

    Raises:
        ValueError: An unknown variant, no batches, or only non-finite ones.

    Example:
        >>> import types
        >>> import torch
        >>> class Toy(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList(
        ...             FusedMoELoRA(torch.nn.Linear(4, 4), ranks=[2, 2]) for _ in range(3)
        ...         )
        ...     def forward(self, inputs_embeds):
        ...         for layer in self.layers:
        ...             inputs_embeds = layer(inputs_embeds)
        ...         return types.SimpleNamespace(loss=inputs_embeds.square().sum())
        >>> data = [{"inputs_embeds": torch.randn(2, 5, 4)}]
        >>> list(fisher(Toy(), data, loss_reduction="sum"))
        ['layers.0', 'layers.1', 'layers.2']
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    frozen = block_linears(model) if variant == "base" else ()
    options = {"keep_gates": variant not in SQUARES, **options}
    record = collect(model, batches, progress=progress, frozen=frozen, **options)
    return read_variant(record, variant, aggregate)


def collect(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> FisherRecord:
    """Run ``batches`` through the model under a :class:`FisherCollector` and return its record.

    Args:
        model: As in :func:`fisher`.
        batches: As in :func:`fisher`.
        progress: As in :func:`fisher`.
        options: Passed to :class:`FisherCollector`.

    Raises:
        ValueError: There were no batches, or every one was non-finite.
    """
    training = model.training
    before = {p: p.grad for p in model.parameters()}
    model.eval()
    done = 0
    try:
        with FisherCollector(model, **options) as collector:
            for done, batch in enumerate(batches, 1):
                loss: Tensor = model(**batch).loss
                loss.backward()  # type: ignore[no-untyped-call]
                collector.step()
                for p in before:
                    p.grad = None
                if progress is not None:
                    progress(done)
    finally:
        model.train(training)
        for p, grad in before.items():
            p.grad = grad
    record = collector.record()
    if record.counts["samples"] == 0:
        raise ValueError(
            f"scoring needs at least one batch with a finite loss gradient, got {done} batches, "
            f"{record.counts['skipped']} of them not finite"
        )
    return record


def read_variant(record: FisherRecord, variant: str, aggregate: str = "layer") -> dict[str, float]:
    """Read one variant's scores off a record; several variants may share one run.

    Args:
        record: From :func:`collect`.
        variant: As in :func:`fisher`.
        aggregate: ``"layer"`` or ``"module"``.
    """
    if variant in SQUARES:
        parameters, how = SQUARES[variant]
        return record.read(aggregate=aggregate, how=how, parameters=parameters)
    names, gates = record.gate_gradients(aggregate=aggregate)
    score = gates.square().mean(0) if variant == "gate" else gates.mean(0).abs()
    return dict(zip(names, score.tolist(), strict=True))


def block_linears(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the frozen linears inside the model's numbered blocks, in order.

    A linear that has experts keeps the name it had without, under PEFT too.
    """
    adapted = [m for m in model.modules() if isinstance(m, FusedMoELoRA)]
    inner = {id(part) for m in adapted for part in (m.router, m.base_layer)}
    linears = (
        plain_name(name)
        for name, module in model.named_modules()
        if id(module) not in inner
        and (isinstance(module, nn.Linear | FusedMoELoRA) or type(module).__name__ == "Conv1D")
    )
    return tuple(dict.fromkeys(name for name in linears if in_block(name)))
