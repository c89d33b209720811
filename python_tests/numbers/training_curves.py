"""A small model that learns, step by step the same whatever it computes in."""

import torch
from backends import running
from torch import nn

from floe_kernels import FusedMoELoRA

INPUTS, HIDDEN, OUTPUTS, BATCH = 24, 32, 16, 64


class Student(nn.Module):
    """Two adapted linears; the frozen weights are bfloat16 numbers in every dtype."""

    def __init__(self, dtype):
        super().__init__()
        sizes = ((INPUTS, HIDDEN), (HIDDEN, OUTPUTS))
        bases = [nn.Linear(*size).bfloat16().to(dtype) for size in sizes]
        self.down, self.up = (FusedMoELoRA(base, [4, 4, 2, 8], 2) for base in bases)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


def losses(seed, steps, dtype, backend):
    """Train, and return every step's loss in float64."""
    torch.manual_seed(seed)
    student = Student(dtype)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-3)
    teacher = torch.randn(INPUTS, OUTPUTS) / INPUTS**0.5
    data = torch.Generator().manual_seed(seed)
    found = []
    with running(backend):
        for _ in range(steps):
            x = torch.randn(BATCH, INPUTS, generator=data).bfloat16()
            wanted = torch.sin(x.float() @ teacher)
            loss = nn.functional.mse_loss(student(x.to(dtype)).float(), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found).double()
