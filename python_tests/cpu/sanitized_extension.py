"""The whole extension, built with AddressSanitizer and UBSan, under the CPU kernels' own tests.

    python python_tests/cpu/sanitized_extension.py [pytest's arguments]      make sanitize

Its own build, in a temporary folder and at -O1, takes some minutes. What sanitized.py runs without
torch is here called by torch: empty, ragged and dropped tensors, and what reads their sizes.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import sanitized

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = ("test_cpu_moe_lora.py", "test_cpu_grad_square.py")


def compiler_in(folder: Path) -> Path:
    """Return a compiler whose last flags are ``FLAGS``: a later -O wins over setup.py's."""
    path = folder / "c++"
    command = " ".join(sanitized.compiler() or ["c++"])
    path.write_text(f'#!/bin/sh\nexec {command} "$@" {FLAGS}\n')
    path.chmod(0o755)
    return path


def build(folder: Path) -> Path:
    """Build the package and return the folder it can be imported from."""
    package = folder / "package"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(package),
               "--build-temp", str(folder / "objects")]  # fmt: skip
    environment = {**os.environ, "CXX": str(compiler_in(folder)), "FLOE_BUILD": "cpu"}
    done = subprocess.run(
        command, cwd=sanitized.ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the extension does not build:\n{done.stdout}{done.stderr}")
    return package


def run(package: Path, arguments: list[str]) -> int:
    """Run the tests on it; the sanitizer's library must come before torch's."""
    where = [str(Path(__file__).parent / name) for name in TESTS]
    found = [
        subprocess.run(
            [*(sanitized.compiler() or ["c++"]), f"-print-file-name={name}"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]  # fmt: skip
    environment = {
        **os.environ, "LD_PRELOAD": ":".join(found), "PYTHONPATH": str(package),
        # CPython frees little at its end; an operator may ask for more than there is, and says so
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    # a sanitizer ends the process: pytest would take what it says with it
    options = ["-q", "--capture=no", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *where, *arguments]
    return subprocess.run(command, cwd=package, env=environment).returncode


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = build(Path(folder))
        code = run(package, sys.argv[1:])
    print(f"sanitize: the extension under its tests: {'SOMETHING' if code else 'nothing'} found")
    return code


if __name__ == "__main__":
    sys.exit(main())
