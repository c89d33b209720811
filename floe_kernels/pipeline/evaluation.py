"""Held-out loss, every token weighing the same."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from floe_kernels.pipeline.distributed import add_up, share
from floe_kernels.pipeline.encoding import IGNORE, Samples
from floe_kernels.pipeline.progress import SILENT, Progress


class Evaluation(NamedTuple):
    """The loss of a model on some samples."""

    loss: float  #: mean negative log-likelihood of a token, in nats
    tokens: int  #: tokens that counted

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is too large."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Any, samples: Samples, *, batch_size: int = 8, pad: int = 0, progress: Progress = SILENT
) -> Evaluation:
    r"""Return the mean negative log-likelihood of the tokens of ``samples``.

    .. math:: -\frac{1}{\sum_i T_i} \sum_i \sum_{t \le T_i} \log p(y_{it} \mid y_{i, <t})

    Every token weighs the same, however samples fall into batches. Log-likelihoods are summed in
    float32 within a batch and in float64 over batches. No gradients; the model runs in evaluation
    mode and is left as it was.

    Args:
        model: A causal model of transformers.
        samples: What to evaluate on; at least one token must count.
        batch_size: Samples of a forward pass.
        pad: Token id that fills up batches.
        progress: Watches.

    Returns:
        Loss and number of tokens.

    Raises:
        ValueError: No token counts.
    """
    tokens = samples.loss_tokens()
    if tokens == 0:
        raise ValueError("an evaluation needs at least one token that counts, got none")
    device, training = next(model.parameters()).device, model.training
    # equal lengths side by side: less padding, and the sum does not mind
    order = torch.argsort(samples.starts[1:] - samples.starts[:-1], stable=True).tolist()
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with torch.inference_mode(), progress.bar("evaluating", len(order), unit="samples") as bar:
            for i in range(0, len(order), batch_size):
                chosen = order[i : i + batch_size]
                mine = share(chosen)
                if mine:
                    batch = samples.batch(mine, pad)
                    total += negative_log_likelihood(model, to_device(batch, device))
                bar.advance(len(chosen))
            add_up(total)
    finally:
        model.train(training)
    return Evaluation(total.item() / tokens, tokens)


def negative_log_likelihood(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the summed negative log-likelihood of a batch's labels, float32, differentiable.

    The head runs only where some sample of the batch has a label, if the model can do that, and
    the softmax only on tokens that count.

    Args:
        model: A causal model of transformers.
        batch: As ``Samples.batch`` makes it, on the model's device.

    Returns:
        A scalar.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]  # (B, L - 1): what each position but the last predicts
    columns = (targets != IGNORE).any(0).nonzero().squeeze(1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    targets = targets[:, columns]
    counts = targets != IGNORE
    return F.cross_entropy(logits[counts].float(), targets[counts], reduction="sum")


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}
