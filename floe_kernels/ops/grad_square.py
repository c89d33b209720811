"""``floe::segment_grad_square`` and ``floe::linear_grad_square``: scores, without a gradient.

==========  =================================  ===========================
device      kernel                             present when
==========  =================================  ===========================
any         reference/grad_square.py           always
CPU         csrc/cpu/grad_square.cpp           the extension was built
CUDA        triton/grad_square.py              Triton is installed
==========  =================================  ===========================
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from floe_kernels import reference
from floe_kernels.ops.define import define


@define("floe::segment_grad_square")
def segment_grad_square(
    g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Serve every device for which no kernel is registered."""
    return reference.segment_grad_square(g, x, offsets, scale, reduce)


@torch.library.register_fake("floe::segment_grad_square")
def _(
    g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = g.shape[1], x.shape[1]
    dtype = torch.promote_types(g.dtype, x.dtype)
    score = torch.float64 if dtype == torch.float64 else torch.float32
    shape = {"element": (rows, cols), "rank": (rows,), "matrix": ()}[reduce]
    return (
        g.new_empty(rows, cols, dtype=dtype),
        g.new_empty(shape, dtype=score),
        g.new_empty(offsets.shape[0] - 1, dtype=score),
    )


@define("floe::linear_grad_square")
def linear_grad_square(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    """Serve every device for which no kernel is registered."""
    return reference.linear_grad_square(g, x, offsets, scale)


@torch.library.register_fake("floe::linear_grad_square")
def _(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(g.dtype, x.dtype), torch.float32)
    return g.new_empty(offsets.shape[0] - 1, dtype=dtype)


#: Multiplications that the C++ kernel does in the time of one of a Gram matrix of float32, measured
#: on AMD EPYC (AVX512-BF16): 540 and 400 GFLOP/s against 180.
CPU_DIRECT = {torch.bfloat16: 2.5, torch.float32: 2.0}


def _is_short(g: Tensor, x: Tensor, offsets: Tensor) -> bool:
    """Tell whether the samples' Gram matrices take less time than their gradients in C++."""
    rows, cols = g.shape[1], x.shape[1]
    lengths = offsets.diff().double()
    grams = float(lengths.square().sum()) * (rows + cols)
    dtype = torch.promote_types(g.dtype, x.dtype)
    return grams * CPU_DIRECT.get(dtype, 1.0) < float(lengths.sum()) * rows * cols


if find_spec("floe_kernels._C"):

    @torch.library.register_kernel("floe::linear_grad_square", "cpu")
    def _(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
        if _is_short(g, x, offsets):
            return reference.linear_grad_square(g, x, offsets, scale)
        return segment_grad_square(g, x, offsets, scale, "matrix")[2]  # type: ignore[no-any-return]


# loaded on the first call, not on import; Triton launches on the current device, whatever its
# arguments are on
if find_spec("triton"):

    @torch.library.register_kernel("floe::segment_grad_square", "cuda")
    def _(
        g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None, reduce: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        from floe_kernels.triton import grad_square as kernels

        with torch.cuda.device(x.device):
            return kernels.segment_grad_square(g, x, offsets, scale, reduce)

    @torch.library.register_kernel("floe::linear_grad_square", "cuda")
    def _(g: Tensor, x: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
        from floe_kernels.triton import grad_square as kernels

        with torch.cuda.device(x.device):
            return kernels.linear_grad_square(g, x, offsets, scale)
