"""Every public name exists, and its docstring keeps the promises of CONTRIBUTING.md."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import floe_kernels as fk
from floe_kernels import allocation, functional, scores

FUNCTIONS = {
    **{f"functional.{n}": getattr(functional, n) for n in functional.__all__},
    **{f"scores.{n}": getattr(scores, n) for n in scores.__all__},
    **{f"allocation.{n}": getattr(allocation, n) for n in allocation.__all__},
    **{n: getattr(fk, n) for n in fk.__all__},
}
DOCUMENTED = {n: f for n, f in FUNCTIONS.items() if callable(f)}
PROMISED = [
    "FusedMoELoRA",
    "FisherCollector",
    "apply_plan",
    "save_adapter",
    "load_adapter",
    "remove_adapters",
    "functional.moe_lora_linear",
    "functional.moe_lora",
    "functional.topk_softmax",
    "functional.load_balance_loss",
    "functional.hill_alpha",
    "functional.segment_grad_square",
    "scores.fisher",
    "scores.sensitivity",
    "scores.influence",
    "scores.spectral",
    "allocation.Plan",
    "allocation.floe",
    "allocation.lora_smoe",
    "allocation.alphalora",
    "allocation.mola",
    "allocation.uniform",
    "allocation.random",
    "allocation.RankSearch",
    "allocation.allocate_experts",
]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(fk.__path__, "floe_kernels.")
    if not name.endswith(("._C", "._info", "__main__"))
]


@pytest.mark.parametrize("name", PROMISED)
def test_promised_name_exists(name):
    value = fk
    for part in name.split("."):
        value = getattr(value, part)
    assert value.__doc__


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_is_complete(name):
    thing = DOCUMENTED[name]
    doc = inspect.getdoc(thing) or ""
    assert re.match(r"[A-Z].*[.:]", doc), "starts with a sentence"
    if isinstance(thing, type) and issubclass(thing, tuple):
        return  # a named tuple's fields say their shapes where they are declared
    takes = [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]
    for section in ["Args:"] * bool(takes) + ["Example:"]:
        assert section in doc or section.replace("Args", "Attributes") in doc, f"no {section}"
    for parameter in takes:
        assert re.search(rf"^\s*\*?\*?{parameter}:", doc, re.M), f"{parameter} is not documented"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"an optional package is missing: {error}")
    results = doctest.testmod(loaded, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
