"""Training steps leave no memory behind."""

import gc
from pathlib import Path

import pytest
import torch
from counting import ASKED, SURVIVED

from floe_kernels import FusedMoELoRA

STEPS = 10_000 if ASKED else 2_000
#: bytes a step: less than the smallest tensor's own record takes
LEAST = 256


def resident():
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc")
    gc.collect()
    return int(status.read_text().split()[1]) * 4096


def test_steps_leave_nothing_behind():
    torch.manual_seed(0)
    layer = FusedMoELoRA(torch.nn.Linear(24, 16), [4, 2, 0], 2)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(40, 8, 24)

    def steps(count):
        for _ in range(count):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(500)
    before = resident()
    steps(STEPS)
    grown = resident() - before
    assert grown < LEAST * STEPS, f"{grown / STEPS:.0f} bytes a step"
    SURVIVED[f"{STEPS:,} steps in one piece of memory"] += 1
