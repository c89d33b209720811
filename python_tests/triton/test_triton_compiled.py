"""Every kernel compiles, ahead of time, for the GPUs we name: no spills, shared memory in bounds.

What a compiler says is no proof of speed, and a kernel that only compiled has not run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# the most shared memory one program may ask for, and the most registers of one thread
LIMITS = {"80": (163 << 10, 255), "90": (227 << 10, 255), "gfx942": (64 << 10, 512)}
WIDE = {  # the kernels whose products must reach Hopper's widest instruction
    "shrink_route_kernel", "shrink_part_kernel", "gate_kernel", "gate_part_kernel",
    "rank_update_kernel", "weight_grad_kernel", "grad_square_kernel",
}  # fmt: skip


@pytest.fixture(scope="module", params=LIMITS)
def compiled(request):
    # a process of its own: this one may have chosen the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), request.param], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_fits(compiled):
    arch, rows = compiled
    shared, registers = LIMITS[arch]
    assert len({row["kernel"] for row in rows}) >= 13
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= shared, row
        assert row["registers"] <= registers, row


def test_wide_products_use_wgmma(compiled):
    arch, rows = compiled
    if arch != "90":
        pytest.skip("an instruction of sm_90")
    narrow = [row for row in rows if "float32" not in row["call"].split()[-1:]]
    for kernel in WIDE:
        assert all(row["wgmma"] for row in narrow if row["kernel"] == kernel), kernel
        assert any(row["kernel"] == kernel for row in narrow), kernel


def test_token_counts_share_kernels(compiled):
    # a kernel compiled anew for a batch of another length costs seconds in the middle of training
    _, rows = compiled
    assert {row["call"] for row in rows}.isdisjoint({"odd tokens", "fewer tokens"})
    assert {row["call"] for row in rows} > {"common", "few tokens"}
