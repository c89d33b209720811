"""Loops over experts: what published implementations run today."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.providers.layers import canonical
from benchmarks.registry import AutogradStep, Unavailable
from floe_kernels.testing.cases import MoELoRACase, MoELoRAInputs

REWRITTEN = "published formula, rewritten"


def route(logits: Tensor, case: MoELoRACase) -> tuple[Tensor, Tensor]:
    """Return (gates, experts): a float32 softmax, then the K best, renormalised for K > 1."""
    if case.renormalize:  # a softmax over the kept logits is the renormalised one, and cheaper
        values, experts = logits.float().topk(case.top_k, dim=-1)
        return values.softmax(-1), experts
    return logits.float().softmax(-1).topk(case.top_k, dim=-1)


def expert_leaves(inputs: MoELoRAInputs) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return leaves (x, router, shared A or nothing) and one A and one B per expert."""
    case = inputs.case
    As = [inputs.lora_A] if case.shared_A else inputs.lora_A.split(case.ranks)
    Bs = inputs.lora_B.split(case.ranks)
    return leaf(inputs.x), leaf(inputs.router_weight), None, [leaf(a) for a in As], [leaf(b) for b in Bs]  # type: ignore[return-value]


def step(inputs: MoELoRAInputs, forward, x, router, As, Bs) -> AutogradStep:  # type: ignore[no-untyped-def]  # noqa: ANN001
    leaves = {"x": x, "router": router}
    leaves |= {f"A{e}": a for e, a in enumerate(As)} | {f"B{e}": b for e, b in enumerate(Bs)}

    def unpack(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        dA = torch.cat([grads[f"A{e}"] for e in range(len(As))])
        dB = torch.cat([grads[f"B{e}"] for e in range(len(Bs))])
        return canonical({"x": grads["x"], "router": grads["router"], "lora_A": dA, "lora_B": dB})

    return AutogradStep(forward, inputs.grad_out, leaves, unpack, frozen=(inputs.weight,))


@MOE_LORA.provide("expert loop", f"MoLA's {REWRITTEN}")
def expert_loop(inputs: MoELoRAInputs) -> AutogradStep:
    """Gather each expert's tokens, run them through its pair of matrices, add them back."""
    case = inputs.case
    if case.shared_A:
        raise Unavailable("MoLA has no shared A")
    x, router, _, As, Bs = expert_leaves(inputs)
    scales = [16.0 / max(1, r) for r in case.ranks]

    def forward() -> Tensor:
        y = F.linear(x, inputs.weight)
        gates, experts = route(F.linear(x, router.to(x.dtype)), case)
        gates = gates.to(x.dtype)
        for e, (lora_A, lora_B) in enumerate(zip(As, Bs, strict=True)):
            token, slot = torch.where(experts == e)
            z = F.linear(x[token], lora_A.to(x.dtype))
            delta = (z @ lora_B.to(x.dtype)) * scales[e] * gates[token, slot, None]
            y = y.index_add(0, token, delta)
        return y

    return step(inputs, forward, x, router, As, Bs)


@MOE_LORA.provide("dense loop", f"HydraLoRA's {REWRITTEN}")
def dense_loop(inputs: MoELoRAInputs) -> AutogradStep:
    """Run every expert on every token, weighted by its gate, zero where it is not kept."""
    case = inputs.case
    x, router, _, As, Bs = expert_leaves(inputs)
    scales = [16.0 / max(1, r) for r in case.ranks]

    def forward() -> Tensor:
        y = F.linear(x, inputs.weight)
        gates, experts = route(F.linear(x, router.to(x.dtype)), case)
        dense = gates.new_zeros(len(x), case.experts).scatter(1, experts, gates).to(x.dtype)
        for e, lora_B in enumerate(Bs):
            z = F.linear(x, As[0 if case.shared_A else e].to(x.dtype))
            y = y + dense[:, e, None] * (z @ lora_B.to(x.dtype)) * scales[e]
        return y

    return step(inputs, forward, x, router, As, Bs)
