"""Is an installed wheel whole? Any Python that has torch runs this: ``make smoke``.

python smoke.py [native]: with ``native``, the C++ kernels must be there, and ``_info`` must not.
"""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import torch

import floe_kernels as fk

RANKS = (8, 8, 4, 2)


def server(op):
    """What the dispatcher says about an operator's CPU kernel."""
    lines = torch._C._dispatch_dump(f"floe::{op}").splitlines()
    return next((line for line in lines if line.startswith("CPU:")), "")


def check_build(native):
    if native:
        assert "floe_kernels._C" in sys.modules
        assert importlib.util.find_spec("floe_kernels._info") is None, "_info is not abi3"
        for op in ("topk_softmax", "moe_lora_linear", "moe_lora", "segment_grad_square"):
            assert "csrc" in server(op), f"{op} is not served by C++: {server(op)}"
    assert importlib.metadata.version("floe-kernels") == fk.__version__
    assert Path(fk.__file__).with_name("py.typed").exists()


def loop(x, weight, bias, lora_A, lora_B, router, scaling):
    """The layer as a loop over experts; the router's two largest share a softmax."""
    gates = torch.zeros(*x.shape[:-1], len(RANKS), dtype=x.dtype)
    best = (x @ router.T).topk(2)
    gates = gates.scatter(-1, best.indices, best.values.softmax(-1))
    y, start = x @ weight.T + bias, 0
    for e, rank in enumerate(RANKS):
        own = slice(start, start + rank)
        y = y + gates[..., e, None] * ((x @ lora_A[own].T) * scaling[own] @ lora_B[own])
        start += rank
    return y


def check_layer(dtype):
    """Forward and backward of the layer against the loop in float64."""
    torch.manual_seed(0)
    layer = fk.FusedMoELoRA(torch.nn.Linear(48, 40), ranks=RANKS, top_k=2).to(dtype)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 50, 48, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 50, 40, dtype=dtype)
    given = [x, layer.lora_A, layer.lora_B, layer.router.weight]
    out = layer(x)
    ours = [out, *torch.autograd.grad(out, given, grad)]

    base = (p.detach().double() for p in (layer.base_layer.weight, layer.base_layer.bias))
    exact = [t.detach().double().requires_grad_() for t in given]
    out = loop(exact[0], *base, *exact[1:], layer.scaling.double())
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    bound = 150 * torch.finfo(dtype).eps  # no sum has more terms than there are tokens
    for got, want in zip(ours, expected, strict=True):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < bound, f"{dtype}: {error:.1e} away from a loop over experts"


def check_command():
    """``floe info``, or one sentence on what it needs."""
    done = subprocess.run(
        [sys.executable, "-m", "floe_kernels", "info"], capture_output=True, text=True, check=False
    )
    if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
        assert done.returncode == 0, done.stderr
        assert fk.__version__ in done.stdout
    else:
        assert done.returncode == 1
        assert done.stderr.strip().endswith("pip install floe-kernels[cli]"), done.stderr


def main(native):
    check_build(native)
    for dtype in (torch.float64, torch.float32):
        check_layer(dtype)
    check_command()
    print(
        f"floe_kernels {fk.__version__} works: Python {platform.python_version()}, "
        f"torch {torch.__version__}, {'C++' if native else 'any'} kernels, {fk.__path__[0]}"
    )


if __name__ == "__main__":
    main("native" in sys.argv[1:])
