"""Every public function takes the memory that its docstring says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from backends import SETS
from lengths import HELD, LONG

from floe_kernels import functional as FK
from floe_kernels.functional.shared_inputs import moe_lora_shared_linear

A_THREAD = 2 * 2**20  # what a docstring allows for each thread's own rows; one thread runs
if not SETS or not Path("/proc/self/clear_refs").exists():
    pytest.skip("needs the C++ kernels, and Linux to measure", allow_module_level=True)


def expressions(function):
    """The formulas of a docstring's paragraph on memory, in order."""
    paragraph = re.search(r"Memory.*?\n\n", function.__doc__, re.DOTALL).group()
    return re.findall(r"``([^`]*[*][^`]*)``", " ".join(paragraph.split()))


def value(expression, dims):
    return eval(expression, {"max": max, "min": min}, dims)


@pytest.fixture(scope="module")
def measured():
    script = Path(__file__).with_name("peaks.py")
    # a CPU without bfloat16's instructions computes in float32: other sizes
    dtypes = ["float32"] + ["bfloat16"] * (LONG and SETS[-1].endswith(("bf16", "amx")))
    done = subprocess.run(
        [sys.executable, script, *dtypes], capture_output=True, text=True, check=True
    )
    found = {}
    for name, how, dims, size in json.loads(done.stdout):
        found.setdefault(name, []).append((how, dims, size))
    return found


def of_layer(how, dims):
    forward, backward, *_ = expressions(FK.moe_lora_linear)
    return value(forward if "forward" in how else backward, dims)


def of_siblings(how, dims):
    count, (once, more) = 3, expressions(moe_lora_shared_linear)
    if "forward" in how:
        return count * of_layer(how, dims) - (count - 1) * value(once, dims)
    return of_layer(how, dims) + value(more, dims) + count * dims["b"] * dims["W"]


def of_segments(how, dims):
    always, element, *_ = expressions(FK.segment_grad_square)
    return value(always, dims) + ("element" in how) * value(element, dims)


def of_linears(how, dims):
    grams, widened, long = expressions(FK.linear_grad_square)
    if "long" in how:
        return value(long, dims)
    return value(grams if "float32" in how else widened, dims)


def of_routing(function):
    first, *widened = expressions(function)
    return lambda how, dims: value(first if "float32" in how else [first, *widened][-1], dims)


def of_tails(how, dims):
    always, search = expressions(FK.hill_alpha)
    return value(always, dims) + ("finger" in how) * value(search, dims)


def of_grams(_how, dims):
    return value(expressions(FK.gram_eigenvalues)[-1], dims)


SAID = {
    "moe_lora_linear": of_layer,
    "moe_lora": of_layer,
    "moe_lora_shared_linear": of_siblings,
    "segment_grad_square": of_segments,
    "linear_grad_square": of_linears,
    **{name: of_routing(getattr(FK, name)) for name in
       ("topk_softmax", "load_balance_loss", "router_z_loss", "expert_load")},
    "hill_alpha": of_tails,
    "gram_eigenvalues": of_grams,
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_peak_is_what_the_docstring_says(name, measured):
    for how, dims, size in measured[name]:
        said = SAID[name](how, dims)
        print(f"{name}, {how}: {size / 2**20:.2f} MiB, said {said / 2**20:.2f}")
        assert abs(size - said) <= A_THREAD, f"{how}: {size:,} bytes, its docstring says {said:,}"
    HELD["functions in the memory that they state"] += 1


def test_every_function_states_it():
    functions = {name for name in FK.__all__ if name[0].islower()} | {"moe_lora_shared_linear"}
    assert functions == SAID.keys()
