"""Compile CUDA C++ for GPUs that need not be here, and read what the compiler says of each kernel.

What it makes stays in ``build/nvcc`` until a source, a header that it includes, or a tool changes;
a second process waits for the first instead of compiling again. Nothing made here is ever loaded.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "nvcc"
TORCH_TARGET = "0x020a000000000000"  # as in setup.py
FLAGS = (
    "-std=c++20", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-Xcompiler=-fPIC",
    "-Xptxas=-v,-warn-spills",
)  # fmt: skip
HOST_FLAGS = (
    "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
)  # fmt: skip


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    arch: str  #: "80", "90a"
    symbol: str
    name: str  #: demangled, with its template arguments
    registers: int  #: of one thread
    spills: int  #: bytes, stores and loads
    shared: int  #: static shared memory in bytes; the dynamic part is the launcher's to say


class Compiled(NamedTuple):
    """One object file, and its kernels."""

    path: Path
    kernels: list[Kernel]

    def named(self, word: str) -> list[Kernel]:
        """Return the kernels whose demangled name has ``word``; at least one, or it fails."""
        found = [kernel for kernel in self.kernels if word in kernel.name]
        assert found, f"no kernel is named {word} in {self.path.name}"
        return found

    def opcodes(self) -> dict[tuple[str, str], Counter]:
        """Return, by (arch, symbol), how often each machine instruction stands in the kernel.

        Instructions are named without their modifiers: HMMA, LDGSTS, LDSM, HGMMA.
        """
        return _opcodes(self.path, self.path.stat().st_mtime_ns)


def _run(command, **kwargs):
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-6000:]}"
    )
    return done.stdout + done.stderr


@functools.cache
def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((place for place in places if place and Path(place).exists()), None)


@functools.cache
def why_not() -> str | None:
    """Return why nothing can be compiled here, or None where it can."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc is not installed"
    CACHE.mkdir(parents=True, exist_ok=True)
    probe = CACHE / "probe.cu"
    if not probe.exists():
        probe.write_text("#include <concepts>\n__global__ void probe() {}\n")
    try:
        compile(probe, archs=("90a",))
    except AssertionError:
        return f"{nvcc} does not compile C++20 for sm_90a with the C++ compiler found here"
    return None


@functools.cache
def find_tool(name: str) -> str | None:
    """Return the path of cuobjdump or nvdisasm: Triton's wheel has them, as has a full toolkit."""
    triton = importlib.util.find_spec("triton")
    homes = [Path(p) / "backends/nvidia/bin" for p in triton.submodule_search_locations or []] if (
        triton
    ) else []  # fmt: skip
    homes += [Path(find_nvcc() or "/").parent]
    return next((str(home / name) for home in homes if (home / name).exists()), None)


def _headers(source: Path, seen: set[Path]) -> set[Path]:
    """Return the source and every file of csrc that it includes."""
    if source not in seen:
        seen.add(source)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', source.read_text(), re.M):
            if (CSRC / name).exists():
                _headers(CSRC / name, seen)
    return seen


@contextlib.contextmanager
def _made(name: str, command: list[str], sources: list[Path]):
    """Yield (folder, stale), the folder locked; what is not stale need not be made again."""
    key = hashlib.sha256(" ".join(command).encode())
    for path in sorted(set().union(*(_headers(source, set()) for source in sources))):
        key.update(path.read_bytes())
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / "key"
        stale = not stamp.exists() or stamp.read_text() != key.hexdigest()
        if stale:
            stamp.unlink(missing_ok=True)
        yield folder, stale
        stamp.write_text(key.hexdigest())


@functools.cache
def _version(tool: str) -> str:
    return _run([tool, "--version"])


@functools.cache
def compile(
    source: Path, archs: tuple[str, ...] = ("80", "90a"), flags: tuple[str, ...] = ()
) -> Compiled:
    """Compile one .cu file, a path or its name in csrc/cuda, into an object file."""
    source = CSRC / "cuda" / source
    nvcc = find_nvcc()
    assert nvcc, "ask why_not() first"
    command = [nvcc, *FLAGS, *flags, f"-I{CSRC}", *(f"-I{path}" for path in include_paths())]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    name = "-".join([source.stem, *archs])
    with _made(name, [*command, _version(nvcc), torch.__version__], [source]) as (folder, stale):
        out, log = folder / f"{source.stem}.o", folder / "log.txt"
        if stale:
            log.write_text(_run([*command, "-c", source, "-o", out]))
        return Compiled(out, parse(log.read_text()))


def parse(log: str) -> list[Kernel]:
    """Read the kernels out of what ``ptxas -v`` prints."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n"
        r"(?:.*Function properties for.*\n)?"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers(.*)\n",
        log,
    )
    assert len(found) == log.count("Compiling entry function"), "ptxas -v has a new form"
    symbols = "\n".join(symbol for symbol, *_ in found)
    names = _run(["c++filt"], input=symbols).splitlines() if found else []
    kernels = []
    for (symbol, arch, stores, loads, registers, rest), name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                arch, symbol, name, int(registers), int(stores) + int(loads),
                int(shared[1]) if shared else 0,
            )
        )  # fmt: skip
    return kernels


def link(*objects: Compiled) -> Path:
    """Link into a shared object, torch's and the streams' symbols undefined; it never loads."""
    nvcc = find_nvcc()
    paths = [made.path for made in objects]
    stamps = [f"{path} {path.stat().st_mtime_ns}" for path in paths]
    name = "lib-" + "-".join(path.stem for path in paths)
    with _made(name, [nvcc, *stamps], []) as (folder, stale):
        out = folder / "lib.so"
        if stale:
            _run([nvcc, "-shared", *paths, "-o", out])
        return out


@functools.cache
def _opcodes(path: Path, _stamp: int) -> dict[tuple[str, str], Counter]:
    counts: dict[tuple[str, str], Counter] = {}
    arch = ""
    # cuobjdump calls the nvdisasm that stands beside it
    for line in _run([find_tool("cuobjdump"), "-sass", path]).splitlines():
        if match := re.search(r"code for sm_(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            here = counts.setdefault((arch, match[1]), Counter())
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line):
            here[match[1]] += 1
    return counts


@functools.cache
def host_program(source: Path, flags: tuple[str, ...] = HOST_FLAGS) -> Path:
    """Compile one .cpp file, a path or its name in csrc/cuda/tests, into a program for the CPU."""
    source = CSRC / "cuda" / "tests" / source
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *flags, f"-I{CSRC}"]
    with _made(source.stem, [*command, _version(compiler[0])], [source]) as (folder, stale):
        out = folder / "program"
        if stale:
            _run([*command, source, "-o", out])
        return out
