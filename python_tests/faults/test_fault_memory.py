"""Training steps leave no memory behind."""

import gc
from pathlib import Path

import pytest
import torch
from counting import ASKED, SURVIVED

from floe_kernels import FisherCollector, FusedMoELoRA

STEPS = 10_000 if ASKED else 2_000
SAMPLES = 40
#: bytes a step: less than the smallest tensor's own record takes
LEAST = 256


def resident():
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc")
    gc.collect()
    return int(status.read_text().split()[1]) * 4096


def grown_by(steps):
    """How many bytes more the process holds after so many steps, the first ones left out."""
    steps(500)
    before = resident()
    steps(STEPS)
    return resident() - before


def make_layer():
    torch.manual_seed(0)
    return FusedMoELoRA(torch.nn.Linear(24, 16), [4, 2, 0], 2), torch.randn(SAMPLES, 8, 24)


def test_steps_leave_nothing_behind():
    layer, x = make_layer()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-3)

    def steps(count):
        for _ in range(count):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    grown = grown_by(steps)
    assert grown < LEAST * STEPS, f"{grown / STEPS:.0f} bytes a step"
    SURVIVED[f"{STEPS:,} steps in one piece of memory"] += 1


@pytest.mark.parametrize("keep_gates", [False, True])
def test_scores_grow_by_their_gate_gradients_alone(keep_gates):
    layer, x = make_layer()
    with FisherCollector(layer, loss_reduction="sum", keep_gates=keep_gates) as collector:

        def steps(count):
            for _ in range(count):
                layer(x).square().sum().backward()
                collector.step()
                layer.zero_grad()

        grown = grown_by(steps)
    rows = SAMPLES * (4 + 1) if keep_gates else 0  # a float and a flag for every sample
    assert grown < (rows + LEAST) * STEPS, f"{grown / STEPS:.0f} bytes a step"
    assert len(collector.record().gates) == (SAMPLES * (500 + STEPS) if keep_gates else 0)
    SURVIVED[f"{STEPS:,} scored steps in one piece of memory"] += 1
