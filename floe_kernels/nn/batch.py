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
        """Return the mask of the tokens of ``x``, or None if the mask is not theirs.

        Args:
            x: ``(B, T, I)``, or ``(B * T, I)`` from a model that flattens its tokens.

        Returns:
            ``token_mask`` in the leading shape of ``x``; None where the sizes differ, as for an
            encoder's mask in a decoder's layer.

        Example:
            >>> import torch
            >>> batch = BatchContext()
            >>> batch.token_mask = torch.tensor([[False, True], [True, True]])
            >>> batch.mask_for(torch.zeros(4, 8))
            tensor([False,  True,  True,  True])
            >>> batch.mask_for(torch.zeros(3, 8)) is None
            True
        """
        mask = self.token_mask
        if mask is None:
            return None
        if x.shape[:-1] == mask.shape:
            return mask
        if x.ndim == 2 and x.shape[0] == mask.numel():
            return mask.reshape(-1)
        return None
