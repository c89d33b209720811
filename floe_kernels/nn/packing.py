"""Where one sample ends and the next begins, told from what a model is called with.

Dims: B rows of a batch, T tokens a row. A row of a *packed* batch holds several samples.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# transformers' name, flash-attn's, and that of Megatron and axolotl
_BOUNDS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")


def sample_starts(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens begin a sample, if the arguments say.

    The bounds of flash attention count first; then, as in transformers, ``position_ids`` that do
    not follow the one before, but only where there is no ``attention_mask`` and no cache: with
    either, a model of transformers does not keep samples apart. Nothing is read back from the
    device. Values are not checked.

    Args:
        arguments: A model's arguments by name: ``input_ids`` (B, T) or ``inputs_embeds``
            (B, T, I); ``cu_seq_lens_q``, ``cu_seqlens_q`` or ``cu_seqlens`` (S + 1,), rising from
            0 to B * T; or ``position_ids`` (B, T) or (1, T).

    Returns:
        ``(B, T)`` bool, True on the first token of every sample; None where they do not say.

    Example:
        >>> ids = torch.zeros(1, 6, dtype=torch.long)
        >>> positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
        >>> sample_starts({"input_ids": ids, "position_ids": positions}).int()
        tensor([[1, 0, 0, 1, 0, 1]], dtype=torch.int32)
    """
    shape = batch_shape(arguments)
    if shape is None:
        return None
    rows, length = shape
    bounds = next((arguments[name] for name in _BOUNDS if name in arguments), None)
    if isinstance(bounds, Tensor) and bounds.ndim == 1:
        starts = torch.zeros(rows * length + 1, dtype=torch.bool, device=bounds.device)
        return starts.index_fill(0, bounds.long(), True)[:-1].view(rows, length)
    positions = arguments.get("position_ids")
    told_apart = all(arguments.get(name) is None for name in ("attention_mask", "past_key_values"))
    if not told_apart or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    if positions.shape not in ((rows, length), (1, length)) or not length:
        return None
    positions = positions.expand(rows, length)
    steps = positions.diff(dim=1, prepend=positions[:, :1])  # 0 in the first column: a start
    return steps != 1


def packed_padding(starts: Tensor) -> Tensor:
    """Return which tokens of a packed batch are padding, where it is there to be trained on.

    Padding comes last in a row and its positions do not count on, so that every such token looks
    like a sample of one token. Of a real one nothing would be lost: no token follows that it could
    predict.

    Args:
        starts: ``(B, T)`` bool, from :func:`sample_starts`.

    Returns:
        ``(B, T)`` bool, True on padding, never on the first token of a row.

    Example:
        >>> packed_padding(torch.tensor([[True, False, True, False, True, True]])).int()
        tensor([[0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    going_on = (~starts).long()
    later = going_on.flip(1).cumsum(1).flip(1)  # this token or a later one goes on with a sample
    first = torch.arange(starts.shape[1], device=starts.device) == 0
    return (later == 0) & ~first


def batch_shape(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (B, T) of ``input_ids`` or ``inputs_embeds``, or None if there is neither."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return ids.shape[0], ids.shape[1]
    if isinstance(embeds, Tensor) and embeds.ndim == 3:
        return embeds.shape[0], embeds.shape[1]
    return None
