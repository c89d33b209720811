"""_info: what was built, and which instruction set the kernels use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import floe_kernels

_info = pytest.importorskip(
    "floe_kernels._info", reason="the native extensions are not built (FLOE_BUILD=none)"
)
NAMES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]


@pytest.fixture(autouse=True)
def restore_isa():
    before = _info.cpu_isa()
    yield
    _info.set_cpu_isa(before)


def test_build_info_describes_this_build():
    info = _info.build_info()
    assert info["version"] == floe_kernels.__version__, "built from another version: run make dev"
    assert info["build"] in ("cpu", "cuda")
    assert int(info["cxx_standard"]) >= 202002
    assert "-O3" in info["flags"]
    assert info["torch_target_version"] == "0x020a000000000000"
    assert info["compiler"].partition(" ")[2]


def test_best_isa_is_the_one_linux_reports():
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if "fpu" not in flags:
        pytest.skip("not Linux on x86-64")
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16", "amx_int8"},
    }
    best = "default"
    for name, features in needs.items():
        if not features <= flags:
            break
        best = name
    assert _info.cpu_isas() == NAMES[: NAMES.index(best) + 1]


def test_amx_is_never_chosen_by_itself():
    code = "import floe_kernels; from floe_kernels import _info; print(_info.cpu_isa())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == [name for name in _info.cpu_isas() if name != "amx"][-1]


def test_every_isa_of_this_cpu_can_be_chosen():
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = floe_kernels.functional.topk_softmax(z, 2)
    for name in _info.cpu_isas():
        _info.set_cpu_isa(name)
        assert _info.cpu_isa() == name
        torch.testing.assert_close(floe_kernels.functional.topk_softmax(z, 2), expected)


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_says_which_can_be_chosen(name):
    before = _info.cpu_isa()
    with pytest.raises(ValueError, match=rf"this CPU \(default.*\), got '{name}'"):
        _info.set_cpu_isa(name)
    assert _info.cpu_isa() == before
