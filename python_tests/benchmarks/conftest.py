"""The benchmarks are not an installed package: they are found beside the tests' folder."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import registry
from floe_kernels.testing.cases import MoELoRACase


@pytest.fixture(scope="session")
def operations():
    return registry.load()


@pytest.fixture(scope="session")
def moe_lora(operations):
    return operations["moe_lora"]


@pytest.fixture
def tiny():
    return MoELoRACase("tiny", 24, 32, 16, (8, 8, 8, 8), dtype=torch.float32)


@pytest.fixture
def providers(moe_lora):
    return [moe_lora.providers[name] for name in ("base", "ours", "dense-cat", "expert loop")]
