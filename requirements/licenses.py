"""Writes LICENSES.md from the metadata of what is installed: ``make licenses``."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "LICENSES.md"
PROJECT = "floe-kernels"
# what people install to use the package; the rest is for working on it
RUNTIME = ("always", "cli", "demo", "frameworks", "peft", "search", "transformers")
TOOLS = {"audit": "make wheel", "bench": "make bench", "demo": "make demo", "hooks": "make hooks",
         "lock": "make lock"}  # fmt: skip
HEAD = """# Licences

floe_kernels is under the [Apache-2.0 licence](LICENSE) and depends on torch alone. These are the
packages that `make` or an extra brings, in the versions of [constraints.txt](constraints.txt), each
with the licence that its own metadata states (`make licenses`). The extras in bold are for users;
what only the others bring is for working on the package. A CUDA build of torch brings Triton, and
NVIDIA's libraries under NVIDIA's terms.

| package | version | licence | for |
|---|---|---|---|
"""
CLASSIFIED = {
    "Apache Software License": "Apache-2.0", "BSD License": "BSD", "MIT License": "MIT",
    "ISC License (ISCL)": "ISC", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "The Unlicense (Unlicense)": "Unlicense",
}  # fmt: skip


def pins() -> dict[str, list[str]]:
    """Return the versions that constraints.txt pins, by package."""
    pinned: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        found = re.match(r"(?:#cpu )?([\w.-]+)==([^\s;]+)", line)
        if found:
            pinned.setdefault(canonicalize_name(found[1]), []).append(found[2])
    return dict(sorted(pinned.items()))


def stated(name: str) -> str:
    """Return the licence that an installed package's metadata states, in short."""
    metadata = importlib.metadata.metadata(name)
    if metadata["License-Expression"]:
        return metadata["License-Expression"]
    classifiers = metadata.get_all("Classifier") or []
    approved = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: OSI")]
    if approved:
        return " OR ".join(sorted(CLASSIFIED.get(name, name) for name in approved))
    lines = (metadata["License"] or "").strip().splitlines() or [""]
    return re.sub(r"^Apache 2.0 License$", "Apache-2.0", lines[0].strip())


def needed(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield what an installed package asks for on any platform, given its extras."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        marker = str(requirement.marker or "")
        if "extra ==" not in marker or any(f'extra == "{extra}"' in marker for extra in extras):
            yield requirement


def closure(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Return all that a package brings."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = set()
    for requirement in needed(name, extras):
        key = canonicalize_name(requirement.name)
        found |= {key} | closure(key, frozenset(requirement.extras), seen)
    return found


def served() -> dict[str, list[str]]:
    """Return what every package is for: extras of the project, then tools of its Makefile."""
    core = closure(PROJECT, frozenset(), set())
    purposes = {name: ["always"] for name in core}
    extras = importlib.metadata.metadata(PROJECT).get_all("Provides-Extra") or []
    for extra in sorted(extras):
        for name in closure(PROJECT, frozenset([extra]), set()) - core:
            purposes.setdefault(name, []).append(extra)
    for stem, tool in TOOLS.items():
        for name in listed(stem) - purposes.keys():
            purposes[name] = [tool]
    for name in listed("packages") - purposes.keys():  # what only the oldest Python's versions need
        purposes[name] = ["Python 3.10"]
    return {"triton": ["make test"], **purposes}


def listed(stem: str) -> set[str]:
    """Return the packages of a list in requirements/."""
    text = (ROOT / "requirements" / f"{stem}.txt").read_text()
    return {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, re.M)}


def rows() -> list[tuple[str, str, str, str]]:
    """Return the table; a package that this Python does not take keeps the licence it had."""
    old = dict(re.findall(r"^\| ([\w.-]+) \| [^|]* \| ([^|]*) \|", TABLE.read_text(), re.M))
    purposes = served()
    table = []
    for name, versions in pins().items():
        try:
            licence = stated(name)
        except importlib.metadata.PackageNotFoundError:
            licence = old.get(name, "")
        if not licence:
            sys.exit(f"the licence of {name} is not known: install it, then make licenses")
        marked = [f"**{p}**" if p in RUNTIME else p for p in purposes.get(name, ["CUDA builds"])]
        table.append((name, ", ".join(versions), licence, ", ".join(marked)))
    return table


def main() -> None:
    """Write the table."""
    TABLE.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows()))


if __name__ == "__main__":
    main()
