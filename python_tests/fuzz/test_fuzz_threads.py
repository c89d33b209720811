"""The kernels give the same bits again, and on one, two and three threads."""

import contextlib
import dataclasses

import pytest
import torch
from backends import SETS, running
from calling import call, fisher_buffers
from drawing import drawn
from hypothesis import given
from hypothesis import strategies as st
from sample_strategies import sample_cases, sample_tensors
from strategies import cases, tensors

from floe_kernels import functional as FK

pytestmark = pytest.mark.skipif(not SETS, reason="needs the C++ kernels")

#: the last ones make several tasks a thread, and slots of one expert in several tasks
TOKENS = st.sampled_from([0, 1, 16, 17, 33, 64, 129, 300, 700])


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def assert_same_bits(run):
    """Bits, not values: NaN equals NaN, and -0 is not 0."""
    with threads(1):
        want = run()
    for count in (1, 2, 3):
        with threads(count):
            got = run()
        for name, one in want.items():
            other = got[name]
            assert torch.equal(bits(one), bits(other)), f"{name} differs on {count} threads"


def bits(tensor):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def outcome(case):
    """All that the kernels compute; of the door that owns the base, not what torch's GEMM does."""
    t = tensors(case)
    fisher = fisher_buffers(case, t) if case.samples is not None else None
    result, leaves = call(case, t, fisher)
    result.out.backward(t["grad_out"])
    found = {**result._asdict(), **{f"gradient of {k}": leaf.grad for k, leaf in leaves.items()}}
    if case.base_dtype is None:
        del found["out"], found["gradient of x"]
    if fisher is not None:
        squares = ("lora_A", "lora_B", "router", "gate")
        found |= {f"squares of {k}": getattr(fisher, k) for k in squares}
    return found


@pytest.mark.parametrize("backend", SETS)
@drawn(0.015)
@given(case=cases(), tokens=TOKENS)
def test_layer_on_any_threads(backend, tried, case, tokens):
    case = dataclasses.replace(case, tokens=tokens)
    with running(backend):
        assert_same_bits(lambda: outcome(case))
    tried()


@pytest.mark.parametrize("backend", SETS)
@drawn(0.01)
@given(case=sample_cases(), width=st.sampled_from([0, 1, 33, 300]))
def test_squares_on_any_threads(backend, tried, case, width):
    case["columns"] = width
    g, x, offsets, scale = sample_tensors(case)

    def run():
        out = FK.segment_grad_square(g, x, offsets, scale=scale, reduce=case["reduce"])
        return out._asdict()

    with running(backend):
        assert_same_bits(run)
    tried()


@pytest.mark.parametrize("backend", SETS)
@drawn(0.005)
@given(case=cases(), tokens=TOKENS)
def test_routing_on_any_threads(backend, tried, case, tokens):
    generator = torch.Generator().manual_seed(case.seed)
    logits = torch.randn(tokens, case.experts, generator=generator).to(case.dtype)

    def run():
        return FK.topk_softmax(logits, case.top_k, renormalize=case.renormalize)._asdict()

    with running(backend):
        assert_same_bits(run)
    tried()
