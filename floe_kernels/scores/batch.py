"""Which rows of a batch belong to which sample, and how the loss weighs them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from floe_kernels.nn.packing import batch_shape, packed_padding, sample_starts

LOSS_REDUCTIONS = ("sum", "mean_samples", "mean_tokens")
PER_SAMPLE = ("sum", "mean")
IGNORE = -100  # the label that transformers and torch leave out of the loss


class SampleBatch:
    """The samples of one forward pass.

    Attributes:
        num_samples: S.
        offsets: ``(S + 1,)`` int64 where sequences are packed, else None: then a layer's input must
            be ``(S, ..., I)``.
        scale: ``()`` or ``(S,)`` float32, what turns a sample's gradient of the back-propagated
            loss into that of its own log-likelihood.
        tokens: ``(S,)`` int64, loss tokens of each sample; None if unknown.
        rows: Tokens of the batch, padding among them, where ``offsets`` were read off it.
    """

    def __init__(
        self,
        num_samples: int,
        offsets: Tensor | None,
        scale: Tensor,
        tokens: Tensor | None,
        rows: int | None = None,
    ) -> None:
        self.num_samples, self.offsets, self.scale = num_samples, offsets, scale
        self.tokens, self.rows = tokens, rows

    def offsets_for(self, x: Tensor) -> Tensor:
        """Return the row bounds of the samples in ``x`` (..., I), flattened to (N, I).

        Raises:
            ValueError: ``x`` does not show where one sample ends.
        """
        if self.offsets is not None:
            if self.rows is not None and self.rows != math.prod(x.shape[:-1]):
                raise ValueError(
                    f"a layer's input must have the batch's {self.rows} tokens to tell its packed "
                    f"samples apart, got {tuple(x.shape)}"
                )
            return self.offsets
        if x.ndim < 2 or x.shape[0] != self.num_samples:
            raise ValueError(
                f"a layer's input must be ({self.num_samples} samples, ..., I), or the sample "
                f"offsets be given through FisherCollector.batch(), got {tuple(x.shape)}"
            )
        rows = math.prod(x.shape[1:-1])
        return torch.arange(self.num_samples + 1, device=x.device) * rows


def describe_batch(
    arguments: Mapping[str, Any], loss_reduction: str, per_sample: str
) -> SampleBatch:
    """Read a batch off a model's arguments, as transformers' causal models take them.

    A packed batch's samples are found by :func:`~floe_kernels.nn.packing.sample_starts`; padding at
    its end belongs to the sample before and adds nothing. Their number is read back from the
    device, once a batch.

    Args:
        arguments: By name: ``input_ids`` or ``inputs_embeds``, or another tensor first; ``labels``;
            ``num_items_in_batch``, where the loss was divided by it; and what tells packed samples
            apart.
        loss_reduction: How the loss relates to the samples' summed log-likelihoods.
        per_sample: Whether a sample's log-likelihood is its tokens' sum or mean.

    Raises:
        ValueError: The arguments do not tell enough.
    """
    named = [arguments.get("input_ids"), arguments.get("inputs_embeds"), *arguments.values()]
    first = next((t for t in named if isinstance(t, Tensor) and t.ndim), None)
    if first is None:
        raise ValueError(
            "the model's arguments must show the batch as input_ids, inputs_embeds or a first "
            f"tensor, or FisherCollector.batch() describe it, got {sorted(arguments)}"
        )
    labels, predicted = arguments.get("labels"), None
    if isinstance(labels, Tensor) and labels.ndim == 2:
        # a causal model predicts the next token, so the label of a row's first token is not used
        predicted = (labels != IGNORE).roll(-1, 1)
        predicted[:, -1:] = False
    total = arguments.get("num_items_in_batch")
    if loss_reduction == "mean_tokens" and total is None:
        if predicted is None:
            raise ValueError(
                "loss_reduction='mean_tokens' needs (B, T) labels among the model's arguments, "
                f"or FisherCollector.batch(num_tokens=...), got {sorted(arguments)}"
            )
        total = predicted.sum()
    offsets = _offsets(arguments, trained=predicted is not None)
    if offsets is None:
        tokens = None if predicted is None else predicted.sum(1)
        num_samples = first.shape[0]
    else:
        tokens = None if predicted is None else _sums_between(predicted.flatten(), offsets)
        num_samples = len(offsets) - 1
    batch = make_batch(
        num_samples, offsets, tokens, total, loss_reduction, per_sample, first.device
    )
    if offsets is not None:
        batch.rows = math.prod(batch_shape(arguments) or ())
    return batch


def _offsets(arguments: Mapping[str, Any], *, trained: bool) -> Tensor | None:
    """Return the row bounds of packed samples, ``(S + 1,)``; None where a row is a sample."""
    starts = sample_starts(arguments)
    if starts is None:
        return None
    if trained:
        starts = starts & ~packed_padding(starts)
    begins = starts.flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([starts.numel()])])


def _sums_between(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums of ``values[offsets[i]:offsets[i + 1]]``, int64."""
    sums = values.new_zeros(len(values) + 1, dtype=torch.int64)
    sums[1:] = values.long().cumsum(0)
    return sums[offsets[1:]] - sums[offsets[:-1]]


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
