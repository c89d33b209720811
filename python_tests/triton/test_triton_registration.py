"""What is registered for CUDA takes the operators' arguments, in their order.

Without a GPU nothing else calls it: the dispatcher would, so the test does in its place.
"""

import contextlib

import pytest
import torch

from floe_kernels.ops import grad_square, moe_lora, routing, shared_inputs
from floe_kernels.reference.moe_lora import FisherBuffers
from floe_kernels.triton import RAN_ON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """The devices that were made current, where there is none to choose."""
    devices = []
    if DEVICE == "cpu":
        monkeypatch.setattr(
            torch.cuda, "device", lambda device: devices.append(device) or contextlib.nullcontext()
        )
    return devices


def on_cuda(op, *args):
    """Call what the dispatcher would for CUDA tensors."""
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


def by_default(op, *args):
    """Call the readable kernel, whatever else serves the device."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return op.redispatch(torch._C.DispatchKeySet(key), *args)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def layer(shared_A):
    """Return x, weight, the adapter and everything that follows it in the schema."""
    offsets = torch.tensor([0, 9, 20], device=DEVICE)
    adapter = (randn(2 if shared_A else 6, 24), randn(6, 10), randn(3, 24))
    mask = torch.arange(20, device=DEVICE) % 5 != 0
    seed, aux = torch.tensor(3, device=DEVICE), torch.tensor([0.1, 0.2], device=DEVICE)
    config = (randn(6), [2, 2, 2], 2, shared_A, True, mask, 0.25, seed, aux)
    fisher = FisherBuffers(offsets, None, None, None, None, None)
    return randn(20, 24), randn(10, 24), adapter, config, fisher


@pytest.mark.parametrize("shared_A", [False, True])
def test_layer(shared_A):
    x, weight, adapter, config, fisher = layer(shared_A)
    args = (x, weight, randn(10), *adapter, *config, *[None] * 6)
    got, want = (run(moe_lora.moe_lora_linear, *args) for run in (on_cuda, by_default))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    args = (x, x @ weight.T, *adapter, *config, *[None] * 6)
    got, want = (run(moe_lora.moe_lora, *args) for run in (on_cuda, by_default))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    scaling, ranks, _, *rest, aux = config
    both = []
    for run in (on_cuda, by_default):
        own = fisher._replace(
            lora_A=torch.zeros_like(adapter[0]),
            lora_B=torch.zeros(6, device=DEVICE),
            router=torch.zeros((), device=DEVICE),
            gate=torch.zeros(2, device=DEVICE),
        )
        grads = run(
            moe_lora.moe_lora_backward, randn(20, 10), x, weight, *adapter, scaling, *want[1:],
            ranks, *rest, aux, [True] * 4, *own,
        )  # fmt: skip
        both.append((*grads, *own[2:]))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_grad_square():
    args = (randn(20, 3), randn(20, 7), torch.tensor([0, 4, 20], device=DEVICE), randn(2))
    for op, rest in (
        (grad_square.segment_grad_square, ("rank",)),
        (grad_square.linear_grad_square, ()),
    ):
        for one, other in zip(
            *(run(op, *args, *rest) for run in (on_cuda, by_default)), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_float64_goes_to_the_reference():
    x, weight, adapter, config, _ = layer(False)
    wide = [t.double() for t in (x, weight, *adapter)]
    args = (*wide[:2], None, *wide[2:], *config, *[None] * 6)
    got, want = (run(moe_lora.moe_lora_linear, *args) for run in (on_cuda, by_default))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_routing():
    got, want = (run(routing.topk_softmax, randn(9, 5), 2, True) for run in (on_cuda, by_default))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def shared_arguments():
    """Two linears of one x, in the lists of the operator's schema."""
    x, none = randn(20, 24), randn(0)
    lists = ([randn(rows, 24) for rows in (10, 7)], [none, randn(7)])
    adapters = ([randn(4, 24)] * 2, [randn(4, 10), randn(4, 7)], [randn(2, 24)] * 2, [randn(4)] * 2)
    config = ([2, 2, 3, 1], [2, 2], [False] * 2, [True] * 2, None, [0.0] * 2, [none] * 2)
    return x, *lists, *adapters, *config, [none] * 2


def test_shared_inputs():
    args = shared_arguments()
    run_both = (on_cuda, by_default)
    got, want = (run(shared_inputs.moe_lora_shared_linear, *args) for run in run_both)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    x, weights, _biases, *adapters, ranks, _top_ks, shared_As, renormalizes, mask, ps = args[:-2]
    config = (ranks, shared_As, renormalizes, mask, ps, *args[-2:], [True] * 7)
    dys = [randn(20, 10), randn(20, 7)]
    got, want = (
        run(shared_inputs.moe_lora_shared_backward, dys, x, weights, *adapters, want[2:], *config)
        for run in run_both
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts choices that are not made here")
def test_every_launch_chooses_its_device(chosen):
    """Triton launches on the current device: with two GPUs that may be the wrong one."""
    test_layer(False)
    assert len(chosen) == 3
    test_grad_square()
    test_routing()
    test_shared_inputs()
    assert len(chosen) == 3 + 2 + 1 + 2


def test_info_says_that_a_kernel_only_compiled():
    info = pytest.importorskip("floe_kernels.cli.info")
    served = {name: cuda for name, _cpu, cuda in info.operator_rows()}
    for name in ("moe_lora_linear", "moe_lora_backward", "topk_softmax", "segment_grad_square"):
        if RAN_ON:
            assert served[name] == "Triton"
        else:
            assert served[name] == "Triton, compiled, not yet run"
