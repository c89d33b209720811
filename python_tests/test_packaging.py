"""The files a fresh clone is set up from say one thing, and setup.py says what is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import floe_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(floe_kernels.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ["3.10", "3.11", "3.13"]


def pins(python):
    """Return {name: version} of constraints.txt, for one version of Python."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        assert [s.operator for s in requirement.specifier] == ["=="], f"{line} pins nothing"
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        assert requirement.name not in pinned, f"{requirement.name} is pinned twice"
        pinned[requirement.name] = next(iter(requirement.specifier)).version
    return pinned


def run_setup(**environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def make_targets():
    text = (ROOT / "Makefile").read_text()
    return set(" ".join(re.findall(r"^\.PHONY: (.*)$", text, re.M)).split())


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_bounds(python):
    pinned = pins(python)
    for line in [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= EXTRAS.keys()
        else:
            assert requirement.specifier.contains(pinned[requirement.name]), line


def test_core_depends_on_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


def test_triton_is_left_to_torch():
    required = [Requirement(r).name for extra in EXTRAS.values() for r in extra]
    assert "triton" not in required
    assert not any("triton" in pins(python) for python in PYTHONS)


def test_version_is_written_once():
    assert "version" in PROJECT["dynamic"]
    again = re.compile(rf"""version.*["']{re.escape(floe_kernels.__version__)}["']""")
    places = [p for p in [*ROOT.glob("*.*"), *ROOT.glob("floe_kernels/**/*.py")] if p.is_file()]
    written = [p.name for p in places if again.search(p.read_text(errors="ignore"))]
    assert written == ["__init__.py"]


def test_make_has_what_is_asked_of_it():
    files = [".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md", "README.md"]
    text = "\n".join((ROOT / f).read_text() for f in files if (ROOT / f).exists())
    asked = set(re.findall(r"(?:^ *|`|run: )make ([a-z]+)\b", text, re.M))
    assert {"lint", "test"} <= asked
    assert asked <= make_targets()


def test_make_help_names_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make (\w+)", done.stdout, re.M)) == make_targets()


def test_setup_refuses_an_unknown_build():
    done = run_setup(FLOE_BUILD="gpu")
    assert done.returncode == 1
    assert done.stderr == "FLOE_BUILD must be auto, cpu, cuda or none, got 'gpu'\n"


def test_setup_without_a_compiler_falls_back_in_one_line():
    done = run_setup(FLOE_BUILD="auto", CXX="no-such-compiler")
    said = [line for line in done.stderr.splitlines() if line.startswith("floe_kernels: ")]
    assert done.returncode == 0
    assert said == [
        "floe_kernels: no C++ compiler (no-such-compiler) found, so building with "
        "FLOE_BUILD=none: plain PyTorch does the work"
    ]


def test_setup_without_a_compiler_refuses_what_needs_one():
    done = run_setup(FLOE_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr == (
        "FLOE_BUILD=cpu needs a C++20 compiler, but no C++ compiler (no-such-compiler) found\n"
    )
