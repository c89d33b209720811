"""The floor, the frozen linear alone, and our own layer."""

import torch.nn.functional as F
from torch import Tensor

from benchmarks.graphed import GRAPHED, graphed
from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.registry import AutogradStep
from floe_kernels import functional
from floe_kernels.testing.cases import MoELoRAInputs


def canonical(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name gradients of leaves in our own layout as the truth does."""
    names = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "router": "drouter"}
    return {names[name]: grad for name, grad in grads.items()}


def base_truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the frozen linear and its input's gradient in float64."""
    weight = inputs.weight.double()
    return {"y": F.linear(inputs.x.double(), weight), "dx": inputs.grad_out.double() @ weight}


@MOE_LORA.provide("base", "PyTorch", role="base", truth=base_truth)
def base(inputs: MoELoRAInputs) -> AutogradStep:
    """The frozen linear and the gradient of its input: what no adapter can be faster than."""
    x, weight = leaf(inputs.x), inputs.weight
    forward = lambda: F.linear(x, weight)  # noqa: E731
    return AutogradStep(forward, inputs.grad_out, {"x": x}, canonical, frozen=(weight,))


def ours(inputs: MoELoRAInputs) -> AutogradStep:
    """``functional.moe_lora_linear``: one operator, one backward operator."""
    case = inputs.case
    names = ("x", "lora_A", "lora_B", "router_weight")
    x, lora_A, lora_B, router = leaves = [leaf(getattr(inputs, n)) for n in names]

    def forward() -> Tensor:
        result = functional.moe_lora_linear(
            x, inputs.weight, None, lora_A, lora_B, router, ranks=case.ranks, top_k=case.top_k,
            scaling=inputs.scaling, shared_A=case.shared_A,
        )  # fmt: skip
        return result.out

    return AutogradStep(
        forward,
        inputs.grad_out,
        dict(zip(("x", "lora_A", "lora_B", "router"), leaves, strict=True)),
        canonical,
        frozen=(inputs.weight, inputs.scaling),
    )


MOE_LORA.provide("ours", "ours", role="ours")(ours)
MOE_LORA.provide("ours graphed", "ours", role="ours", **GRAPHED)(graphed(ours))
MOE_LORA.provide("base graphed", "PyTorch", role="base", truth=base_truth, **GRAPHED)(graphed(base))
