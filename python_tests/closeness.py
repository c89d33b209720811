"""How close is close enough: as close as PyTorch gets at the same precision."""

import torch
from torch import Tensor


def assert_no_worse(
    got: Tensor, peer: Tensor, truth: Tensor, factor: float = 2.0, terms: int = 1
) -> None:
    """Fail unless ``got`` is about as near to ``truth`` as ``peer`` is.

    Args:
        got: What the kernel computed.
        peer: What plain PyTorch computes from the same inputs in the same dtype.
        truth: What plain PyTorch computes from the same inputs in float64.
        factor: How many times the peer's error is allowed, on top of one rounding of the output.
        terms: Length of the longest sum. Counts only where ``got`` has as many digits as ``truth``
            and the peer's error therefore shows as zero: two orders of such a sum may differ by
            that many roundings.
    """
    assert got.dtype == peer.dtype, f"dtype {got.dtype}, expected {peer.dtype}"
    assert got.shape == peer.shape, f"shape {tuple(got.shape)}, expected {tuple(peer.shape)}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), "not finite, or not written"
    rounding = torch.finfo(got.dtype).eps * truth.abs().max()
    if got.dtype == truth.dtype:
        rounding = rounding * terms
    error, allowed = (got - truth).abs().max(), (peer - truth).abs().max() * factor + rounding
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
