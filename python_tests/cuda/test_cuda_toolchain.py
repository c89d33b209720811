"""The module that the tests of CUDA C++ compile with."""

from pathlib import Path

import nvcc
import pytest

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 2.273 ms
"""


def test_reads_what_ptxas_says():
    assert nvcc.parse(LOG) == [nvcc.Kernel("90a", "_Z1kPf", "k(float*)", 40, 16, 2048)]


def test_a_new_form_of_the_log_is_noticed():
    with pytest.raises(AssertionError, match="new form"):
        nvcc.parse(LOG.replace("spill stores", "stored"))


@pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))
def test_compiles_once_and_disassembles(tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc, "CACHE", tmp_path)
    source = tmp_path / "add.cu"
    text = "__global__ void add(float* p) { p[threadIdx.x] += p[threadIdx.x + 32]; }\n"
    source.write_text(text)
    first = nvcc.compile(source)
    assert {kernel.arch for kernel in first.named("add")} == {"80", "90a"}
    assert all(count["FADD"] == 1 for count in first.opcodes().values())
    assert nvcc.link(first).stat().st_size
    made = first.path.stat().st_mtime_ns
    nvcc.compile.cache_clear()  # as another process would find it
    assert nvcc.compile(source).path.stat().st_mtime_ns == made
    source.write_text(text.replace("+ 32", "* 2"))
    nvcc.compile.cache_clear()
    assert nvcc.compile(source).path.stat().st_mtime_ns > made


def test_sources_are_found_by_name():
    names = {path.name for path in nvcc._headers(Path(nvcc.CSRC / "cpu" / "routing.cpp"), set())}
    assert names == {"routing.cpp", "routing.h"}
