"""``floe::moe_lora_shared_linear`` and its backward: several adapted linears that take one x.

==========  =================================  ===========================
device      kernel                             present when
==========  =================================  ===========================
any         reference/shared_inputs.py         always
CPU         one ``floe::moe_lora_linear``      always
            after the other
CUDA        triton/shared_inputs.py            Triton is installed
==========  =================================  ===========================

Two-dimensional, as ``ops/moe_lora.py``. Arguments in the plural have an entry a sibling; ``ranks``
are all siblings' ranks, one after the other; an empty bias, seed or pair of coefficients stands
for none.
"""

import itertools
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from floe_kernels.ops.define import define
from floe_kernels.ops.moe_lora import (
    DifferentiatedOnce,
    is_traced,
    moe_lora_backward,
    moe_lora_linear,
    saved_like,
)
from floe_kernels.reference import shared_inputs as reference
from floe_kernels.reference.moe_lora import Adapter
from floe_kernels.reference.shared_inputs import Sibling

SAVED = 4  # z, experts, gates and logits of each sibling follow the outputs


@define("floe::moe_lora_shared_linear")
def moe_lora_shared_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    router_weights: Sequence[Tensor],
    scalings: Sequence[Tensor],
    ranks: Sequence[int],
    top_ks: Sequence[int],
    shared_As: Sequence[bool],
    renormalizes: Sequence[bool],
    token_mask: Tensor | None,
    dropout_ps: Sequence[float],
    dropout_seeds: Sequence[Tensor],
    aux_coefs: Sequence[Tensor],
) -> list[Tensor]:
    """Return S outputs, then z, experts, gates and logits of each sibling."""
    siblings = siblings_of(
        weights, biases, lora_As, lora_Bs, router_weights, scalings, ranks, top_ks, shared_As,
        renormalizes, dropout_ps, dropout_seeds, aux_coefs,
    )  # fmt: skip
    routed = reference.shared_adapters(x, siblings, token_mask)
    outs = [
        torch.nn.functional.linear(x, s.weight, s.bias).addmm_(a.h, s.lora_B.to(x.dtype))
        for s, a in zip(siblings, routed, strict=True)
    ]
    # the siblings' z and logits are columns of one product: an operator's outputs may not be
    return outs + [t.clone(memory_format=torch.contiguous_format) for a in routed for t in a[1:]]


@define("floe::moe_lora_shared_backward")
def moe_lora_shared_backward(
    grad_outs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    router_weights: Sequence[Tensor],
    scalings: Sequence[Tensor],
    saved: Sequence[Tensor],
    ranks: Sequence[int],
    shared_As: Sequence[bool],
    renormalizes: Sequence[bool],
    token_mask: Tensor | None,
    dropout_ps: Sequence[float],
    dropout_seeds: Sequence[Tensor],
    aux_coefs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of x and of each sibling's lora_A, lora_B and router.

    ``needs`` has an entry for each; ``(0,)`` where not needed.
    """
    siblings = siblings_of(
        weights, [x.new_empty(0)] * len(weights), lora_As, lora_Bs, router_weights, scalings,
        ranks, [t.shape[1] for t in saved[1::SAVED]], shared_As, renormalizes, dropout_ps,
        dropout_seeds, aux_coefs,
    )  # fmt: skip
    return reference.moe_lora_shared_backward(
        grad_outs, x, siblings, adapters_of(saved), token_mask, needs
    )


def siblings_of(*columns: Any) -> list[Sibling]:
    """Turn an operator's lists, one an argument, into one record a sibling."""
    (weights, biases, lora_As, lora_Bs, routers, scalings, ranks, top_ks, shared_As, renormalizes,
     dropout_ps, dropout_seeds, aux_coefs) = columns  # fmt: skip
    starts = [0, *itertools.accumulate(map(len, routers))]
    own_ranks = [list(ranks[begin:end]) for begin, end in itertools.pairwise(starts)]
    given = [
        [t if t.numel() else None for t in tensors]
        for tensors in (biases, dropout_seeds, aux_coefs)
    ]
    return [
        Sibling(*row)
        for row in zip(
            weights, given[0], lora_As, lora_Bs, routers, scalings, own_ranks, top_ks, shared_As,
            renormalizes, dropout_ps, given[1], given[2], strict=True,
        )
    ]  # fmt: skip


def adapters_of(saved: Sequence[Tensor]) -> list[Adapter]:
    """Regroup what the forward saved, a record a sibling; h was not saved and is not read."""
    return [Adapter(z, z, *rest) for z, *rest in _by_four(saved)]


def _by_four(tensors: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    return (tensors[i : i + SAVED] for i in range(0, len(tensors), SAVED))


@torch.library.register_kernel("floe::moe_lora_shared_linear", "cpu")
def _(x: Tensor, *lists: Any) -> list[Tensor]:
    *before, token_mask, dropout_ps, dropout_seeds, aux_coefs = lists
    outs, saved = [], []
    for s in siblings_of(*before, dropout_ps, dropout_seeds, aux_coefs):
        out, *rest = moe_lora_linear(
            x, *s[:10], token_mask, *s[10:], None, None, None, None, None, None
        )
        outs.append(out)
        saved += rest
    return outs + saved


@torch.library.register_kernel("floe::moe_lora_shared_backward", "cpu")
def _(grad_outs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], *lists: Any) -> Any:
    lora_As, lora_Bs, routers, scalings, saved, ranks, shared_As, renormalizes, mask, *rest = lists
    *dropout, aux_coefs, needs = rest
    siblings = siblings_of(
        weights, [x.new_empty(0)] * len(weights), lora_As, lora_Bs, routers, scalings, ranks,
        [0] * len(weights), shared_As, renormalizes, *dropout, aux_coefs,
    )  # fmt: skip
    grad_x, grads = None, []
    for i, (s, kept) in enumerate(zip(siblings, _by_four(saved), strict=True)):
        own, *weights_own = moe_lora_backward(
            grad_outs[i], x, s.weight, s.lora_A, s.lora_B, s.router_weight, s.scaling, *kept,
            s.ranks, s.shared_A, s.renormalize, mask, s.dropout_p, s.dropout_seed, s.aux_coefs,
            [needs[0], *needs[1 + 3 * i : 4 + 3 * i]], None, None, None, None, None, None,
        )  # fmt: skip
        grad_x = own if grad_x is None else grad_x.add_(own)
        grads += weights_own
    return [grad_x, *grads]


@torch.library.register_fake("floe::moe_lora_shared_linear")
def _(x: Tensor, weights: Any, biases: Any, lora_As: Any, lora_Bs: Any, routers: Any, scalings: Any,
      ranks: Any, top_ks: Any, *_: Any) -> list[Tensor]:  # fmt: skip
    outs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    for lora_A, router, top_k in zip(lora_As, routers, top_ks, strict=True):
        outs += saved_like(x, lora_A, router, top_k)
    return outs


@torch.library.register_fake("floe::moe_lora_shared_backward")
def _(grad_outs: Any, x: Tensor, weights: Any, lora_As: Any, lora_Bs: Any, routers: Any,
      *rest: Any) -> list[Tensor]:  # fmt: skip
    parameters = [p for own in zip(lora_As, lora_Bs, routers, strict=True) for p in own]
    wanted = zip((x, *parameters), rest[-1], strict=True)
    return [p.new_empty(p.shape if need else (0,)) for p, need in wanted]


# loaded on the first call, not on import; Triton launches on the current device, whatever its
# arguments are on
if find_spec("triton"):

    @torch.library.register_kernel("floe::moe_lora_shared_linear", "cuda")
    def _(x: Tensor, *lists: Any) -> list[Tensor]:
        from floe_kernels.triton import shared_inputs as kernels

        *before, token_mask, dropout_ps, dropout_seeds, aux_coefs = lists
        siblings = siblings_of(*before, dropout_ps, dropout_seeds, aux_coefs)
        with torch.cuda.device(x.device):
            return kernels.moe_lora_shared_linear(x, siblings, token_mask)

    @torch.library.register_kernel("floe::moe_lora_shared_backward", "cuda")
    def _(
        grad_outs: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], *lists: Any
    ) -> list[Tensor]:
        from floe_kernels.triton import shared_inputs as kernels

        *before, saved, ranks, shared_As, renormalizes, token_mask, ps, seeds, coefs, needs = lists
        siblings = siblings_of(
            weights, [x.new_empty(0)] * len(weights), *before, ranks,
            [t.shape[1] for t in saved[1::SAVED]], shared_As, renormalizes, ps, seeds, coefs,
        )  # fmt: skip
        with torch.cuda.device(x.device):
            return kernels.moe_lora_shared_backward(
                grad_outs, x, siblings, adapters_of(saved), token_mask, needs
            )


def _setup(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    (x, weights, _biases, lora_As, lora_Bs, routers, scalings, *config, token_mask, dropout_ps,
     dropout_seeds, aux_coefs) = inputs  # fmt: skip
    ranks, _top_ks, shared_As, renormalizes = config
    count = len(weights)
    ctx.set_materialize_grads(False)  # z, gates and logits carry no gradient
    ctx.count = count
    ctx.save_for_backward(
        x, token_mask, *weights, *lora_As, *lora_Bs, *routers, *scalings, *dropout_seeds,
        *aux_coefs, *output[count:],
    )  # fmt: skip
    ctx.config = (ranks, shared_As, renormalizes, dropout_ps)


Wanted = tuple[bool, list[Sequence[bool]]]  # who wants a gradient: x; lora_As, lora_Bs, routers
Gradients = tuple[Tensor | None, list[list[Tensor | None]]]


def _gradients(ctx: Any, grads_out: Sequence[Tensor | None], wanted: Wanted) -> Gradients:
    """Run the one backward operator; None stands for each gradient nobody asked for."""
    count = ctx.count
    x, token_mask, *tensors = ctx.saved_tensors
    columns = [tensors[i * count : (i + 1) * count] for i in range(7)]
    weights, lora_As, lora_Bs, routers, scalings, seeds, coefs = columns
    saved = list(_by_four(tensors[7 * count :]))
    ranks, shared_As, renormalizes, dropout_ps = ctx.config
    starts = [0, *itertools.accumulate(map(len, routers))]
    by_parameter: list[list[Tensor | None]] = [[None] * count for _ in range(3)]
    # an output that nobody used has no gradient, and then neither have its linear's parameters
    used = [s for s in range(count) if grads_out[s] is not None]
    if not used:
        return None, by_parameter

    def pick(column: Sequence[Any]) -> list[Any]:
        return [column[s] for s in used]

    wants_x, wants = wanted
    needs = [wants_x, *(column[s] for s in used for column in wants)]
    with torch.no_grad():
        grads = moe_lora_shared_backward(
            pick(grads_out), x, pick(weights), pick(lora_As), pick(lora_Bs), pick(routers),
            pick(scalings), [t for own in pick(saved) for t in own],
            [r for s in used for r in ranks[starts[s] : starts[s + 1]]],
            pick(shared_As), pick(renormalizes), token_mask, pick(dropout_ps), pick(seeds),
            pick(coefs), needs,
        )  # fmt: skip
    if torch.is_grad_enabled():  # create_graph=True
        operands = (x, *pick(grads_out), *pick(lora_As), *pick(lora_Bs), *pick(routers))
        grads = DifferentiatedOnce.apply(len(grads), *grads, *operands)  # type: ignore[no-untyped-call]
    given = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    for place, s in enumerate(used):
        for i, column in enumerate(by_parameter):
            column[s] = given[1 + 3 * place + i]
    return given[0], by_parameter


def _backward(ctx: Any, grads_out: Any) -> tuple[Any, ...]:
    wants = ctx.needs_input_grad
    grad_x, parameters = _gradients(ctx, grads_out, (wants[0], list(wants[3:6])))
    none = [None] * ctx.count
    return (grad_x, none, none, *parameters, none, *(None,) * 6, none, none)


torch.library.register_autograd("floe::moe_lora_shared_linear", _backward, setup_context=_setup)


class _EagerFunction(torch.autograd.Function):
    """The operator and its gradient for eager calls; see ``ops/moe_lora.py``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...], *trained: Tensor) -> Any:
        count = len(trained) // 3
        columns = [list(trained[i * count : (i + 1) * count]) for i in range(3)]
        inputs = (x, *rest[:2], *columns, *rest[2:])
        with torch._C._AutoDispatchBelowAutograd():
            output = moe_lora_shared_linear(*inputs)
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[count:])
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
        count, wants = ctx.count, ctx.needs_input_grad
        columns = [wants[2 + i * count : 2 + (i + 1) * count] for i in range(3)]
        grad_x, parameters = _gradients(ctx, grads_out, (wants[0], columns))
        return (grad_x, None, *(grad for column in parameters for grad in column))


def call(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], routers: Sequence[Tensor], *rest: Any,
) -> Sequence[Tensor]:  # fmt: skip
    """Call ``floe::moe_lora_shared_linear``, the shorter way where nothing traces it."""
    if is_traced():
        outputs = moe_lora_shared_linear(x, weights, biases, lora_As, lora_Bs, routers, *rest)
    else:
        trained = (*lora_As, *lora_Bs, *routers)
        outputs = _EagerFunction.apply(x, (weights, biases, *rest), *trained)  # type: ignore[no-untyped-call]
    return outputs  # type: ignore[no-any-return]
