"""Builds the optional native extensions; the package works, slower, without them.

FLOE_BUILD=auto|cpu|cuda|none   what to compile; auto is cuda where nvcc and a CUDA torch agree,
                                cpu where there is a C++20 compiler, and none otherwise
CXX, MAX_JOBS, TORCH_CUDA_ARCH_LIST  are PyTorch's own and mean what they mean there; without the
                                last, CUDA C++ is compiled for sm_80, sm_90a, and what is newer

``_C`` holds the operators' kernels: LibTorch stable ABI, so one binary for every torch >= 2.10
and every CPython >= 3.10. ``_info`` (pybind11) reports on the build, and is left out of a wheel
that is tagged abi3, which pybind11 cannot be.
"""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

TORCH_TARGET_VERSION = "0x020a000000000000"
FLAGS = ["-O3", "-std=c++20", "-g0"]
#: sm_80 runs on 8.x; sm_90a has Hopper's own instructions, which no other GPU runs; the PTX is
#: what a newer GPU's driver compiles.
GENCODES = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a",
            "arch=compute_90,code=compute_90"]  # fmt: skip


def say(line: str) -> None:
    print(f"floe_kernels: {line}", file=sys.stderr)


def sources(*folders: str) -> list[str]:
    files = (p for f in folders for p in Path("csrc", f).glob("*") if p.suffix in (".cpp", ".cu"))
    return sorted(str(p) for p in files)


def why_no_cpp() -> str | None:
    """Return why C++20 against Python's headers does not compile here, or None where it does."""
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-fsyntax-only"]
    command = [*compiler, f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
    probe = "#include <Python.h>\n#include <concepts>\n"
    try:
        done = subprocess.run(command, input=probe, capture_output=True, text=True)
    except OSError:
        return f"no C++ compiler ({compiler[0]}) found"
    if done.returncode:
        return f"{compiler[0]} cannot compile C++20 with Python's headers"
    return None


def why_no_cuda() -> str | None:
    """Return why nvcc and torch are not of one major version of CUDA, or None where they are."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    if not CUDA_HOME:
        return "nvcc was found neither in CUDA_HOME nor on PATH"
    try:
        command = [f"{CUDA_HOME}/bin/nvcc", "--version"]
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return f"there is no nvcc in {CUDA_HOME}/bin"
    places = "include/cuda_runtime.h", "targets/*/include/cuda_runtime.h"  # conda has the latter
    if not any(header for place in places for header in Path(CUDA_HOME).glob(place)):
        return f"{CUDA_HOME} holds nvcc but not its headers: CUDA_HOME must name the toolkit"
    if f"release {torch.version.cuda.partition('.')[0]}." not in said:
        return f"torch is built for CUDA {torch.version.cuda}, and nvcc is of another major version"
    return None


def choose(build: str) -> str:
    """Turn FLOE_BUILD into cpu, cuda or none, or end with the reason why that cannot be."""
    if build not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"FLOE_BUILD must be auto, cpu, cuda or none, got {build!r}")
    if build == "none":
        return build
    why = why_no_cpp()
    if build == "auto":
        if why:
            say(f"{why}, so building with FLOE_BUILD=none: plain PyTorch does the work")
            return "none"
        return "cpu" if why_no_cuda() else "cuda"
    if why:
        raise SystemExit(f"FLOE_BUILD={build} needs a C++20 compiler, but {why}")
    if build == "cuda" and (why := why_no_cuda()):
        raise SystemExit(f"FLOE_BUILD=cuda needs nvcc and a torch that agree, but {why}")
    return build


def kernels(build: str) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    flags = [*FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    flags += ["-DUSE_CUDA"] * (build == "cuda")  # opens the stream functions of the stable ABI
    nvcc = ["-lineinfo", *(flag for flag in flags if flag != "-g0")]  # which nvcc does not know
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # whose flags torch adds itself
        nvcc += [f"-gencode={gencode}" for gencode in GENCODES]
    return (CUDAExtension if build == "cuda" else CppExtension)(
        name="floe_kernels._C",
        sources=sources("bindings", "cpu", *["cuda"] * (build == "cuda")),
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={"cxx": flags, "nvcc": nvcc},
        py_limited_api=True,
    )


def info(build: str) -> Extension | None:
    try:
        import pybind11
    except ImportError:
        say("pybind11 is not installed, so floe_kernels._info is left out")
        return None
    facts = {"BUILD": build, "FLAGS": " ".join(FLAGS), "TORCH_TARGET": TORCH_TARGET_VERSION}
    return Extension(
        name="floe_kernels._info",
        sources=sources("info"),
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        define_macros=[(f"FLOE_{name}", json.dumps(value)) for name, value in facts.items()],
        extra_compile_args=["-O2", "-std=c++20", "-g0", "-fvisibility=hidden"],
        language="c++",
        optional=True,
    )


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        """PyTorch's build, in which ``_info`` may fail and an abi3 wheel goes without it."""

        def finalize_options(self) -> None:
            super().finalize_options()
            if "py_limited_api" in self.distribution.get_option_dict("bdist_wheel"):
                self.extensions = [e for e in self.extensions if e.py_limited_api]

        def build_extension(self, ext: Extension) -> None:
            if ext.optional:
                version = json.dumps(self.distribution.get_version())
                ext.define_macros.append(("FLOE_VERSION", version))
            try:
                super().build_extension(ext)
            except Exception as error:  # ninja's failure is a bare RuntimeError
                if not ext.optional:
                    raise
                say(f"{ext.name} did not build and is left out: {error}".splitlines()[0])

    return BuildKernels


build = choose(os.environ.get("FLOE_BUILD", "auto"))
if build == "none":
    setup()  # without importing torch
else:
    extensions = [kernels(build), info(build)]
    setup(
        ext_modules=[e for e in extensions if e],
        cmdclass={"build_ext": build_command()},
    )
