"""ScatterMoE's grouped GEMMs, from a copy of its sources that the user names (``--peer-path``)."""

import importlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.providers.grouped_mm import padded, unpadded
from benchmarks.providers.loops import route
from benchmarks.registry import AutogradStep, Unavailable
from floe_kernels.testing.cases import MoELoRAInputs


@MOE_LORA.provide("ScatterMoE", "upstream scattermoe, experts only", devices=("cuda",))
def scattermoe(inputs: MoELoRAInputs) -> AutogradStep:
    """Two ``parallel_linear`` calls with gather and scatter inside; base and router are ours."""
    case = inputs.case
    if case.shared_A:
        raise Unavailable("with a shared A every expert is kept: there is nothing to group")
    try:
        peer = importlib.import_module("scattermoe.parallel_experts")
    except ImportError as error:
        raise Unavailable(f"scattermoe is not on --peer-path ({error})") from None
    width = max(case.ranks)
    x, router = leaf(inputs.x), leaf(inputs.router_weight)
    lora_A = leaf(padded(inputs.lora_A, case.ranks, width))
    lora_B = leaf(padded(inputs.lora_B, case.ranks, width))
    scales = F.pad(inputs.scaling, (0, 1))[first_columns(case.ranks)]

    def forward() -> Any:
        y = F.linear(x, inputs.weight)
        gates, experts = route(F.linear(x, router.to(x.dtype)), case)
        gates = (gates * scales[experts]).to(x.dtype)
        order = peer.flatten_sort_count(experts, case.experts)
        A = lora_A.to(x.dtype).permute(0, 2, 1)
        z = peer.parallel_linear(x, A, case.top_k, *order, grouped_out=True)
        delta = peer.parallel_linear(z, lora_B.to(x.dtype), 1, *order, grouped_in=True, gates=gates)
        return y + delta

    def unpack(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        dA, dB = (unpadded(grads[name], case.ranks) for name in ("lora_A", "lora_B"))
        return {"dx": grads["x"], "dA": dA, "dB": dB, "drouter": grads["router"]}

    leaves = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "router": router}
    return AutogradStep(forward, inputs.grad_out, leaves, unpack, frozen=(inputs.weight,))


def first_columns(ranks: tuple[int, ...]) -> list[int]:
    """Return the first packed column of every expert; one past the last for one of rank 0."""
    starts = [sum(ranks[:e]) for e in range(len(ranks))]
    return [s if r else sum(ranks) for s, r in zip(starts, ranks, strict=True)]
