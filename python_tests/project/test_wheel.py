"""What a wheel holds: the package, its typing and licence, the kernels, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import smoke
import torch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The checkout as git has it, with as little C++ as makes an extension, and what a developer's
    build leaves in the package."""
    tree = tmp_path_factory.mktemp("tree")
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "floe_kernels", tree / "floe_kernels", ignore=left_out)
    for folder in ("csrc/bindings", "csrc/info"):
        shutil.copytree(ROOT / folder, tree / folder)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in",
                 "csrc/cpu/isa.h", "csrc/cpu/isa.cpp", "python_tests/conftest.py",
                 "benchmarks/run.py", "examples/plain_loop.py"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    (tree / "floe_kernels" / "_info.cpython-311-x86_64-linux-gnu.so").touch()
    (tree / "floe_kernels" / "_C.abi3.so").touch()
    return tree


def build(tree, kind, *arguments):
    out = tree / f"dist-{kind}"
    shutil.rmtree(tree / "build", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", f"--dist-dir={out}", *arguments],
        cwd=tree, capture_output=True, text=True, env={**os.environ, "FLOE_BUILD": kind},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [wheel] = out.iterdir()
    return wheel


def test_without_a_build_it_is_pure(tree):
    wheel = build(tree, "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert_whole(wheel, native=set())


@pytest.mark.skipif(COMPILER is None, reason="no compiler")
def test_with_kernels_it_is_abi3_and_without_info(tree):
    wheel = build(tree, "cpu", "--py-limited-api=cp310")
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name)
    assert_whole(wheel, native={"floe_kernels/_C.abi3.so"})


def assert_whole(wheel, native):
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
        sizes = {info.filename: info.file_size for info in opened.infolist()}
    assert {name for name in names if name.endswith(".so")} == native
    assert all(sizes[name] for name in native), "the build's own, not what lay there"
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "floe_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    about = {name for name in names if ".dist-info/" in name}
    assert {name.partition("/")[2] for name in about} >= {"licenses/LICENSE", "METADATA"}
    rest = names - native - sources - about
    assert rest == {"floe_kernels/py.typed", "floe_kernels/_info.pyi"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_smoke_test_passes_here(dtype):
    """What ``make smoke`` asks of a wheel, asked of the checkout."""
    smoke.check_layer(dtype)


def test_the_smoke_test_can_fail(monkeypatch):
    monkeypatch.setattr(smoke.fk.FusedMoELoRA, "forward", lambda self, x: self.base_layer(x) + 0 * (
        self.lora_A.sum() + self.lora_B.sum() + self.router.weight.sum()))  # fmt: skip
    with pytest.raises(AssertionError, match="away from a loop over experts"):
        smoke.check_layer(torch.float64)
