"""Which rows of a batch belong to which sample, and how the loss weighs them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LOSS_REDUCTIONS = ("sum", "mean_samples", "mean_tokens")
PER_SAMPLE = ("sum", "mean")
IGNORE = -100  # the label that transformers and torch leave out of the loss


class SampleBatch:
    """The samples of one forward pass.

    Attributes:
        num_samples: S.
        offsets: ``(S + 1,)`` int64 where the caller gave them, else None: then a layer's input must
            be ``(S, ..., I)``.
        scale: ``()`` or ``(S,)`` float32, what turns a sample's gradient of the back-propagated
            loss into that of its own log-likelihood.
        tokens: ``(S,)`` int64, loss tokens of each sample; None if unknown.
    """

    def __init__(
        self, num_samples: int, offsets: Tensor | None, scale: Tensor, tokens: Tensor | None
    ) -> None:
        self.num_samples, self.offsets, self.scale = num_samples, offsets, scale
        self.tokens = tokens

    def offsets_for(self, x: Tensor) -> Tensor:
        """Return the row bounds of the samples in ``x`` (..., I), flattened to (N, I).

        Raises:
            ValueError: ``x`` does not show where one sample ends.
        """
        if self.offsets is not None:
            return self.offsets
        if x.ndim < 2 or x.shape[0] != self.num_samples:
            raise ValueError(
                f"a layer's input must be ({self.num_samples} samples, ..., I), or the sample "
                f"offsets be given through FisherCollector.batch(), got {tuple(x.shape)}"
            )
        rows = 1
        for size in x.shape[1:-1]:
            rows = rows * size
        return torch.arange(self.num_samples + 1, device=x.device) * rows


def describe_batch(
    kwargs: Mapping[str, Any], args: tuple[Any, ...], loss_reduction: str, per_sample: str
) -> SampleBatch:
    """Read a batch off a model's forward arguments, as transformers' causal models take them.

    Args:
        kwargs: ``input_ids`` or ``inputs_embeds``, ``labels`` and, where the loss was divided by
            it, ``num_items_in_batch``.
        args: Positional arguments; the first may stand for ``input_ids``.
        loss_reduction: How the loss relates to the samples' summed log-likelihoods.
        per_sample: Whether a sample's log-likelihood is its tokens' sum or mean.

    Raises:
        ValueError: The arguments do not tell enough.
    """
    tensors = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    first = next((t for t in tensors if isinstance(t, Tensor)), None)
    if first is None:
        raise ValueError(
            "the model's arguments must show the batch as input_ids, inputs_embeds or a first "
            f"tensor, or FisherCollector.batch() describe it, got {sorted(kwargs)}"
        )
    labels = kwargs.get("labels")
    tokens = None
    if isinstance(labels, Tensor) and labels.ndim == 2:
        tokens = (labels[:, 1:] != IGNORE).sum(1)  # a causal model predicts the next token
    total = kwargs.get("num_items_in_batch")
    if loss_reduction == "mean_tokens" and total is None:
        if tokens is None:
            raise ValueError(
                "loss_reduction='mean_tokens' needs (B, T) labels among the model's arguments, "
                f"or FisherCollector.batch(num_tokens=...), got {sorted(kwargs)}"
            )
        total = tokens.sum()
    return make_batch(first.shape[0], None, tokens, total, loss_reduction, per_sample, first.device)


def make_batch(
    num_samples: int,
    offsets: Tensor | None,
    tokens: Tensor | None,
    total: Tensor | int | None,
    loss_reduction: str,
    per_sample: str,
    device: torch.device,
) -> SampleBatch:
    """Work out the scale from the definition; ``total`` is what a token mean was divided by."""
    scale = torch.ones((), device=device)
    if loss_reduction == "mean_samples":
        scale = scale * num_samples
    elif loss_reduction == "mean_tokens":
        scale = scale * (total if total is not None else 1)
    if per_sample == "mean":
        if tokens is None:
            raise ValueError("per_sample='mean' needs the number of loss tokens of each sample")
        scale = scale / tokens.to(device).clamp(min=1)
    return SampleBatch(num_samples, offsets, scale, tokens)
