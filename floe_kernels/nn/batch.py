"""What every adapted layer of a model must know about the batch in flight."""

from torch import Tensor


class BatchContext:
    """Facts about the current batch, shared by all adapted layers of one model.

    A hook on the model writes them before the forward pass, so that a padding mask reaches a
    linear layer buried in a block whose code never heard of it.

    Attributes:
        token_mask: ``(B, T)`` bool, False on padding; None means every token counts.
    """

    def __init__(self) -> None:
        self.token_mask: Tensor | None = None

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Return the mask of the tokens of ``x`` (..., I), or None if the mask is not theirs."""
        mask = self.token_mask
        if mask is None or x.shape[:-1] != mask.shape:
            return None
        return mask
