"""No link, reference or command in the documents leads nowhere."""

import contextlib
import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import floe_kernels

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("examples/**/*.md")]
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = re.findall(
    r"(?:^(?:    )?|`)((?:make|floe|python|pip|FLOE_BUILD=\w+)\b[^`\n]*)",
    "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")),
    re.M,
)


def prose(path):
    """A document without its code."""
    return re.sub(r"^```.*?^```|^    .*$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)


def anchors(path):
    """The names that headings get where Markdown is shown."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


REFERENCE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")


def modules():
    """{name: module} of all that imports here."""
    found = {"floe_kernels": floe_kernels}
    for module in pkgutil.walk_packages(floe_kernels.__path__, "floe_kernels."):
        if not module.name.endswith(("._C", "._info", "__main__")):
            with contextlib.suppress(ImportError):  # of an optional package
                found[module.name] = importlib.import_module(module.name)
    return found


def known(found):
    """What may be named in short anywhere: public functions and classes, and their members."""
    public = {n: getattr(m, n) for m in found.values() for n in getattr(m, "__all__", ())}
    return {*public, *(f"{n}.{member}" for n, thing in public.items() for member in dir(thing))}


def leads_to(name, module, found, short):
    if name in short or name in found:
        return True
    home, _, last = name.rpartition(".")
    if home in found:
        return hasattr(found[home], last)
    if home.rpartition(".")[0] in found:  # a member of a class
        owner = getattr(found[home.rpartition(".")[0]], home.rpartition(".")[2], None)
        return hasattr(owner, last)
    floor = module.__name__.rpartition(".")[0]
    if any(hasattr(found[other], name) for other in found if other.startswith(f"{floor}.")):
        return True
    owner = getattr(module, home, None) if home else module
    classes = [thing for thing in vars(module).values() if inspect.isclass(thing)]
    return hasattr(owner, last) or any(hasattr(c, name) for c in classes)


def test_references_in_docstrings_lead_somewhere():
    found = modules()
    short = known(found)
    references = [
        (module, name)
        for module in found.values()
        for name in REFERENCE.findall(inspect.getsource(module))
    ]
    assert len(references) > 100
    lost = [
        f"{m.__name__}: {name}" for m, name in references if not leads_to(name, m, found, short)
    ]
    assert not lost


def test_there_are_commands_to_check():
    assert {c.split()[0] for c in COMMANDS} >= {"make", "floe", "python", "pip"}
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("command", [c for c in COMMANDS if "make " in c])
def test_make_takes_what_is_shown(command):
    words = shlex.split(command, comments=True)
    words = words[words.index("make") + 1 :]
    variables = [word.partition("=")[0] for word in words if "=" in word]
    for variable in variables:
        assert re.search(rf"\$[({{]{variable}\b|or \$\({variable}\)", MAKEFILE), variable
    for path in re.findall(r"[\w/]+\.py", command):
        assert (ROOT / path).exists(), path
    for target in (word for word in words if re.fullmatch("[a-z]+", word)):
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("floe ")])
def test_floe_takes_what_is_shown(command):
    typer = pytest.importorskip("typer")
    from floe_kernels.cli.app import app

    group = typer.main.get_command(app)
    words = shlex.split(command.replace("|", " "), comments=True)[1:]
    names = [word for word in words if re.fullmatch("[a-z]+", word) and word in group.commands]
    assert names, f"no such command: {command}"
    known = {option for name in names for p in group.commands[name].params for option in p.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(FLOE\S+ )?python ", c)])
def test_python_takes_what_is_shown(command):
    words = shlex.split(command, comments=True)
    words = words[words.index("python") + 1 :]
    named = [w for w in words if w.endswith(".py") or (ROOT / w).is_dir()]
    assert all((ROOT / word).exists() for word in named)
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words[1]
    else:
        assert named


def test_benchmarks_take_what_is_shown():
    shown = {w for c in COMMANDS if "benchmarks.run" in c for w in c.split() if w.startswith("--")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown
    assert all(re.search(rf"{option}\b", done.stdout) for option in shown), done.stderr
