"""Several adapted linears of one x on a GPU: which kernels run, in which order, on what.

Linears that one kernel cannot hold (too many, too wide, routed differently, a shared A, dropout,
float32) run one after the other, as they would alone. So do all on GPUs before Hopper and on AMD's,
whose products take their operands from registers, where three sums leave no room for them: sm_80
spills 24 to 108 bytes, gfx942 up to 29 registers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from floe_kernels.reference.moe_lora import Adapter
from floe_kernels.reference.shared_inputs import Sibling
from floe_kernels.triton.launch import (
    SPLIT_BELOW,
    adapter_weights,
    arithmetic,
    as_bytes,
    block,
    column_experts,
    expand_tile,
    is_narrow,
    options,
    parts,
    products_read_memory,
    rows_of,
    shared_shrink_tile,
    shared_weight_tile,
    use_groups,
)
from floe_kernels.triton.moe_lora_backward import gate_gradients, moe_lora_backward, weight_gradient
from floe_kernels.triton.moe_lora_forward import Routed, moe_lora_linear, update
from floe_kernels.triton.shared_gradients import shared_update_kernel, shared_weight_grad_kernel
from floe_kernels.triton.shared_products import (
    shared_route_parts_kernel,
    shared_shrink_part_kernel,
    shared_shrink_route_kernel,
)
from floe_kernels.triton.weight_grad import add_parts_kernel

# three accumulators of 64 x 128 and of 64 x 16 hold 108 of a thread's registers in eight warps; a
# fourth, or 32 experts, leaves too few for the addresses
MOST_LINEARS = 3
MOST_SHARED_COLUMNS = 128
MOST_SHARED_EXPERTS = 16


def share_kernels(x: Tensor, siblings: Sequence[Sibling]) -> bool:
    """Say whether one kernel can do the shrinks of all siblings."""
    same = {(s.top_k, s.renormalize, s.lora_A.dtype) for s in siblings}
    return (
        is_narrow(x)
        and products_read_memory(x.device)
        and 2 <= len(siblings) <= MOST_LINEARS
        and len(same) == 1
        and len(x) > 0
        and all(
            not s.shared_A
            and not s.dropout_p  # drawing its mask beside three sums spills 52 to 260 bytes (sm_90)
            and 0 < sum(s.ranks) <= MOST_SHARED_COLUMNS
            and len(s.ranks) <= MOST_SHARED_EXPERTS
            and not use_groups(s.ranks, s.top_k, False)
            for s in siblings
        )
    )


def shrink_and_route_all(
    x: Tensor, siblings: Sequence[Sibling], mask: Tensor | None
) -> list[Routed]:
    """Return every sibling's h, z and routing; one kernel for many tokens, two for few."""
    n, i = x.shape
    k = siblings[0].top_k
    ranks, experts = zip(*((sum(s.ranks), len(s.ranks)) for s in siblings), strict=True)
    weights = [adapter_weights(x, s.lora_A, s.router_weight) for s in siblings]
    lora_As, routers = zip(*weights, strict=True)
    routed = [
        Routed(
            x.new_empty(n, r),
            x.new_empty(n, r),
            x.new_empty(n, k, dtype=torch.int64),
            x.new_empty(n, k, dtype=torch.float32),
            x.new_empty(n, e, dtype=torch.float32),
        )
        for r, e in zip(ranks, experts, strict=True)
    ]
    h, z, ids, gates, logits = zip(*routed, strict=True)
    scalings = tuple(s.scaling for s in siblings)
    owners = tuple(column_experts(s.ranks, x.device) for s in siblings)
    tile = shared_shrink_tile(x, lora_As)
    block_e = block(max(experts), MOST_SHARED_EXPERTS)
    blocks = {"BLOCK_C": tile.columns, "BLOCK_E": block_e}
    products = {
        **blocks, **arithmetic(x), "S": len(siblings), "HAS_MASK": mask is not None,
        "BLOCK_N": tile.rows, "BLOCK_I": tile.depth, **options(tile.warps, tile.stages, x.device),
    }  # fmt: skip
    routing = {"K": k, "RENORMALIZE": siblings[0].renormalize, "BLOCK_K": block(k, 1 << 16, 1)}
    row_blocks, steps = triton.cdiv(n, tile.rows), triton.cdiv(i, tile.depth)
    if n >= SPLIT_BELOW:
        shared_shrink_route_kernel[(row_blocks,)](
            x, mask, lora_As, routers, scalings, owners, z, h, gates, ids, logits,
            x_stride_n=x.stride(0), N=n, I=i, Rs=ranks, Es=experts, steps=steps,
            **routing, **products,
        )  # fmt: skip
        return routed
    split, width = parts(row_blocks, steps), sum(ranks) + sum(experts)
    part = x.new_empty(split, n, width, dtype=torch.float32)
    shared_shrink_part_kernel[(row_blocks, split)](
        x, mask, lora_As, routers, part, x_stride_n=x.stride(0), N=n, I=i, W=width,
        Rs=ranks, Es=experts, steps=triton.cdiv(steps, split), **products,
    )  # fmt: skip
    rows = max(1, min(16, 2048 // block_e))
    shared_route_parts_kernel[(triton.cdiv(n, rows), len(siblings))](
        part, mask, scalings, owners, z, h, gates, ids, logits, split, n, width, ranks, experts,
        S=len(siblings), HAS_MASK=mask is not None, BLOCK_N=rows, **routing, **blocks, **options(),
    )  # fmt: skip
    return routed


def moe_lora_shared_linear(
    x: Tensor, siblings: Sequence[Sibling], token_mask: Tensor | None
) -> list[Tensor]:
    """Return the siblings' outputs, then z, experts, gates and logits of each."""
    if not share_kernels(x, siblings):
        each = [moe_lora_linear(x, *s[:10], token_mask, *s[10:12]) for s in siblings]
        return [out for out, *_ in each] + [t for _, *saved in each for t in saved]
    x = rows_of(x)
    routed = shrink_and_route_all(x, siblings, as_bytes(token_mask))
    outs = []
    for s, own in zip(siblings, routed, strict=True):
        out = F.linear(x, s.weight, s.bias)
        (lora_B,) = adapter_weights(x, s.lora_B)
        outs.append(update(out, out, own.h, lora_B))
    return outs + [t for own in routed for t in own[1:]]


def _update_all(
    grad_x: Tensor,
    siblings: Sequence[Sibling],
    dz: Sequence[Tensor],
    dlogits: Sequence[Tensor],
) -> None:
    """Add every sibling's adapter to the gradient of x, which is read and written once."""
    n, d = grad_x.shape
    ranks, experts = (tuple(t.shape[1] for t in tensors) for tensors in (dz, dlogits))
    tile = expand_tile(grad_x, max(ranks))
    lora_As, routers = zip(
        *(adapter_weights(grad_x, s.lora_A, s.router_weight) for s in siblings), strict=True
    )
    shared_update_kernel[(triton.cdiv(d, tile.columns), triton.cdiv(n, tile.rows))](
        grad_x, tuple(dz), tuple(dlogits), lora_As, routers,
        out_stride_n=grad_x.stride(0), dz_strides=tuple(t.stride(0) for t in dz),
        N=n, D=d, Rs=ranks, Es=experts, S=len(siblings), **arithmetic(grad_x),
        BLOCK_N=tile.rows, BLOCK_D=tile.columns, BLOCK_R=tile.depth,
        BLOCK_E=block(max(experts), MOST_SHARED_EXPERTS),
        **options(tile.warps, tile.stages, grad_x.device),
    )  # fmt: skip


def _weight_gradients(
    x: Tensor,
    mask: Tensor | None,
    siblings: Sequence[Sibling],
    dz: Sequence[Tensor],
    dlogits: Sequence[Tensor],
    outs: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """Write every sibling's gradients of lora_A and router, from one read of x."""
    n, d = x.shape
    ranks, experts = (tuple(t.shape[1] for t in tensors) for tensors in (dz, dlogits))
    tile, width = shared_weight_tile(max(ranks)), sum(ranks) + sum(experts)
    column_blocks, steps = triton.cdiv(d, tile.rows), triton.cdiv(n, tile.depth)
    split = parts(column_blocks, steps)
    part = x.new_empty(split, width, d, dtype=torch.float32)
    shared_weight_grad_kernel[(column_blocks, split)](
        x, mask, tuple(dz), tuple(dlogits), part,
        x_stride_n=x.stride(0), dz_strides=tuple(t.stride(0) for t in dz), N=n, D=d, W=width,
        Rs=ranks, Es=experts, steps=triton.cdiv(steps, split), S=len(siblings),
        HAS_MASK=mask is not None, **arithmetic(x),
        BLOCK_N=tile.depth, BLOCK_D=tile.rows, BLOCK_R=tile.columns,
        BLOCK_E=block(max(experts), MOST_SHARED_EXPERTS),
        **options(tile.warps, tile.stages, x.device),
    )  # fmt: skip
    first = 0
    for (out, out2), r, e in zip(outs, ranks, experts, strict=True):
        add_parts_kernel[(triton.cdiv((r + e) * d, 1024),)](
            part[:, first:], out, out2, part.stride(0), split, r * d, e * d,
            INTO2=False, BLOCK=1024, **options(),
        )  # fmt: skip
        first += r + e


def moe_lora_shared_backward(
    grad_outs: Sequence[Tensor],
    x: Tensor,
    siblings: Sequence[Sibling],
    saved: Sequence[Adapter],
    token_mask: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradient of x, then those of each sibling's lora_A, lora_B and router."""
    wants = [needs[1 + 3 * i : 4 + 3 * i] for i in range(len(siblings))]
    if not share_kernels(x, siblings):
        return _one_by_one(grad_outs, x, siblings, saved, token_mask, needs[0], wants)
    x, mask = rows_of(x), as_bytes(token_mask)
    grad_x = x.new_empty(0)
    grads, dz, dlogits = [], [], []
    for i, (s, own) in enumerate(zip(siblings, saved, strict=True)):
        dy = rows_of(grad_outs[i].to(x.dtype))
        (lora_B,) = adapter_weights(x, s.lora_B)
        gate = gate_gradients(
            dy, lora_B, s.scaling, Routed(*own), s.ranks, False, s.renormalize, mask, s.aux_coefs,
            False,
        )  # fmt: skip
        dz.append(gate.dz)
        dlogits.append(gate.dlogits)
        if needs[0]:  # the base's share: cuBLAS adds the later ones as it stores them
            weight = s.weight.to(dy.dtype)
            grad_x = grad_x.addmm_(dy, weight) if i else dy @ weight
        grad_B = s.lora_B.new_empty(s.lora_B.shape if wants[i][1] else (0,))
        if wants[i][1]:
            weight_gradient(dy, mask, gate.h, grad_B)
        grads.append(grad_B)
    if needs[0]:
        _update_all(grad_x, siblings, dz, dlogits)
    pairs = [
        (s.lora_A.new_empty(s.lora_A.shape), s.router_weight.new_empty(s.router_weight.shape))
        for s in siblings
    ]
    if any(want[0] or want[2] for want in wants):
        _weight_gradients(x, mask, siblings, dz, dlogits, pairs)
    out = [grad_x]
    for (grad_A, grad_router), grad_B, want in zip(pairs, grads, wants, strict=True):
        out += [grad_A if want[0] else grad_A.new_empty(0), grad_B]
        out.append(grad_router if want[2] else grad_router.new_empty(0))
    return out


def _one_by_one(
    grad_outs: Sequence[Tensor],
    x: Tensor,
    siblings: Sequence[Sibling],
    saved: Sequence[Adapter],
    token_mask: Tensor | None,
    needs_x: bool,
    wants: Sequence[Sequence[bool]],
) -> list[Tensor]:
    grad_x, rest = x.new_empty(0), list[Tensor]()
    for i, (s, own) in enumerate(zip(siblings, saved, strict=True)):
        grads = moe_lora_backward(
            grad_outs[i], x, s.weight, s.lora_A, s.lora_B, s.router_weight, s.scaling, *own[1:],
            s.ranks, s.shared_A, s.renormalize, token_mask, s.dropout_p, s.dropout_seed,
            s.aux_coefs, [needs_x, *wants[i]], None,
        )  # fmt: skip
        if needs_x:
            grad_x = grad_x.add_(grads.x) if i else grads.x
        rest += grads[1:]
    return [grad_x, *rest]
