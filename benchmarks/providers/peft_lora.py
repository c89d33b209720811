"""PEFT: its plain LoRA layer, as it comes, and the einsum of its Arrow mixture."""

from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.providers.layers import canonical
from benchmarks.providers.loops import route
from benchmarks.registry import AutogradStep, Unavailable
from floe_kernels.testing.cases import MoELoRAInputs

#: Elements of Arrow's (T, E, O) tensor beyond which it is not run: it is made twice and saved.
ARROW_LIMIT = 2**28


def peft_version() -> str:
    """Return the installed version."""
    try:
        return metadata.version("peft")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def plain_lora_truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return what one LoRA of rank R gives in float64: all columns, and no router."""
    x, lora_A, lora_B = (
        getattr(inputs, n).double().requires_grad_() for n in ("x", "lora_A", "lora_B")
    )
    h = F.linear(x, lora_A) * plain_scaling(inputs)
    y = F.linear(x, inputs.weight.double()) + h @ lora_B
    grads = torch.autograd.grad(y, (x, lora_A, lora_B), inputs.grad_out.double())
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), grads, strict=True))}


def plain_scaling(inputs: MoELoRAInputs) -> float:
    return 16.0 / inputs.case.columns


@MOE_LORA.provide(
    "PEFT LoRA", f"upstream peft {peft_version()}", role="context", truth=plain_lora_truth
)
def plain_lora(inputs: MoELoRAInputs) -> AutogradStep:
    """``peft.tuners.lora.Linear`` of rank R: no experts, so no peer, but what most people run."""
    case = inputs.case
    if case.shared_A:
        raise Unavailable("a shared A has no single LoRA of equal rank")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise Unavailable("peft is not installed") from None
    device = inputs.x.device
    model = nn.Sequential(
        nn.Linear(case.inputs, case.outputs, bias=False, device=device, dtype=case.dtype)
    )
    model[0].weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = LoraConfig(r=case.columns, lora_alpha=16, target_modules=["0"])
    inject_adapter_in_model(config, model)
    layer: Any = model[0].to(device)
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    lora_A.weight = nn.Parameter(inputs.lora_A.detach())
    lora_B.weight = nn.Parameter(inputs.lora_B.detach().T.contiguous())  # PEFT keeps (O, R)
    x = leaf(inputs.x)

    def unpack(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"dx": grads["x"], "dA": grads["lora_A"], "dB": grads["lora_B"].T}

    leaves = {"x": x, "lora_A": lora_A.weight, "lora_B": lora_B.weight}
    frozen = (inputs.weight,)
    return AutogradStep(lambda: layer(x), inputs.grad_out, leaves, unpack, frozen)


@MOE_LORA.provide("Arrow einsum", "PEFT Arrow's formula, rewritten for a linear router")
def arrow(inputs: MoELoRAInputs) -> AutogradStep:
    """Every expert's output for every token, (T, E, O), and then the weighted sum."""
    case = inputs.case
    if case.shared_A or case.equal_rank is None:
        raise Unavailable("Arrow stacks experts, each with an A of its own and all of one rank")
    if case.tokens * case.experts * case.outputs > ARROW_LIMIT:
        size = case.tokens * case.experts * case.outputs * case.dtype.itemsize
        raise Unavailable(f"its (T, E, O) tensor takes {size / 1e9:.1f} GB, twice")
    x, router = leaf(inputs.x), leaf(inputs.router_weight)
    lora_A = leaf(inputs.lora_A.view(case.experts, case.equal_rank, case.inputs))
    lora_B = leaf(inputs.lora_B.view(case.experts, case.equal_rank, case.outputs))
    scale = float(inputs.scaling[0])

    def forward() -> Tensor:
        gates, experts = route(F.linear(x, router.to(x.dtype)), case)
        dense = gates.new_zeros(len(x), case.experts).scatter(1, experts, gates).to(x.dtype)
        z = torch.einsum("tf,erf->ter", x, lora_A.to(x.dtype))
        outputs = torch.einsum("ter,ero->teo", z, lora_B.to(x.dtype)) * scale
        return F.linear(x, inputs.weight) + torch.einsum("te,teo->to", dense, outputs)

    def unpack(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = {name: grad.flatten(0, 1) for name, grad in grads.items() if name[:4] == "lora"}
        return canonical({**grads, **packed})

    leaves = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "router": router}
    return AutogradStep(forward, inputs.grad_out, leaves, unpack, frozen=(inputs.weight,))
