"""What setup.py would give nvcc; a torch that is built for CUDA is pretended to be there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nvcc
import pytest

# runs setup.py up to the build, which it prints instead of doing; FLOE_BUILD is in the environment
PROGRAM = """
import json, sys, setuptools, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = sys.argv.pop(1) or None, sys.argv.pop(1) or None

def show(ext_modules, **_):
    kernels = ext_modules[0]
    print(json.dumps([kernels.sources, kernels.extra_compile_args]))

setuptools.setup = show
sys.argv = ["setup.py", "build_ext"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


def setup(cuda, home, build="cuda", **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, cuda, home], cwd=nvcc.ROOT, capture_output=True, text=True,
        env=clean | {"FLOE_BUILD": build} | environment,
    )  # fmt: skip


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit of CUDA 13 of which only the version and a header are asked."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    tool = tmp_path / "bin" / "nvcc"
    tool.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    tool.chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize("build", ["cuda", "auto"])
def test_builds_what_is_in_csrc_cuda(toolkit, build):
    done = setup("13.0", toolkit, build)
    assert done.returncode == 0, done.stderr
    sources, flags = json.loads(done.stdout)
    named = {path for path in sources if path.startswith("csrc/cuda/")}
    assert named == {f"csrc/cuda/{path.name}" for path in (nvcc.CSRC / "cuda").glob("*.cu")}
    assert not [path for path in sources if "tests" in path]
    assert "-DUSE_CUDA" in flags["nvcc"]
    assert "-g0" not in flags["nvcc"]
    gencodes = re.findall(r",code=(\w+)", " ".join(flags["nvcc"]))
    assert gencodes == ["sm_80", "sm_90a", "compute_90"]


def test_the_list_of_architectures_is_torchs(toolkit):
    _, flags = json.loads(setup("13.0", toolkit, TORCH_CUDA_ARCH_LIST="8.0").stdout)
    assert not [flag for flag in flags["nvcc"] if "gencode" in flag]


@pytest.mark.parametrize(
    ("cuda", "has_toolkit", "says"),
    [
        ("", True, r"torch \S+ is not a CUDA build"),
        ("13.0", False, "nvcc was found neither in CUDA_HOME nor on PATH"),
        ("12.6", True, "torch is built for CUDA 12.6, and nvcc is of another major version"),
    ],
)
def test_says_why_cuda_cannot_be(toolkit, cuda, has_toolkit, says):
    done = setup(cuda, toolkit if has_toolkit else "")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]  # a CUDA torch without a GPU warns before it
    assert re.fullmatch(f"FLOE_BUILD=cuda needs nvcc and a torch that agree, but {says}", last)


def test_a_link_to_nvcc_is_no_toolkit(toolkit):
    Path(toolkit, "include", "cuda_runtime.h").unlink()
    assert f"{toolkit} holds nvcc but not its headers" in setup("13.0", toolkit).stderr
    headers = Path(toolkit, "targets", "x86_64-linux", "include")  # as conda has it
    headers.mkdir(parents=True)
    (headers / "cuda_runtime.h").touch()
    assert setup("13.0", toolkit).returncode == 0


def test_auto_stays_without_cuda_where_torch_has_none(toolkit):
    sources, _ = json.loads(setup("", toolkit, "auto").stdout)
    assert not [path for path in sources if path.endswith(".cu")]
