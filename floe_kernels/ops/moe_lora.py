"""``floe::moe_lora_linear`` and ``floe::moe_lora``, and their one ``floe::moe_lora_backward``.

==========  =================================  ===========================
device      kernel                             present when
==========  =================================  ===========================
any         reference/moe_lora.py              always
CPU         csrc/cpu/moe_lora.cpp              the extension was built
CUDA        triton/moe_lora_forward.py,        Triton is installed
            triton/moe_lora_backward.py
==========  =================================  ===========================

Everything is two-dimensional here: N tokens, I inputs, O outputs, E experts, K kept, R packed
columns, C columns of z. ``functional/moe_lora.py`` flattened and checked.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from floe_kernels import reference
from floe_kernels.ops.define import define
from floe_kernels.reference.moe_lora import Adapter, FisherBuffers, adapter, wide_dtype

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out, z, experts, gates, logits


@define("floe::moe_lora_linear")
def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    aux_coefs: Tensor | None,
    fisher_offsets: Tensor | None,
    fisher_scale: Tensor | None,
    fisher_A: Tensor | None,
    fisher_B: Tensor | None,
    fisher_router: Tensor | None,
    fisher_gate: Tensor | None,
) -> Forward:
    """Own both GEMMs: the frozen linear, and the experts added to its output in place."""
    h, *rest = adapter(
        x, lora_A, router_weight, scaling, ranks, top_k, shared_A, renormalize,
        token_mask, dropout_p, dropout_seed,
    )  # fmt: skip
    out = F.linear(x, weight, bias).addmm_(h, lora_B.to(h.dtype))
    return out, *rest  # type: ignore[return-value]


@define("floe::moe_lora")
def moe_lora(
    x: Tensor,
    base_out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    ranks: Sequence[int],
    top_k: int,
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    aux_coefs: Tensor | None,
    fisher_offsets: Tensor | None,
    fisher_scale: Tensor | None,
    fisher_A: Tensor | None,
    fisher_B: Tensor | None,
    fisher_router: Tensor | None,
    fisher_gate: Tensor | None,
) -> Forward:
    """Serve a base of any kind: an operator may not write to its input, so this pays a new y."""
    h, *rest = adapter(
        x, lora_A, router_weight, scaling, ranks, top_k, shared_A, renormalize,
        token_mask, dropout_p, dropout_seed,
    )  # fmt: skip
    out = base_out + (h @ lora_B.to(h.dtype)).to(base_out.dtype)
    return out, *rest  # type: ignore[return-value]


@define(
    "floe::moe_lora_backward",
    mutates=("fisher_A", "fisher_B", "fisher_router", "fisher_gate"),
)
def moe_lora_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    scaling: Tensor,
    z: Tensor,
    experts: Tensor,
    gates: Tensor,
    logits: Tensor,
    ranks: Sequence[int],
    shared_A: bool,
    renormalize: bool,
    token_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    aux_coefs: Tensor | None,
    needs: Sequence[bool],
    fisher_offsets: Tensor | None,
    fisher_scale: Tensor | None,
    fisher_A: Tensor | None,
    fisher_B: Tensor | None,
    fisher_router: Tensor | None,
    fisher_gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, lora_A, lora_B and router, ``(0,)`` where not needed.

    ``weight`` None leaves the base's share out of the gradient of x.
    """
    fisher = None
    if fisher_offsets is not None:
        fisher = FisherBuffers(
            fisher_offsets, fisher_scale, fisher_A, fisher_B, fisher_router, fisher_gate
        )
    saved = Adapter(z, z, experts, gates, logits)
    return reference.moe_lora_backward(
        grad_out, x, weight, lora_A, lora_B, router_weight, scaling, saved, ranks, shared_A,
        renormalize, token_mask, dropout_p, dropout_seed, aux_coefs, needs, fisher,
    )  # fmt: skip


def saved_like(
    x: Tensor, lora_A: Tensor, router_weight: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z, experts, gates and logits, unwritten."""
    n, wide = x.shape[0], wide_dtype(x)
    return (
        x.new_empty(n, lora_A.shape[0]),
        x.new_empty(n, top_k, dtype=torch.int64),
        x.new_empty(n, top_k, dtype=wide),
        x.new_empty(n, router_weight.shape[0], dtype=wide),
    )


@torch.library.register_fake("floe::moe_lora_linear")
def _(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, lora_B: Tensor, router_weight: Tensor,
      scaling: Tensor, ranks: Any, top_k: int, *_: Any) -> Forward:  # fmt: skip
    out = x.new_empty(x.shape[0], weight.shape[0])
    return out, *saved_like(x, lora_A, router_weight, top_k)


@torch.library.register_fake("floe::moe_lora")
def _(x: Tensor, base_out: Tensor, lora_A: Tensor, lora_B: Tensor, router_weight: Tensor,
      scaling: Tensor, ranks: Any, top_k: int, *_: Any) -> Forward:  # fmt: skip
    out = base_out.new_empty(base_out.shape)
    return out, *saved_like(x, lora_A, router_weight, top_k)


@torch.library.register_fake("floe::moe_lora_backward")
def _(grad_out: Tensor, x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor,
      router_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needs = rest[12]
    wanted = zip((x, lora_A, lora_B, router_weight), needs, strict=True)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in wanted)  # type: ignore[return-value]


# loaded on the first call, not on import; Triton launches on the current device, whatever its
# arguments are on
if find_spec("triton"):

    @torch.library.register_kernel("floe::moe_lora_linear", "cuda")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Forward:
        from floe_kernels.triton import moe_lora_forward as kernels

        with torch.cuda.device(x.device):
            return kernels.moe_lora_linear(x, weight, bias, *rest[:11])

    @torch.library.register_kernel("floe::moe_lora", "cuda")
    def _(x: Tensor, base_out: Tensor, *rest: Any) -> Forward:
        from floe_kernels.triton import moe_lora_forward as kernels

        with torch.cuda.device(x.device):
            return kernels.moe_lora(x, base_out, *rest[:11])

    @torch.library.register_kernel("floe::moe_lora_backward", "cuda")
    def _(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from floe_kernels.triton import moe_lora_backward as kernels

        fisher = None if rest[17] is None else FisherBuffers(*rest[17:])
        shared = (*rest[:17], fisher)
        with torch.cuda.device(x.device):
            return kernels.moe_lora_backward(grad_out, x, *shared)


_LINEAR, _FOREIGN = (0, 3, 4, 5), (0, 2, 3, 4)
"""Where x, lora_A, lora_B and router_weight are among the arguments."""


def _backward(ctx: Any, grad_out: Tensor, positions: tuple[int, ...]) -> Sequence[Tensor | None]:
    """Run the one backward operator; None stands for each gradient nobody asked for."""
    (x, weight, lora_A, lora_B, router_weight, scaling, z, experts, gates, logits,
     token_mask, dropout_seed, aux_coefs) = ctx.saved_tensors  # fmt: skip
    ranks, shared_A, renormalize, dropout_p, fisher = ctx.config
    if fisher[0] is not None:
        # a second backward through the same graph would count its samples twice
        if getattr(ctx, "counted", False):
            raise RuntimeError(
                "each forward pass may be differentiated once while a FisherCollector is active, "
                "got a second backward through the same graph"
            )
        ctx.counted = True
    wants = ctx.needs_input_grad
    needs = [wants[i] for i in positions]
    arguments = (
        grad_out, x, weight, lora_A, lora_B, router_weight, scaling, z, experts, gates, logits,
        ranks, shared_A, renormalize, token_mask, dropout_p, dropout_seed, aux_coefs, needs,
        *fisher,
    )  # fmt: skip
    if torch.is_grad_enabled():  # somebody asked for create_graph
        with torch.no_grad():
            grads = moe_lora_backward(*arguments)
        operands = (grad_out, x, lora_A, lora_B, router_weight)
        grads = DifferentiatedOnce.apply(4, *grads, *operands)  # type: ignore[no-untyped-call]
    else:
        grads = moe_lora_backward(*arguments)
    if all(needs):
        return grads  # type: ignore[no-any-return]
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class DifferentiatedOnce(torch.autograd.Function):
    """Passes gradients through; a gradient of theirs raises instead of leaving this layer out."""

    @staticmethod
    def forward(_ctx: Any, count: int, *grads_and_operands: Tensor) -> tuple[Tensor, ...]:
        """Return copies of the first ``count``, the gradients."""
        return tuple(grad.clone() for grad in grads_and_operands[:count])

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> None:
        """Refuse."""
        raise RuntimeError(
            "floe::moe_lora_backward has no autograd formula: for second derivatives use "
            "floe_kernels.reference.moe_lora"
        )


def _setup(ctx: Any, x: Tensor, weight: Tensor | None, shared: Any, outputs: Forward) -> None:
    (lora_A, lora_B, router_weight, scaling, ranks, _top_k, shared_A, renormalize,
     token_mask, dropout_p, dropout_seed, aux_coefs, *fisher) = shared  # fmt: skip
    _out, z, experts, gates, logits = outputs
    ctx.set_materialize_grads(False)  # z, gates and logits carry no gradient
    ctx.save_for_backward(
        x, weight, lora_A, lora_B, router_weight,
        scaling, z, experts, gates, logits, token_mask, dropout_seed, aux_coefs,
    )  # fmt: skip
    # fisher is no saved tensor: the backward adds to these buffers, and a layer that runs twice in
    # one forward would then find its saved copy changed
    ctx.config = (ranks, shared_A, renormalize, dropout_p, fisher)


def _setup_linear(ctx: Any, inputs: Any, output: Forward) -> None:
    x, weight, _bias, *shared = inputs
    _setup(ctx, x, weight, shared, output)


def _backward_linear(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 21
    dx, dA, dB, drouter = _backward(ctx, grad_out, _LINEAR)
    return dx, None, None, dA, dB, drouter, *(None,) * 15


def _setup_foreign(ctx: Any, inputs: Any, output: Forward) -> None:
    x, _base_out, *shared = inputs
    _setup(ctx, x, None, shared, output)


def _backward_foreign(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 20
    dx, dA, dB, drouter = _backward(ctx, grad_out, _FOREIGN)
    return dx, grad_out, dA, dB, drouter, *(None,) * 15


torch.library.register_autograd(
    "floe::moe_lora_linear", _backward_linear, setup_context=_setup_linear
)
torch.library.register_autograd("floe::moe_lora", _backward_foreign, setup_context=_setup_foreign)


class _EagerFunction(torch.autograd.Function):
    """Either operator and its gradient, for eager calls.

    What ``register_autograd`` makes of the same functions serves tracing and transforms; it reads
    the schema anew on every call, which takes longer than the operator does for one token.
    ``apply`` looks at each of its arguments and outputs, so arguments without a gradient come in
    one tuple, and outputs without one go into a list.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Any, bias: Any, lora_A: Tensor, lora_B: Tensor,
        router_weight: Tensor, rest: tuple[Any, ...], routing: list[Tensor],
    ) -> Tensor:  # fmt: skip
        shared = (lora_A, lora_B, router_weight, *rest)
        output = _run(x, base, bias, shared)
        _setup(ctx, x, None if bias is _NO_LINEAR else base, shared, output)
        routing.extend(output[1:])
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 8
        dx, dA, dB, drouter = _backward(ctx, grad_out, _LINEAR)
        base = grad_out if ctx.needs_input_grad[1] else None
        return dx, base, None, dA, dB, drouter, None, None


# Function.apply would add a walk over the arguments for functorch, which is_traced has excluded
_apply = super(torch.autograd.Function, _EagerFunction).apply

_NO_LINEAR = object()
"""In place of a bias: the base is an output, not a weight."""


def _run(x: Tensor, base: Tensor, bias: Any, shared: tuple[Any, ...]) -> Forward:
    """Call either operator, past what autograd has registered for it."""
    with torch._C._AutoDispatchBelowAutograd():
        if bias is _NO_LINEAR:
            return moe_lora(x, base, *shared)  # type: ignore[no-any-return]
        return moe_lora_linear(x, base, bias, *shared)  # type: ignore[no-any-return]


def _eager(x: Tensor, base: Tensor, bias: Any, shared: tuple[Any, ...]) -> Forward:
    if not torch.is_grad_enabled():
        return _run(x, base, bias, shared)
    routing: list[Tensor] = []
    out = _apply(x, base, bias, *shared[:3], shared[3:], routing)  # type: ignore[no-untyped-call]
    return out, *routing


def call_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *shared: Any) -> Forward:
    """Call ``floe::moe_lora_linear``, the shorter way where nothing traces or transforms it."""
    if is_traced():
        return moe_lora_linear(x, weight, bias, *shared)  # type: ignore[no-any-return]
    return _eager(x, weight, bias, shared)


def call(x: Tensor, base_out: Tensor, *shared: Any) -> Forward:
    """Call ``floe::moe_lora``, the shorter way where nothing traces or transforms it."""
    if is_traced():
        return moe_lora(x, base_out, *shared)  # type: ignore[no-any-return]
    return _eager(x, base_out, _NO_LINEAR, shared)


def is_traced() -> bool:
    """Say whether somebody records the operators instead of running them."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
