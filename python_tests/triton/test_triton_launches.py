"""How many kernels a layer launches: each costs microseconds, and few tokens are little work."""

import pytest
import torch
from test_triton_moe_lora import adapter, draw
from test_triton_shared_inputs import draw as draw_siblings
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from floe_kernels.triton import moe_lora_backward, moe_lora_forward, shared_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted launches")
# these only make a view or name memory
FREE = (
    "empty",
    "view",
    "slice",
    "detach",
    "alias",
    "t.default",
    "transpose",
    "select",
    "as_strided",
)


class Counter(TorchDispatchMode):
    """Count the operations that would each launch a kernel."""

    def __init__(self):
        super().__init__()
        self.launched = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(name in str(func) for name in FREE):
            self.launched.append(str(func))
        return func(*args, **kwargs or {})


def count(monkeypatch, call):
    launched = []

    def launch(self, *args, **kwargs):
        launched.append(self.fn.__name__)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    torch.use_deterministic_algorithms(False)  # the poison of the tests is a kernel of its own
    with Counter() as counter:
        call()
    return launched, counter.launched


@pytest.mark.parametrize(("split_below", "forward", "backward"), [(0, 3, 7), (4096, 4, 9)])
def test_dense_layer(monkeypatch, split_below, forward, backward):
    operands, route, _ = draw("top 2", (torch.bfloat16, torch.bfloat16))
    x, weight, lora_A, lora_B, router = operands.values()
    scaling, ranks, _, *rest = route
    for module in (moe_lora_forward, moe_lora_backward):
        monkeypatch.setattr(module, "SPLIT_BELOW", split_below)
    moe_lora_forward.column_experts(ranks, x.device)  # built once, on the first call
    saved, dy = adapter(x, lora_A, router, *route), x @ weight.T

    def run_forward():
        moe_lora_forward.moe_lora_linear(x, weight, None, lora_A, lora_B, router, *route)

    def run_backward():
        moe_lora_backward.moe_lora_backward(
            dy, x, weight, lora_A, lora_B, router, scaling, *saved[1:], ranks, *rest, None,
            [True] * 4, None,
        )  # fmt: skip

    for call, most in ((run_forward, forward), (run_backward, backward)):
        ours, torchs = count(monkeypatch, call)
        assert len(torchs) == 1, f"one base GEMM, got {torchs}"
        assert len(ours) + 1 <= most, ours


@pytest.mark.parametrize(("split_below", "forward", "backward"), [(0, 7, 17), (4096, 8, 20)])
def test_three_linears_of_one_x(monkeypatch, split_below, forward, backward):
    # alone they launch 9 and 21, or 12 and 27, and autograd adds two gradients of x
    x, siblings, mask = draw_siblings(70, [(24, [4, 4, 3]), (33, [5, 0, 2]), (17, [1, 1])])
    siblings = [s._replace(aux_coefs=None) for s in siblings]
    for module in (shared_inputs, moe_lora_backward):
        monkeypatch.setattr(module, "SPLIT_BELOW", split_below)
    saved = shared_inputs.shrink_and_route_all(x, siblings, mask)
    dys = [torch.ones(len(x), len(s.weight), dtype=x.dtype) for s in siblings]

    def run_forward():
        shared_inputs.moe_lora_shared_linear(x, siblings, mask)

    def run_backward():
        shared_inputs.moe_lora_shared_backward(dys, x, siblings, saved, mask, [True] * 10)

    for call, most in ((run_forward, forward), (run_backward, backward)):
        ours, torchs = count(monkeypatch, call)
        assert len(torchs) == 3, f"a base GEMM each, got {torchs}"
        assert len(ours) + 3 <= most, ours
