"""Compile, for a GPU that need not be here, every kernel that a set of calls would launch.

    python compile_kernels.py 80|90|gfx942 [only]

The calls run on meta tensors with the launch itself recorded instead of done, so what is compiled
is what the launchers choose at real sizes. Prints one JSON object a line, the first with Triton's
version. Run without TRITON_INTERPRET, which a process cannot change its mind about; hence a program
of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
POINTERS = {
    BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip

launches = []
JITFunction.__getitem__ = lambda self, grid: (
    lambda *args, **kwargs: launches.append((self, grid, args, kwargs))
)


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def layer(n, i, o, ranks, k, dtype=BF16, weights=BF16, mask=False, p=0.0, shared=False, aux=False):
    """Record a forward and a backward of the adapted linear."""
    from floe_kernels.triton import moe_lora_backward, moe_lora_forward

    r, e = sum(ranks), len(ranks)
    c = ranks[0] if shared else r
    x, weight = meta(n, i, dtype=dtype), meta(o, i, dtype=dtype)
    lora = [meta(*shape, dtype=weights) for shape in ((c, i), (r, o), (e, i))]
    scaling, token_mask = meta(r, dtype=FP32), meta(n, dtype=torch.bool) if mask else None
    seed = meta(dtype=torch.int64) if p else None
    shape = (ranks, shared, k > 1, token_mask, p, seed)
    moe_lora_forward.moe_lora_linear(
        x, weight, None, *lora, scaling, ranks, k, shared, k > 1, token_mask, p, seed
    )
    saved = (meta(n, c, dtype=dtype), meta(n, k, dtype=torch.int64), meta(n, k, dtype=FP32))
    moe_lora_backward.moe_lora_backward(
        meta(n, o, dtype=dtype), x, weight, *lora, scaling, *saved, meta(n, e, dtype=FP32), *shape,
        meta(2, dtype=FP32) if aux else None, [True] * 4, None,
    )  # fmt: skip


def shared(n, i, outs, r, weights=BF16, mask=False):
    """Record a forward and a backward of linears that take one x, with 8 experts each."""
    from floe_kernels.reference.moe_lora import Adapter
    from floe_kernels.reference.shared_inputs import Sibling
    from floe_kernels.triton import shared_inputs

    x, token_mask = meta(n, i), meta(n, dtype=torch.bool) if mask else None
    siblings = []
    for o in outs:
        lora = [meta(*shape, dtype=weights) for shape in ((r, i), (r, o), (8, i))]
        config = (meta(r, dtype=FP32), [r // 8] * 8, 2, False, True, 0.0, None, None)
        siblings.append(Sibling(meta(o, i), None, *lora, *config))
    shared_inputs.moe_lora_shared_linear(x, siblings, token_mask)
    routing = meta(n, 2, dtype=torch.int64), meta(n, 2, dtype=FP32), meta(n, 8, dtype=FP32)
    saved = [Adapter(meta(n, r), meta(n, r), *routing) for _ in outs]
    shared_inputs.moe_lora_shared_backward(
        [meta(n, o) for o in outs], x, siblings, saved, token_mask, [True] * (1 + 3 * len(outs))
    )


def squares(r, reduce, dtype=BF16, scale=True, samples=8):
    """Record per-sample squares."""
    from floe_kernels.triton import grad_square

    x, offsets = meta(8192, 4096, dtype=dtype), meta(samples + 1, dtype=torch.int64)
    scales = meta(samples, dtype=FP32) if scale else None
    grad_square.segment_grad_square(meta(8192, r, dtype=dtype), x, offsets, scales, reduce)


def norms(samples, dtype=BF16):
    """Record the norms of a frozen linear's per-sample gradients."""
    from floe_kernels.triton import grad_square

    both = (meta(8192, 4096, dtype=dtype) for _ in "gx")
    grad_square.linear_grad_square(*both, meta(samples + 1, dtype=torch.int64), None)


def routing():
    """Record routing alone."""
    from floe_kernels.triton import routing

    routing.topk_softmax(meta(8192, 64, dtype=FP32), 8, True)


CALLS = {
    "common": lambda: layer(8192, 4096, 4096, [16] * 8, 2),
    "float32 adapters": lambda: layer(
        8192, 4096, 4096, [16] * 8, 2, weights=FP32, mask=True, p=0.1, aux=True
    ),
    "odd tokens": lambda: layer(8189, 4096, 4096, [16] * 8, 2),
    "few tokens": lambda: layer(1024, 4096, 4096, [16] * 8, 2),
    "one token": lambda: layer(1, 4096, 4096, [16] * 8, 2),
    "fewer tokens": lambda: layer(999, 4096, 4096, [16] * 8, 2),
    "256 columns": lambda: layer(8192, 4096, 4096, [64] * 4, 2, weights=FP32, p=0.1),
    "512 columns": lambda: layer(8192, 4096, 4096, [64] * 8, 2),
    "many experts": lambda: layer(8192, 4096, 4096, [2] * 64, 2),
    "many float32 experts": lambda: layer(8192, 4096, 4096, [2] * 64, 2, weights=FP32),
    "float16": lambda: layer(8192, 1024, 1024, [8] * 4, 1, dtype=FP16, weights=FP32),
    "float32": lambda: layer(8192, 1024, 1024, [16] * 8, 2, dtype=FP32, weights=FP32),
    "shared": lambda: layer(8192, 4096, 4096, [16] * 4, 4, shared=True, aux=True),
    "grouped": lambda: layer(8192, 4096, 4096, [64] * 64, 2, aux=True),
    "grouped 16": lambda: layer(8192, 4096, 4096, [16] * 64, 2, weights=FP32, mask=True, p=0.1),
    "grouped 128": lambda: layer(16384, 4096, 4096, [128] * 8, 1, p=0.1),
    "grouped float32": lambda: layer(8192, 4096, 4096, [32] * 64, 2, dtype=FP32, weights=FP32),
    "shared x": lambda: shared(8192, 4096, [4096, 1024, 1024], 128),
    "few tokens of a shared x": lambda: shared(1024, 4096, [4096, 1024, 1024], 128),
    "float32 adapters of a shared x": lambda: shared(
        8192, 4096, [4096, 1024, 1024], 128, weights=FP32, mask=True
    ),
    "square": lambda: squares(128, "element"),
    "square 16": lambda: squares(16, "matrix", scale=False),
    "square float32": lambda: squares(128, "rank", dtype=FP32),
    "square of one sample": lambda: squares(128, "element", samples=1),
    "norms": lambda: norms(4),
    "norms of short samples": lambda: norms(64),
    "norms of short samples, float32": lambda: norms(64, dtype=FP32),
    "routing": routing,
}


def source(kernel, args, kwargs):
    """Return what the launch would compile: types, constants and known divisors."""
    values = dict(zip(kernel.arg_names, args)) | {  # noqa: B905
        name: value for name, value in kwargs.items() if name not in OPTIONS
    }
    signature, constants, attributes = {}, {}, {}

    def kind(value, path, param):
        if isinstance(value, tuple):
            return tuple(kind(item, (*path, i), param) for i, item in enumerate(value))
        fixed = param.is_constexpr or value is None or isinstance(value, bool)
        if fixed or (type(value) is int and value == 1 and not param.do_not_specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        pointer = isinstance(value, torch.Tensor)
        if pointer or (value % 16 == 0 and not param.do_not_specialize):
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype] if pointer else "i32" if value < 2**31 else "i64"

    for place, param in enumerate(kernel.params):
        signature[param.name] = kind(values[param.name], (place,), param)
    return ASTSource(kernel, signature, constants, attributes)


def nvidia(compiled, arch):
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/kernel.cubin", "wb") as file:
            file.write(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        frame, spills = int(re.search(r"STACK:(\d+)", used).group(1)), 0
        if frame:  # a frame is not always a spill: ask the assembler
            with open(f"{folder}/kernel.ptx", "w") as file:
                file.write(compiled.asm["ptx"])
            target = "sm_90a" if arch == 90 else f"sm_{arch}"
            command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name]
            said = subprocess.run(
                [*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=True
            ).stderr
            spills = int(re.search(r"(\d+) bytes spill stores", said).group(1))
    return {
        "registers": int(re.search(r"REG:(\d+)", used).group(1)),
        "spills": spills,
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
    }


def amd(compiled):
    text = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    # a scalar register spills into a lane of a vector register, not to memory: shown, not counted
    return {
        "registers": number("vgpr_count"), "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"), "wgmma": False,
    }  # fmt: skip


def main(arch, only=None):
    from floe_kernels.triton import launch, shared_inputs

    target = GPUTarget("hip", "gfx942", 64) if arch == "gfx942" else GPUTarget("cuda", arch, 32)
    # what a launcher finds on such a device
    launch.most_stages = lambda device: 2 if arch == "gfx942" else 4
    for module in (launch, shared_inputs):
        module.products_read_memory = lambda device: arch == 90
    print(json.dumps({"triton": triton.__version__}), flush=True)
    seen = set()
    for call, record in CALLS.items():
        if only not in (None, call):
            continue
        launches.clear()
        record()
        for kernel, grid, args, kwargs in launches:
            what = source(kernel, args, kwargs)
            chosen = {name: kwargs[name] for name in OPTIONS if name in kwargs}
            key = (what.hash(), str(sorted(chosen.items())))
            if key in seen:
                continue
            seen.add(key)
            compiled = triton.compile(what, target=target, options=chosen)
            row = {
                "call": call, "kernel": kernel.__name__, "grid": list(grid),
                "shared": compiled.metadata.shared,
            }  # fmt: skip
            row |= amd(compiled) if arch == "gfx942" else nvidia(compiled, arch)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(sys.argv[1] if sys.argv[1] == "gfx942" else int(sys.argv[1]), *sys.argv[2:])
