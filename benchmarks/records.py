"""One JSON line a measurement: where, with what, of which commit.

The machine is a CPU's or a GPU's model and how many cores it lends; never a name of a host.
"""

import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).parent.parent
PACKAGES = ("triton", "transformers", "peft", "opacus", "backpack-for-pytorch", "kronfluence")


@cache
def cpu_model() -> str:
    """Return the processor's name and its vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    units = [
        u for u in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if u in fields.get("flags", "")
    ]
    return f"{name} ({', '.join(units)})" if units else name


def machine(device: str) -> dict[str, Any]:
    """Return what the times were taken on."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"machine": properties.name, "cores": properties.multi_processor_count}
    return {"machine": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


@cache
def versions() -> dict[str, str]:
    """Return the versions of what is installed of the packages that matter."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """Return the commit, with a + if the library's files differ from it; "unknown" outside git.

    FLOE_BENCH_COMMIT names it on a machine to which only the files were copied.
    """
    if "FLOE_BENCH_COMMIT" in os.environ:
        return os.environ["FLOE_BENCH_COMMIT"]
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "floe_kernels", "csrc", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@cache
def kernels(device: str) -> list[str]:
    """Return our operators that have a kernel for the device; the others run plain PyTorch."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return sorted(n.removeprefix("floe::") for n in names if n.startswith("floe::"))


def complete(line: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the record with schema, machine, versions and commit in front."""
    head = {"schema": SCHEMA, "device": device, **machine(device)}
    return {**head, "versions": versions(), "commit": commit(), "kernels": kernels(device), **line}


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a results file and see to it that they are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
