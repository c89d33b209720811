"""Call the public functions on a drawn case."""

import torch
from balls import widened
from strategies import bounds

from floe_kernels import functional as FK
from floe_kernels import reference
from floe_kernels.reference.moe_lora import FisherBuffers

LEAVES = ("x", "lora_A", "lora_B", "router", "base")


def call(case, t, fisher=None):
    """Call the public function; return its result and the leaves that want gradients."""
    leaves = {k: t[k].detach().requires_grad_() for k in LEAVES if t[k] is not None}
    x, mask, base = leaves["x"], t["mask"], leaves.get("base")
    if case.lead == 3 or (case.lead == 1 and case.tokens == 1):
        put = torch.Tensor.squeeze if case.lead == 1 else torch.Tensor.unsqueeze
        x, base = put(x, 0), None if base is None else put(base, 0)
        mask = None if mask is None or case.lead == 1 else mask[None]
        if case.lead == 1 and t["mask"] is not None:
            mask = t["mask"]
    rest = {
        "ranks": case.ranks, "top_k": case.top_k, "scaling": t["scaling"],
        "shared_A": case.shared_A, "renormalize": case.renormalize, "token_mask": mask,
        "dropout_p": case.dropout_p, "dropout_seed": t["seed"], "aux_coefs": t["aux"],
        "fisher": fisher,
    }  # fmt: skip
    adapter = leaves["lora_A"], leaves["lora_B"], leaves["router"]
    if base is None:
        result = FK.moe_lora_linear(x, t["weight"], t["bias"], *adapter, **rest)
    else:
        result = FK.moe_lora(x, base, *adapter, **rest)
    return result._replace(out=result.out.reshape(case.tokens, case.outputs)), leaves


def check_experts(case, experts, logits, want):
    """Distinct experts, best first by the kernel's own logits, and no worse than the true best."""
    assert experts.shape == (case.tokens, case.top_k)
    assert ((experts >= 0) & (experts < case.experts)).all()
    if case.tokens:
        assert (experts.sort(1).values.diff(dim=1) > 0).all(), "an expert was kept twice"
    sound = logits.isfinite().all(1)
    own = reference.topk_softmax(logits[sound], case.top_k, True)[1]
    assert torch.equal(experts[sound], own), "not the best of the kernel's own logits, in order"
    if case.top_k < case.experts and case.tokens:
        kept = torch.zeros_like(want.v).scatter(1, experts, 1.0) > 0
        best_dropped = (want.v - want.r).masked_fill(kept, -torch.inf).amax(1)
        worst_kept = (want.v + want.r).masked_fill(~kept, torch.inf).amin(1)
        assert (worst_kept >= best_dropped).all(), "a worse expert was kept"


def fisher_buffers(case, t):
    dtype = widened(case.dtype)
    size = {"element": 2, "rank": 1, "matrix": 0}[case.reduce]
    buffers = [torch.zeros(t[k].shape[:size], dtype=dtype) for k in ("lora_A", "lora_B", "router")]
    offsets = bounds(case.samples, case.tokens)
    count = len(case.samples)
    scale = (None, torch.tensor(3.0), torch.arange(count) + 0.5)[case.seed % 3]
    return FisherBuffers(offsets, scale, *buffers, torch.zeros(count, dtype=dtype))
