"""``floe info``: what is installed, and which kernel serves which device."""

import importlib
import importlib.metadata
import os
import platform
import re
import sys

import torch

import floe_kernels
from floe_kernels.cli.progress import console
from floe_kernels.cli.tables import print_table
from floe_kernels.triton import RAN_ON

PACKAGES = (
    "torch", "triton", "transformers", "safetensors", "optuna", "peft", "matplotlib", "gguf",
)  # fmt: skip
DEVICES = ("CPU", "CUDA")
DEFAULT = "reference (plain torch)"


def command() -> None:
    """Show versions, the build, the CPU's instruction set, and every operator's kernels."""
    out = console()
    facts = [
        ("floe_kernels", floe_kernels.__version__),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in PACKAGES),
        *build_facts(),
        ("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("GPU", gpu()),
    ]
    print_table(out, ("", ""), facts, numbers=2)
    out.print()
    print_table(out, ("operator", *DEVICES), operator_rows(), numbers=3)
    out.print()
    for line in untried():
        out.print(line)


def version(package: str) -> str:
    """Return an installed package's version, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_facts() -> list[tuple[str, str]]:
    """Return what the native extensions say about themselves."""
    native = "floe_kernels._C" in sys.modules
    facts = [("native kernels", "built" if native else "none (FLOE_BUILD=none): plain torch")]
    try:
        module = importlib.import_module("floe_kernels._info")
    except ModuleNotFoundError:
        return facts
    facts += [(f"  {name}", value) for name, value in module.build_info().items()]
    return [*facts, ("CPU instruction set", instruction_set(module.cpu_isa(), module.cpu_isas()))]


def instruction_set(used: str, all_of_them: list[str]) -> str:
    """Say which instruction set the CPU kernels use, and which they leave alone.

    Example:
        >>> instruction_set("avx2", ["default", "avx2"])
        'avx2'
        >>> instruction_set("avx512_bf16", ["avx512_bf16", "amx"])
        'avx512_bf16; amx only if chosen: its kernels are compiled and emulated, not yet run'
    """
    if used == "amx" or "amx" not in all_of_them:
        return used
    return f"{used}; amx only if chosen: its kernels are compiled and emulated, not yet run"


def gpu() -> str:
    """Name the GPU that torch can use."""
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def operators() -> list[str]:
    """Return the names of all operators, without their namespace."""
    names = {name.partition("::")[2].partition(".")[0] for name in _registered()}
    return sorted(names)


def operator_rows() -> list[tuple[str, str, str]]:
    """Return a row for every operator: its name, and what serves each device.

    Example:
        >>> [row[0] for row in operator_rows() if row[0] == "topk_softmax"]
        ['topk_softmax']
    """
    rows = []
    for name in operators():
        dump = torch._C._dispatch_dump(f"floe::{name}")
        rows.append((name, _server(dump, "CPU"), _server(dump, "CUDA")))
    return rows


def untried() -> list[str]:
    """Say which GPU kernels are here without having run here, and which are never dispatched."""
    lines = []
    kernels = [name for name, _cpu, cuda in operator_rows() if cuda != DEFAULT]
    if kernels and not torch.cuda.is_available():
        lines.append(
            "There is no GPU here, so the CUDA kernels have not run on this machine; what is known "
            f"of them is that they compile, and their arithmetic: {', '.join(kernels)}."
        )
    trial = [name for name in operators() if name.startswith("experimental_")]
    if trial:
        lines.append(f"Registered, tested and never dispatched: {', '.join(trial)}.")
    return lines


def _registered() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("floe::")]


def _server(dump: str, device: str) -> str:
    """Find in a dispatcher's dump what serves a device: a file of ours, or the default."""
    found = re.search(rf"^{device}: registered at (\S+)", dump, re.MULTILINE)
    if found is None:
        return DEFAULT
    path = found.group(1)
    for folder in ("csrc", "floe_kernels"):
        if f"{folder}/" in path:
            return folder + path.rpartition(folder)[2].partition(":")[0]
    # registered from Python, where torch notes its own file
    if device != "CUDA":
        return "Python"
    return "Triton" if RAN_ON else "Triton, compiled, not yet run"
