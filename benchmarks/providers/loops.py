"""Loops over experts: what published implementations run today."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.registry import AutogradStep, Unavailable
from floe_kernels.testing.cases import MoELoRACase, MoELoRAInputs

REWRITTEN = "published formula, rewritten"


def route(logits: Tensor, case: MoELoRACase) -> tuple[Tensor, Tensor]:
    """Return (gates, experts): a float32 softmax, then the K best, renormalised for K > 1."""
    if case.renormalize:  # a softmax over the kept logits is the renormalised one, and cheaper
        values, experts = logits.float().topk(case.top_k, dim=-1)
        return values.softmax(-1), experts
    return logits.float().softmax(-1).topk(case.top_k, dim=-1)


class Loop:
    """Leaves for a loop: one A (or a single shared one) and one B per expert."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        case = inputs.case
        shared = [inputs.lora_A] * case.shared_A
        self.inputs, self.x, self.router = inputs, leaf(inputs.x), leaf(inputs.router_weight)
        self.As = [leaf(a) for a in shared or torch.split(inputs.lora_A, list(case.ranks))]
        self.Bs = [leaf(b) for b in torch.split(inputs.lora_B, list(case.ranks))]
        self.scales = [16.0 / max(1, r) for r in case.ranks]

    def route(self) -> tuple[Tensor, Tensor]:
        """Return (gates, experts), logits in the dtype of x as the published code has them."""
        return route(F.linear(self.x, self.router.to(self.x.dtype)), self.inputs.case)

    def step(self, forward: Callable[[], Tensor]) -> AutogradStep:
        """Bind a forward function to the leaves."""
        leaves = {"x": self.x, "router": self.router}
        leaves |= {f"A{e}": a for e, a in enumerate(self.As)}
        leaves |= {f"B{e}": b for e, b in enumerate(self.Bs)}
        frozen = (self.inputs.weight,)
        return AutogradStep(forward, self.inputs.grad_out, leaves, self.unpack, frozen)

    def unpack(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the experts' gradients side by side again."""
        dA = torch.cat([grads[f"A{e}"] for e in range(len(self.As))])
        dB = torch.cat([grads[f"B{e}"] for e in range(len(self.Bs))])
        return {"dx": grads["x"], "drouter": grads["router"], "dA": dA, "dB": dB}


@MOE_LORA.provide("expert loop", f"MoLA's {REWRITTEN}")
def expert_loop(inputs: MoELoRAInputs) -> AutogradStep:
    """Gather each expert's tokens, run them through its pair of matrices, add them back."""
    if inputs.case.shared_A:
        raise Unavailable("MoLA has no shared A")
    loop = Loop(inputs)
    x = loop.x

    def forward() -> Tensor:
        y = F.linear(x, inputs.weight)
        gates, experts = loop.route()
        gates = gates.to(x.dtype)
        for e, (lora_A, lora_B) in enumerate(zip(loop.As, loop.Bs, strict=True)):
            token, slot = torch.where(experts == e)
            z = F.linear(x[token], lora_A.to(x.dtype))
            delta = (z @ lora_B.to(x.dtype)) * loop.scales[e] * gates[token, slot, None]
            y = y.index_add(0, token, delta)
        return y

    return loop.step(forward)


@MOE_LORA.provide("dense loop", f"HydraLoRA's {REWRITTEN}")
def dense_loop(inputs: MoELoRAInputs) -> AutogradStep:
    """Run every expert on every token, weighted by its gate, zero where it is not kept."""
    case, loop = inputs.case, Loop(inputs)
    x = loop.x

    def forward() -> Tensor:
        y = F.linear(x, inputs.weight)
        gates, experts = loop.route()
        dense = gates.new_zeros(len(x), case.experts).scatter(1, experts, gates).to(x.dtype)
        for e, lora_B in enumerate(loop.Bs):
            # a shared A is applied again for every head, as published
            z = F.linear(x, loop.As[0 if case.shared_A else e].to(x.dtype))
            y = y + dense[:, e, None] * (z @ lora_B.to(x.dtype)) * loop.scales[e]
        return y

    return loop.step(forward)
