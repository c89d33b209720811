"""The Hopper GEMM over two sources: what the compiler made of it, and its source, emulated.

Without a GPU nothing here has run on one: the emulator's word is the PTX ISA's, not a device's.
"""

import os
import shutil
import subprocess
import sys

import nvcc
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_no_worse

from floe_kernels.ops.experimental_two_source import two_source_grad, two_source_linear

compiles = pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))
# the address sanitizer does not follow fibers
HOST_FLAGS = (
    "-std=c++20", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fsanitize=undefined",
    "-fno-sanitize-recover=all",
)  # fmt: skip


def hopper():
    built = torch._C._dispatch_has_kernel_for_dispatch_key(two_source_linear.name(), "CUDA")
    return built and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


on_hopper = pytest.mark.skipif(not hopper(), reason="needs a Hopper GPU and a CUDA extension")


@compiles
@pytest.mark.skipif(nvcc.find_tool("cuobjdump") is None, reason="no cuobjdump")
def test_compiles_to_hopper_instructions():
    made = nvcc.compile("two_source_linear.cu")
    kernels = [k for k in made.named("two_source_gemm") if k.arch == "90a"]
    assert len(kernels) == 8  # two tiles, two layouts of weight, two dtypes
    for kernel in kernels:
        # 384 threads share 65536; setmaxnreg moves them between warpgroups, from 168 each
        assert kernel.registers == 168, kernel
        assert kernel.spills == 0, kernel
        assert kernel.shared == 0, kernel  # all of it dynamic: Tile::kSharedBytes
        ops = made.opcodes()["90a", kernel.symbol]
        # 1 to 4 blocks of depth, for the first source and for the others
        assert ops["HGMMA"] == 20, kernel
        assert ops["UTMALDG"] >= 3, kernel
        assert ops["UTMASTG"] == (4 if "256" in kernel.name else 2), kernel
        assert ops["SYNCS"] >= 16, kernel
        assert ops["STSM"] == 4 * ops["UTMASTG"], kernel
        assert ops["USETMAXREG"] == 2, kernel
        assert not ops["LDL"] + ops["STL"], kernel


@compiles
def test_no_product_waits_for_the_last():
    made = nvcc.compile("two_source_linear.cu")
    log = (made.path.parent / "log.txt").read_text()
    # C7510: wgmma serialised; C7508: setmaxnreg ignored; C7519: a fence that we forgot
    assert "warning" not in log
    assert "(C75" not in log


@compiles
def test_one_source_file_serves_every_gpu():
    made = nvcc.compile("two_source_linear.cu")
    older = [k for k in made.named("two_source_gemm") if k.arch == "80"]
    assert len(older) == 8
    assert all(kernel.registers < 16 for kernel in older)  # a trap, were it launched
    assert nvcc.link(made).stat().st_size


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", ["two_source_test.cpp", "two_source_ring_test.cpp"])
def test_on_an_emulated_cluster(source):
    program = nvcc.host_program(source, HOST_FLAGS)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert "no failures" in done.stdout


def linear_arguments(n, i, o, r, dtype, device, bias=True):
    def draw(*shape, terms=1):
        return (torch.randn(shape, device=device) / terms**0.5).to(dtype)

    return (
        draw(n, i), draw(n, r), draw(o, i, terms=i), draw(r, o, terms=r + 1),
        draw(o) if bias else None,
    )  # fmt: skip


def grad_arguments(n, i, o, r, e, dtype, device):
    def draw(*shape, terms=1):
        return (torch.randn(shape, device=device) / terms**0.5).to(dtype)

    narrow = draw(n, (r + e + 15) // 16 * 16)  # dz and dlogits as the backward packs them
    return (
        draw(n, o), narrow[:, :r], narrow[:, r : r + e], draw(o, i, terms=o),
        draw(r, i, terms=r + 1), draw(e, i, terms=e + 1),
    )  # fmt: skip


def as_one_linear(x, h, weight, lora_B, bias):
    return F.linear(torch.cat([x, h], 1), torch.cat([weight, lora_B.T], 1), bias)


def as_one_product(grad_out, dz, dlogits, weight, lora_A, router_weight):
    left = torch.cat([grad_out, dz, dlogits], 1)
    return left @ torch.cat([weight, lora_A, router_weight])


def check(operator, concatenated, args):
    truth = concatenated(*(None if a is None else a.double() for a in args))
    assert_no_worse(operator(*args), concatenated(*args), truth)


@pytest.mark.parametrize("n", [0, 1, 37])
@pytest.mark.parametrize(("r", "e"), [(0, 0), (16, 3)])
def test_any_device(n, r, e):
    check(two_source_linear, as_one_linear, linear_arguments(n, 40, 24, r, torch.float32, "cpu"))
    check(two_source_grad, as_one_product, grad_arguments(n, 40, 24, r, e, torch.float32, "cpu"))


def test_registration():
    torch.library.opcheck(
        two_source_linear, linear_arguments(5, 16, 8, 8, torch.float32, "cpu", bias=False)
    )
    torch.library.opcheck(two_source_grad, grad_arguments(5, 16, 8, 8, 4, torch.float32, "cpu"))


def test_is_not_part_of_the_package():
    name = "floe_kernels.ops.experimental_two_source"
    code = f"import sys, floe_kernels; print({name!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1024, 4096])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 129, 4096])
def test_on_hopper(n, d, dtype):
    for r in (0, 16, 40, 64, 128, 256):
        for bias in (False, True):
            args = linear_arguments(n, d, d, r, dtype, "cuda", bias)
            check(two_source_linear, as_one_linear, args)
        for e in (0, 4, 8):
            check(two_source_grad, as_one_product, grad_arguments(n, d, d, r, e, dtype, "cuda"))


@on_hopper
def test_ragged_on_hopper():
    for n, i, o, r in ((200, 8, 8, 8), (130, 72, 264, 24), (1000, 520, 136, 200)):
        args = linear_arguments(n, i, o, r, torch.bfloat16, "cuda")
        check(two_source_linear, as_one_linear, args)
        args = grad_arguments(n, i, o, r, 5, torch.bfloat16, "cuda")
        check(two_source_grad, as_one_product, args)


@on_hopper
def test_repeats_itself_and_never_waits_for_the_host():
    args = linear_arguments(3000, 1024, 1024, 128, torch.bfloat16, "cuda")
    first = two_source_linear(*args)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            again = two_source_linear(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, again)


@on_hopper
def test_rules_on_hopper():
    x, h, weight, lora_B, bias = linear_arguments(64, 64, 64, 12, torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match="h must start at a multiple of 16 bytes"):
        two_source_linear(x, h, weight, lora_B, bias)
    h, lora_B = h[:, :8].contiguous(), lora_B[:8]
    with pytest.raises(RuntimeError, match="weight must have the dtype of the first argument"):
        two_source_linear(x, h, weight.half(), lora_B, bias)
    with pytest.raises(RuntimeError, match="h and lora_B must fit"):
        two_source_linear(x, h, weight, lora_B[:7], bias)
    with pytest.raises(RuntimeError, match="x must have adjacent columns"):
        two_source_linear(x.T, h, weight, lora_B, bias)
    with pytest.raises(RuntimeError, match="bias must be 64 adjacent elements"):
        two_source_linear(x, h, weight, lora_B, bias[:8])
    with pytest.raises(RuntimeError, match="takes bfloat16 or float16"):
        two_source_linear(*(a.float() for a in (x, h, weight, lora_B)), None)
