"""AMX's kernels: that their instructions are there, and that none is where it would crash.

What they compute: test_cpu_amx_emulation.py, and, on a CPU that has tiles, every test with ``isa``.
"""

import collections
import functools
import importlib.util
import re
import shutil
import subprocess

import pytest

_info = pytest.importorskip("floe_kernels._info", reason="the native extensions are not built")
if "avx2" not in _info.cpu_isas() or shutil.which("objdump") is None:
    pytest.skip("needs x86-64 and objdump", allow_module_level=True)

TILES = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}
#: The steps that multiply with tiles; a mangled name has these words in it.
STEPS = [
    ("GradSquareAmx", "panels"),
    *(("MoELoRAAmx", step) for step in ("shrink", "expand", "weight_grad")),
    *(("MoELoRAAmx", step) for step in ("gather_dots", "gather_expand")),
]


@functools.cache
def instructions():
    """Return, by function, how often it names each instruction and kind of register."""
    library = importlib.util.find_spec("floe_kernels._C").origin
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--section=.text", library]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, counts = {}, collections.Counter()
    for line in said.splitlines():
        if function := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            counts = found.setdefault(function[1], collections.Counter())
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(.+)", line):
            counts.update(re.findall(r"%[yz]mm|\b[a-z]\w*", instruction[1]))
    if sum("GLOBAL__N_" in name for name in found) < 100:
        pytest.skip("the library is stripped")
    return found


def functions_with(*names):
    return {f for f, counts in instructions().items() if any(counts[name] for name in names)}


def test_tiles_are_configured_multiplied_and_released():
    assert {name for name in TILES if functions_with(name)} == TILES


@pytest.mark.parametrize(("table", "step"), STEPS)
def test_every_step_releases_what_it_configures(table, step):
    name = re.compile(rf"{table}.*\d{step}E")
    ours = [c for f, c in instructions().items() if name.search(f) and c["ldtilecfg"]]
    assert ours
    assert all(counts["tilerelease"] >= counts["ldtilecfg"] for counts in ours)


def test_no_function_has_an_instruction_of_a_set_that_is_not_in_its_name():
    assert {f for f in functions_with(*TILES) if "Amx" not in f} == set()
    assert {f for f in functions_with("%zmm") if not re.search("Avx512|Amx", f)} == set()
    assert {f for f in functions_with("%ymm") if not re.search("Avx|Amx", f)} == set()
