"""The core needs torch alone: it imports, quickly, and works with nothing else installed."""

import subprocess
import sys
from pathlib import Path

import floe_kernels

CHECKOUT = Path(floe_kernels.__file__).parents[1]
OPTIONAL = (
    "accelerate", "datasets", "gguf", "matplotlib", "optuna", "peft", "rich", "safetensors",
    "scipy", "transformers", "triton", "typer",
)  # fmt: skip

# every finder is wrapped, so that an absent package is absent for find_spec() as well
WITHOUT_OPTIONAL = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {OPTIONAL}
        return None if absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_optional():
    code = f"import sys, torch, floe_kernels; print([m for m in {OPTIONAL} if m in sys.modules])"
    assert python(code) == "[]"


def test_core_works_with_torch_alone():
    layer = """
import torch, floe_kernels as fk
layer = fk.FusedMoELoRA(torch.nn.Linear(6, 4), ranks=[2, 3], top_k=1)
layer(torch.ones(5, 6)).sum().backward()
print(layer.lora_B.grad.isfinite().all().item())
"""
    assert python(WITHOUT_OPTIONAL + layer) == "True"


def test_allocation_works_with_torch_alone():
    assert python(WITHOUT_OPTIONAL + "import floe_kernels.allocation as a; print(a.__doc__[:1])")
