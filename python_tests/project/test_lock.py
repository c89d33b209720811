"""What make installs is named file by file, torch aside; and every package's licence is known."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LISTS = sorted((ROOT / "requirements").glob("*.txt"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = {
    (r.name, str(r.specifier))
    for r in map(Requirement, re.findall(r"^(?:#cpu )?([\w.-]+==.*)", CONSTRAINTS, re.M))
}
OF_TORCH = re.compile(r"torch$|cuda-|nvidia-")
COPYLEFT = re.compile(r"\bA?GPL|GNU (Affero )?General Public|Commercial|Proprietary", re.I)


def entries(path):
    """{(name, ==version): hashes} of a list."""
    found = re.findall(r"^([\w.-]+)(==\S+)(.*\n(?: .*\n)*)", path.read_text(), re.M)
    return {(name, pin): re.findall(r"--hash=(\S+)", rest) for name, pin, rest in found}


def hashed():
    return {key: hashes for path in LISTS for key, hashes in entries(path).items()}


def licences():
    table = (ROOT / "LICENSES.md").read_text().partition("|---|")[2]
    rows = re.findall(r"^\| ([\w.-]+) \| (.*) \| (.*) \| (.*) \|", table, re.M)
    return {name: rest for name, *rest in rows}


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_every_line_of_a_list_has_hashes(path):
    assert entries(path)
    for key, hashes in entries(path).items():
        assert hashes, key
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), key
    assert len(entries(path)) == len(re.findall(r"^[^ #].*==", path.read_text(), re.M))
    assert "://" not in path.read_text(), "which index it came from is the machine's affair"


def test_every_pin_but_those_of_torch_is_in_a_list():
    wanted = {pin for pin in PINS if not OF_TORCH.match(pin[0])}
    assert wanted == hashed().keys() - {("triton", "==3.6.0")}


def test_make_installs_nothing_else():
    """Every pip install asks for hashes, but for torch, the project and a wheel of it."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    hashed = re.search(r"^HASHED := (.*)$", text, re.M)[1]
    assert {"--require-hashes", "--no-deps"} <= set(hashed.split())
    others = [
        line.strip() for line in text.splitlines()
        if re.search(r"\$\(PIP\)|pip install", line) and not re.match(r"(PIP|HASHED) :=", line)
    ]  # fmt: skip
    for line in others:
        assert re.search(r" torch$|--editable \.$|--no-deps --no-index dist/\*\.whl$", line), line
    assert len(others) == 4
    installed = set(re.findall(r"requirements/([\w.-]+)\.txt", text))
    extra = re.search(r"^EXTRA := .*,(.*)\)$", text, re.M)[1].split()
    assert installed - {"*"} | set(extra) == {path.stem for path in LISTS}


def test_every_dependency_has_a_licence_that_allows_its_use():
    rows = licences()
    pinned = {name.lower(): set() for name, _ in PINS}
    for name, version in PINS:
        pinned[name.lower()].add(version.removeprefix("=="))
    assert {name: set(row[0].split(", ")) for name, row in rows.items()} == pinned
    for name, (_, licence, purpose) in rows.items():
        assert licence, name
        assert purpose, name
        if "**" in purpose:
            assert not COPYLEFT.search(licence), f"{name}, which users install, is under {licence}"


def test_the_table_says_what_the_packages_say():
    path = ROOT / "requirements" / "licenses.py"
    spec = importlib.util.spec_from_file_location("licenses", path)
    licenses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(licenses)
    compared = 0
    for name, (versions, licence, _) in licences().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version in versions.split(", "):  # not a 2.13.0+cpu, whose wheel another made
            assert licenses.stated(name) == licence, name
            compared += 1
    assert compared > 10
