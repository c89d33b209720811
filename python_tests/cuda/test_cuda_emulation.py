"""The CUDA kernels' source, compiled for the CPU and run there lane by lane: see emulation.h.

Every index and every fragment of a tensor core's product, under AddressSanitizer, against float64.
"""

import functools
import os
import shlex
import shutil
import subprocess

import nvcc
import pytest

PROGRAMS = ["routing_test.cpp", "grad_square_test.cpp", "linear_grad_square_test.cpp"]
SHARED = 163 << 10  # the most that a block may have on sm_80


@functools.cache
def why_not():
    """Return why nothing runs here; AddressSanitizer and ucontext are GCC's and Linux's."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@functools.cache
def run(program):
    path = nvcc.host_program(program)
    return subprocess.run([str(path)], capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("program", PROGRAMS)
def test_equals_plain_loops(program):
    done = run(program)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith("0 failures\n")


@pytest.mark.parametrize("program", PROGRAMS[1:])
def test_shared_memory_fits(program):
    lines = [line for line in run(program).stdout.splitlines() if "bytes shared" in line]
    assert lines
    for line in lines:
        assert int(line.split(" bytes shared")[0].split()[-1]) <= SHARED, line
