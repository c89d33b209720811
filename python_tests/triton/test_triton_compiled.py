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
    "rank_update_kernel", "weight_grad_kernel", "grad_square_kernel", "shared_shrink_route_kernel",
    "shared_shrink_part_kernel", "shared_update_kernel", "shared_weight_grad_kernel",
}  # fmt: skip


# the Triton that is installed, and the oldest that kernels run under, where `make test` puts it
VERSIONS = {"installed": None, "3.6": Path(sys.prefix, "triton-3.6")}


@pytest.fixture(scope="module", params=[(v, a) for v in VERSIONS for a in LIMITS], ids="-".join)
def compiled(request):
    version, arch = request.param
    folder = VERSIONS[version]
    if folder is not None and not folder.is_dir():
        pytest.skip(f"there is no Triton {version} beside the installed one: make test brings it")
    # a process of its own: this one may have chosen the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [*([str(folder)] if folder else []), str(SCRIPT.parents[2]), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, *rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert folder is None or first["triton"].startswith(version)
    return arch, rows


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
