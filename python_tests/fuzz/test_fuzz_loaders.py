"""Damaged and hostile files are read or refused in one sentence, quickly, in little memory."""

import json
import random
import struct
import time
import tracemalloc

import pytest
from drawing import drawn
from hypothesis import given
from hypothesis import strategies as st

from floe_kernels.allocation import Plan, uniform
from floe_kernels.pipeline.data import read_records, read_text
from floe_kernels.pipeline.measurements import Measurement
from floe_kernels.pipeline.runs import load_run

MODULES = {f"layers.{i}.{n}": (8, 6, f"layers.{i}") for i in range(2) for n in ("q", "k")}
PIECES = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"1" * 5000, b"[" * 100_000, b'{"a":' * 5000,
    b'"\\ud800"', b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{}", b"[]", b'""', b",", b"]", b"}",
    b"\n", b"1.5", b'"nan"', b"9" * 20, b'"__proto__"', b"\x80\x04\x95cos\nsystem\n(S'false'\ntR.",
]  # fmt: skip


def damaged(data, draw):
    """Cut, repeat, overwrite or fill in, a few times."""
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice([0, 1, 3, 20, len(data)]))
        piece = draw.choice([*PIECES, b"", data[at:end] * 2, bytes([draw.randrange(256)])])
        data = data[:at] + piece + data[end:]
    return data


def swapped(value, draw):
    """Replace one value somewhere in a JSON document by one of another kind."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        keys = [*value] if isinstance(value, dict) else range(len(value))
        key = draw.choice([*keys])
        value = value.copy()
        value[key] = swapped(value[key], draw)
        return value
    return draw.choice([None, True, -1, 0, 10**30, 1e308, 0.5, "", "x", [], {}, [[]], {"a": []}])


def plan_text():
    from floe_kernels._types import ModuleSpec

    modules = {name: ModuleSpec(*spec) for name, spec in MODULES.items()}
    return uniform(modules, experts=2, rank=2).to_json().encode()


def measured(folder):
    from floe_kernels._types import ModuleSpec

    modules = {name: ModuleSpec(*spec) for name, spec in MODULES.items()}
    scores = {"layers.0": 1.0, "layers.1": 0.5}
    Measurement("model", "print", "gate", scores, modules, method="fisher").save(folder / "s.json")
    return (folder / "s.json").read_bytes()


DATA = b"".join(
    json.dumps({"instruction": f"Add {i}", "input": "", "output": "x"}).encode() + b"\n"
    for i in range(4)
)
RUN = {"format": 1, "command": "tune", "arguments": {"seed": 0}, "facts": {"model": "abc"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Name -> a sound file's bytes and what reads it."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("whole")
    run = json.dumps(RUN).encode()
    return folder, {
        "plan.json": (plan_text(), Plan.load),
        "scores.json": (measured(folder), Measurement.load),
        "data.jsonl": (DATA, read_records),
        "data.json": (
            json.dumps([json.loads(x) for x in DATA.splitlines()]).encode(),
            read_records,
        ),
        "data.txt": (DATA, read_text),
        "config.json": (run, lambda path: load_run(path.parent)),
        "state.json": (b'{"score": {"scores": {}}}', lambda path: load_run(path.parent)),
        "history.jsonl": (b'{"event": "step", "step": 1}\n' * 3, lambda p: load_run(p.parent)),
    }


def read(path, reader):
    """Read; an error must be a sentence, and neither time nor memory may run away."""
    started = time.process_time()
    tracemalloc.start()
    said = "fine"
    try:
        reader(path)
    except (ValueError, OSError) as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said, "an error without a word"
    assert "\n" not in said, f"several lines: {said!r}"
    assert peak < 100 * 2**20
    assert time.process_time() - started < 20


@drawn(0.2)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 7), structured=st.booleans())
def test_files(tried, whole, seed, which, structured):
    folder, files = whole
    draw = random.Random(seed)
    name = [*files][which]
    data, reader = files[name]
    if structured and not name.endswith((".jsonl", ".txt")):
        data = json.dumps(swapped(json.loads(data), draw)).encode()
    else:
        data = damaged(data, draw)
    (folder / "config.json").write_text(json.dumps(RUN))
    for other in ("state.json", "history.jsonl"):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    read(folder / name, reader)
    tried()


@drawn(0.05)
@given(seed=st.integers(0, 2**32))
def test_adapters(tried, tmp_path_factory, adapter, seed):
    from floe_kernels.integrations.transformers import load_adapter

    model, files = adapter
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("adapter")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    victim = draw.choice([*files])
    kind = draw.choice(["damaged", "header", "swapped", "missing"])
    if kind == "missing":
        (folder / victim).unlink()
    elif kind == "header":  # says that it is of any length, up to 2**64
        length = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        (folder / victim).write_bytes(length + files[victim][8:])
    elif kind == "swapped" and victim.endswith(".json"):
        text = json.dumps(swapped(json.loads(files[victim]), draw))
        (folder / victim).write_text(text)
    else:
        (folder / victim).write_bytes(damaged(files[victim], draw))
    read(folder, lambda path: load_adapter(model, path))
    tried()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small model and the files of its adapter."""
    from floe_kernels.integrations.transformers import (
        apply_plan,
        find_modules,
        remove_adapters,
        save_adapter,
    )
    from floe_kernels.testing.models import tiny_model

    folder = tmp_path_factory.mktemp("sound") / "adapter"
    model = tiny_model("llama")
    apply_plan(model, uniform(find_modules(model), experts=2, rank=2))
    save_adapter(model, folder)
    model = remove_adapters(model)
    return model, {path.name: path.read_bytes() for path in folder.iterdir()}
