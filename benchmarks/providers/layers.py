"""The floor, the frozen linear alone, and our own layer."""

import torch.nn.functional as F

from benchmarks.moe_lora import MOE_LORA, leaf
from benchmarks.registry import AutogradStep
from floe_kernels import functional
from floe_kernels.testing.cases import MoELoRAInputs


@MOE_LORA.provide("base", "PyTorch", role="base")
def base(inputs: MoELoRAInputs) -> AutogradStep:
    """The frozen linear and the gradient of its input: what no adapter can be faster than."""
    x = leaf(inputs.x)
    return AutogradStep(
        lambda: F.linear(x, inputs.weight),
        inputs.grad_out,
        {"x": x},
        lambda grads: {},
        frozen=(inputs.weight,),
    )


@MOE_LORA.provide("ours", "ours", role="ours")
def ours(inputs: MoELoRAInputs) -> AutogradStep:
    """``functional.moe_lora_linear``: one operator, one backward operator."""
    case = inputs.case
    names = ("x", "lora_A", "lora_B", "router_weight")
    x, lora_A, lora_B, router = leaves = [leaf(getattr(inputs, n)) for n in names]

    def forward():  # type: ignore[no-untyped-def]  # noqa: ANN202
        return functional.moe_lora_linear(
            x, inputs.weight, None, lora_A, lora_B, router, ranks=case.ranks, top_k=case.top_k,
            scaling=inputs.scaling, shared_A=case.shared_A,
        ).out  # fmt: skip

    return AutogradStep(
        forward,
        inputs.grad_out,
        dict(zip(("x", "lora_A", "lora_B", "router"), leaves, strict=True)),
        canonical,
        frozen=(inputs.weight, inputs.scaling),
    )


def canonical(grads):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Name gradients of leaves in our own layout as the truth does."""
    names = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "router": "drouter"}
    return {names[name]: grad for name, grad in grads.items()}
