"""The house rules that can be read off the source: who may import whom, and what nobody does."""

import ast
import re
from pathlib import Path

import floe_kernels

ROOT = Path(floe_kernels.__file__).parent
CSRC = ROOT.parent / "csrc"
FLOORS = [  # a module may import from its own floor and from the floors below it
    {"cli"},
    {"pipeline"},
    {"integrations", "testing"},
    {"allocation"},
    {"scores", "nn"},
    {"functional"},
    {"ops"},
    {"triton", "_C", "_info"},
    {"reference"},
    {"_checks", "_types"},
]
HEIGHT = {name: -i for i, floor in enumerate(FLOORS) for name in floor}
OPTIONAL = {  # package -> the only floors that may import it at module level
    "triton": {"triton"},
    "transformers": {"integrations"},
    "peft": {"integrations"},
    "safetensors": {"integrations"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": set(),
    "numpy": set(),  # torch works without it, so we do
    "optuna": set(),
    "scipy": set(),
}


def homes():
    """Yield (path, floor) for every file of the package, but for the two that see everything."""
    for path in ROOT.rglob("*.py"):
        home = path.relative_to(ROOT).with_suffix("").parts[0]
        if home not in ("__init__", "__main__"):
            yield path, home


def imports(path):
    """Yield (module, is_top_level) for every import statement in a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parents = ["floe_kernels", *path.relative_to(ROOT).parts[:-1]]
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            from_root = module == "floe_kernels"  # `from floe_kernels import ops`
            for name in [f"{module}.{a.name}" for a in node.names] if from_root else [module]:
                yield name, id(node) in top
        elif isinstance(node, ast.Import):
            yield from ((a.name, id(node) in top) for a in node.names)


def test_every_module_has_a_floor():
    assert {home for _, home in homes()} <= HEIGHT.keys()


def test_imports_go_down():
    wrong = []
    for path, home in homes():
        for name, top_level in imports(path):
            package, _, rest = name.partition(".")
            if package == "floe_kernels" and rest:
                target = rest.partition(".")[0]
                if HEIGHT.get(target, -99) > HEIGHT[home]:
                    wrong.append(f"{path.relative_to(ROOT)} looks up at {name}")
            if top_level and home not in OPTIONAL.get(package, {home}):
                wrong.append(f"{path.relative_to(ROOT)} needs the optional {package}")
    assert not wrong, "\n".join(wrong)


def test_allocation_is_arithmetic_on_numbers():
    heavy = {"torch", "numpy", "transformers"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "allocation").rglob("*.py")
        for name, _ in imports(path)
        if name.partition(".")[0] in heavy
    ]
    assert not wrong, "\n".join(wrong)


def test_environment_changes_no_number():
    reads = re.compile(r"\b(os\.(environb?|getenvb?)|from os import .*(environ|getenv))\b")
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        for line in path.read_text().splitlines()
        if reads.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled():
    loads = re.compile(r"\bimport (pickle|dill|joblib)\b|weights_only=False")
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        for line in path.read_text().splitlines()
        if loads.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_native_code_keeps_to_the_stable_abi():
    wrong = []
    for path in CSRC.rglob("*.*"):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu"):
            continue
        for header in re.findall(r'#include [<"]([^>"]+)', path.read_text()):
            arithmetic = path.suffix in (".h", ".cuh") and not path.stem.endswith("_call")
            if arithmetic and re.match("torch/(?!headeronly/)", header):
                wrong.append(f"{path.name} is arithmetic and includes {header}")
            if header.startswith(("ATen/", "c10/", "torch/all.h", "torch/extension.h")):
                wrong.append(f"{path.name} leaves the stable ABI with {header}")
            if header.startswith("pybind11/") and path.parent.name != "info":
                wrong.append(f"{path.name} includes {header}, which only csrc/info may")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_a_drawer():
    files = [p for folder in (ROOT, CSRC) for p in folder.rglob("*.*") if p.suffix != ".so"]
    sources = [p for p in files if p.suffix in (".py", ".h", ".cuh", ".cpp", ".cu")]
    long = [f"{p.name}: {n}" for p in sources if (n := p.read_text().count("\n")) > 400]
    drawers = [p.name for p in sources if p.stem in ("utils", "common", "helpers")]
    assert not long + drawers
