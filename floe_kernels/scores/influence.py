"""Influence of training samples on the validation loss, block by block: LayerIF."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.scores.names import in_block, layer_of
from floe_kernels.scores.samples import one_by_one

DAMPING = 0.1  # of the mean squared gradient entry, as arXiv 2310.00902 sets it
PARTS = ("positive", "all")


def influence(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    held_out: Iterable[Mapping[str, Any]],
    *,
    part: str = "positive",
    damping: float = DAMPING,
    parameters: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    r"""Score every block by how far its training gradients lower the validation loss.

    .. math:: S_\ell = \sum_k \max(0, b_{\ell k}), \qquad
              b_{\ell k} = v_\ell^\top H_\ell^{-1} g_{\ell k}

    LayerIF's score (arXiv 2505.23811, section 3.2): :math:`g_{\ell k}` is the gradient of sample
    k's loss in the parameters of block :math:`\ell`, :math:`v_\ell` the mean gradient of the
    validation samples, and :math:`b` the influence with its sign turned, so that a positive one
    belongs to a sample that helps. The inverse Hessian is DataInf's (arXiv 2310.00902, eq. 5), see
    :func:`datainf`. A high score marks a block that has much to learn from the data.

    The gradients are those of the parameters that train: put adapters on every linear first. With
    a fresh lora_B, which is zero, they are the frozen matrices' gradients through a random
    projection, lora_A, which keeps inner products up to noise; this is what makes the score
    affordable, and DataInf's error grows with the number of parameters of a block. The model runs
    in evaluation mode, one sample at a time, and is left as it was. Inner products are float64;
    the gradients are kept in float32 (float64 parameters: float64) until all samples are done,
    samples times trainable parameters numbers in all. A block without a gradient scores 0.

    Args:
        model: A model with trainable parameters in numbered blocks, whose output has ``.loss``.
        batches: Keyword arguments of the model, with ``labels``: the training samples.
        held_out: Likewise: the validation samples.
        part: ``"positive"``, or ``"all"`` for the plain sum of :math:`b`, which may be negative.
        damping: As in :func:`datainf`.
        parameters: Last parts of the names of the parameters that count, such as ``("lora_B",)``,
            which halves the memory while lora_B is zero; None means all that train.
        progress: Called with the number of samples done, after each; validation samples first.

    Returns:
        Layer name to score, in model order.

    Raises:
        ValueError: Nothing trains, there is no sample, a gradient is not finite, or an unknown
            choice.

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
        ...         return types.SimpleNamespace(loss=inputs_embeds.square().mean())
        >>> train, validation = ({"inputs_embeds": torch.randn(2, 5, 4)} for _ in range(2))
        >>> list(influence(Toy(), [train], [validation]))
        ['layers.0', 'layers.1', 'layers.2']
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    blocks = _blocks(model, parameters)
    done = 0

    def gradients(samples: Iterable[Mapping[str, Any]], what: str) -> Iterator[dict[str, Tensor]]:
        nonlocal done
        for i, sample in enumerate(one_by_one(samples)):
            yield _gradient(model, sample, blocks, f"{what} sample {i}")
            done += 1
            if progress is not None:
                progress(done)

    training = model.training
    model.eval()
    try:
        validation = _mean(gradients(held_out, "validation"))
        train = list(gradients(batches, "training"))
    finally:
        model.train(training)
    if not validation or not train:
        what = "training" if validation else "validation"
        raise ValueError(f"influence needs at least one {what} sample, got none")
    scores = {}
    for name in blocks:
        rows = torch.stack([row.pop(name) for row in train])  # (n, d), freed block by block
        helps = datainf(rows, validation[name], damping=damping)
        scores[name] = (helps.clamp(min=0) if part == "positive" else helps).sum().item()
    return scores


def datainf(gradients: Tensor, direction: Tensor, *, damping: float = DAMPING) -> Tensor:
    r"""Multiply every gradient with a direction through DataInf's inverse Hessian.

    .. math:: b_k = \frac{1}{n} \sum_i v^\top (g_i g_i^\top + \lambda I)^{-1} g_k
                  = \frac{1}{\lambda} \Big(v - \frac1n \sum_i
                    \frac{v^\top g_i}{\lambda + \|g_i\|^2} g_i\Big)^{\!\top} g_k,
              \qquad \lambda = \frac{c}{n d} \sum_i \|g_i\|^2

    Eq. 5 of arXiv 2310.00902: the mean of the inverses in place of the inverse of the mean, each
    in closed form (Sherman and Morrison). Costs O(nd); no d x d matrix. Computed in float64. If
    all gradients are zero, so is the result.

    Args:
        gradients: ``(n, d)``, the samples' gradients, finite.
        direction: ``(d,)``, v.
        damping: c, above 0.

    Returns:
        ``(n,)`` float64.

    Raises:
        ValueError: The shapes do not fit, or ``damping`` is not above 0.

    Example:
        >>> import torch
        >>> g = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> datainf(g, torch.tensor([1.0, 1.0]))  # lambda = 0.1 * 5 / 4
        tensor([4.4444, 8.2424], dtype=torch.float64)
    """
    if gradients.ndim != 2 or direction.shape != gradients.shape[1:]:
        got = f"{tuple(gradients.shape)} and {tuple(direction.shape)}"
        raise ValueError(f"gradients must be (n, d) and the direction (d,), got {got}")
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}")
    g, v = gradients.double(), direction.double()
    norms = g.square().sum(1)
    total = norms.sum()
    if total == 0:
        return torch.zeros_like(norms)
    damp = damping * total / g.numel()
    pulled = g.T @ ((g @ v) / (damp + norms)) / len(g)
    return g @ (v - pulled) / damp


def _blocks(model: nn.Module, parameters: Sequence[str] | None) -> dict[str, list[nn.Parameter]]:
    """Return what trains in every numbered block, in model order."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        counts = parameters is None or name.rpartition(".")[2] in parameters
        if parameter.requires_grad and counts and in_block(name):
            blocks.setdefault(layer_of(name), []).append(parameter)
    if not blocks:
        raise ValueError(
            "the model must have trainable parameters inside numbered blocks, got none: "
            "apply a plan with experts on every layer first"
        )
    return blocks


def _gradient(
    model: nn.Module, sample: Mapping[str, Any], blocks: dict[str, list[nn.Parameter]], what: str
) -> dict[str, Tensor]:
    """Return one sample's gradient, flattened block by block; no parameter's ``grad`` is used."""
    flat = [parameter for members in blocks.values() for parameter in members]
    loss: Tensor = model(**sample).loss
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    rows = {}
    for name, members in blocks.items():
        parts = [torch.zeros_like(p) if (g := next(found)) is None else g for p in members]
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        rows[name] = torch.cat([part.flatten().to(wide) for part in parts])
    if not all(row.isfinite().all() for row in rows.values()):
        raise ValueError(f"every sample must have a finite gradient, {what} has not")
    return rows


def _mean(rows: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of every block's gradients in float64; empty if there are none."""
    total: dict[str, Tensor] = {}
    count = 0
    for count, row in enumerate(rows, 1):  # noqa: B007
        for name, part in row.items():
            total[name] = total[name] + part if name in total else part.double()
    return {name: part / count for name, part in total.items()}
