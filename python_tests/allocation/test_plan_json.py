"""Plan: counts, JSON both ways, and every sentence that a bad file gets."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LLAMA_2_7B, small, transformer

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation import Placement, Plan, mola, uniform

MODULES = {
    "h.0.q": ModuleSpec(8, 8, "h.0"),
    "h.0.up": ModuleSpec(8, 24, "h.0"),
    "h.1.q": ModuleSpec(8, 8, "h.1"),
}
PLAN = Plan(
    {"h.1.q": Placement((4, 2), 1), "h.0.up": Placement((0, 3), 2)},
    "by hand",
    lora_alpha=32,
    lora_dropout=0.1,
    modules=MODULES,
    base_model="Qwen/通义-2.5",
    fingerprint="1f",
    provenance={"scores": {"h.0": 1e-300, "h.1": 0.1}, "note": "é\ud800", "deep": [None, [True]]},
)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        *((preset, 105_635_840) for preset in ("2468", "8642", "5555", "8228", "2882")),
        ("8888", 169_017_344),
        ("6532", 84_508_672),
        ("4444", 84_508_672),
    ],
)
def test_parameters_are_those_of_the_mola_paper(preset, parameters):
    assert mola(transformer(32), preset).parameters() == parameters


def test_parameters_are_those_of_the_hydralora_paper():
    qv = {name: LLAMA_2_7B[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}
    plan = uniform(transformer(32, qv), experts=3, shared_A=True)
    assert round(100 * plan.parameters(router=False) / 6_738_415_616, 4) == 0.1245
    assert round(100 * plan.parameters() / 6_738_415_616, 3) == 0.136


def test_parameters_of_uneven_ranks():
    assert PLAN.parameters() == (8 + 8) * 6 + 8 * 2 + (8 + 24) * 3 + 8 * 2
    assert PLAN.parameters(router=False) == (8 + 8) * 6 + (8 + 24) * 3


def test_layers_are_those_with_an_expert_in_model_order():
    empty = Plan({"h.1.q": Placement(()), "h.0.q": Placement((8,))}, "x", modules=MODULES)
    assert empty.layers() == ["h.0"]
    assert PLAN.layers() == ["h.0", "h.1"]
    assert list(PLAN.placements) == ["h.0.up", "h.1.q"]


def test_round_trip():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert list(again.provenance) == list(PLAN.provenance)
    assert again.to_json() == PLAN.to_json()
    assert isinstance(again.modules["h.0.q"], ModuleSpec)
    json.loads(PLAN.to_json().encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
SPECS = st.builds(ModuleSpec, st.integers(1, 99), st.integers(1, 99), st.text())
PLACEMENTS = st.lists(st.integers(0, 64), max_size=4).flatmap(
    lambda ranks: st.builds(
        Placement, st.just(ranks), st.none() | st.integers(1, max(1, len(ranks)))
    )
)


@settings(max_examples=60, deadline=None)
@given(
    modules=st.dictionaries(st.text(), st.tuples(SPECS, st.none() | PLACEMENTS), max_size=5),
    alpha=st.floats(0.001, 1e9) | st.integers(1, 10**30),
    dropout=st.floats(0, 0.999),
    text=st.text(),
    flag=st.booleans(),
    provenance=st.dictionaries(st.text(), JSON, max_size=4),
)
def test_any_plan_survives_the_file(
    tmp_path_factory, modules, alpha, dropout, text, flag, provenance
):
    plan = Plan(
        {name: placement for name, (_, placement) in modules.items() if placement is not None},
        text,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=flag,
        modules={name: spec for name, (spec, _) in modules.items()},
        base_model=text,
        provenance=provenance,
    )
    path = tmp_path_factory.mktemp("plan") / "plan é.json"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    assert again.provenance == provenance
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def broken(**changes):
    document = json.loads(PLAN.to_json())
    for path, value in changes.items():
        *parents, key = path.split("__")
        row = document
        for parent in parents:
            row = row[parent.replace("_", ".")]
        key = key.replace("_", ".") if parents else key
        if value is KeyError:
            del row[key]
        else:
            row[key] = value
    return json.dumps(document)


GOOD = PLAN.to_json()
BAD = {
    "": r"a plan must be whole JSON: the text is empty",
    GOOD[: len(GOOD) // 2]: r"a plan must be whole JSON: .*: line \d+ column \d+ \(char \d+\)",
    GOOD + "}": r"a plan must be whole JSON: Extra data: line \d+ column 1",
    "[" * 100_000: r"a plan must be whole JSON: it is nested too deeply",
    "[1]": r"a plan must be a JSON object, got a list",
    "null": r"a plan must be a JSON object, got null",
    broken(format="peft"): r'a plan\'s format must be "floe_kernels.plan", got \'peft\'',
    broken(version=2): r"a plan's format version must be 1, got 2",
    broken(version=True): r"a plan's format version must be 1, got True",
    broken(version=KeyError): r"a plan must have the key 'version', got format, ",
    broken(lora_alhpa=3): r"a plan has no key 'lora_alhpa' \(nearest: lora_alpha, ",
    broken(modules=KeyError): r"a plan must have the key 'modules', got ",
    broken(placements=[]): r"placements must be an object, got a list",
    broken(modules__h_0_q=[8, 8, "h"]): r"modules\['h.0.q'\] must be an object, got a list",
    broken(modules__h_0_q={"in": 8}): r"modules\['h.0.q'\] has no key 'in' \(nearest: in_features",
    broken(provenance=3): r"provenance must be an object, got a number",
    broken(method=None): r"method must be a string, got None",
    broken(shared_A=1): r"shared_A must be true or false, got 1",
    broken(lora_alpha="16"): r"lora_alpha must be a finite number, got '16'",
    broken(lora_alpha=0): r"lora_alpha must be above 0, got 0",
    broken(lora_alpha=True): r"lora_alpha must be a finite number, got True",
    broken(lora_dropout=1): r"lora_dropout must be in \[0, 1\), got 1",
    broken(placements__h_1_q={"ranks": [4]}): r"placements\['h.1.q'\] must have the key 'top_k'",
    broken(placements__h_1_q={"ranks": [4, -1], "top_k": 1}):
        r"placements\['h.1.q'\]: every rank must be a whole number of at least 0, got -1",
    broken(placements__h_1_q={"ranks": [4.0], "top_k": 1}):
        r"every rank must be a whole number of at least 0, got 4.0",
    broken(placements__h_1_q={"ranks": 4, "top_k": 1}):
        r"ranks must be a sequence of whole numbers, got 4",
    broken(placements__h_1_q={"ranks": {"4": 1}, "top_k": 1}):
        r"ranks must be a sequence of whole numbers, got \{'4': 1\}",
    broken(placements__h_1_q={"ranks": [4, 4, 4, 4], "top_k": 5}):
        r"placements\['h.1.q'\]: top_k must be in 1\.\.E = 1\.\.4, got 5",
    broken(placements__h_1_q={"ranks": [4], "top_k": 0}):
        r"top_k must be a whole number of at least 1, got 0",
    broken(placements__h_1_k={"ranks": [4], "top_k": 1}):
        r"every placement must name a module of the plan, got 'h.1.k' \(nearest: h.1.q, ",
    broken(shared_A=True): r"shared_A needs experts of equal rank, got \(0, 3\) for 'h.0.up'",
    broken(modules__h_0_q={"in_features": 0, "out_features": 8, "layer": "h.0"}):
        r"modules\['h.0.q'\] sizes must be a whole number of at least 1, got 0",
    broken(modules__h_0_q={"in_features": 8, "out_features": 8, "layer": 0}):
        r"modules\['h.0.q'\] must be a ModuleSpec\(in_features, out_features, layer\), got ",
    GOOD.replace("0.1", "NaN", 1): r"every number must be finite, got NaN",
    GOOD.replace("0.1", "-Infinity", 1): r"every number must be finite, got -Infinity",
    GOOD.replace("1e-300", "1e999"):
        r"provenance\['scores'\]\['h.0'\] must be something JSON can hold, .*, got inf",
    GOOD.replace("0.1", "1e999", 1): r"lora_dropout must be a finite number, got inf",
    GOOD.replace('"h.0.q": {', '"h.0.q": {"layer": "x", '):
        r"a key must be given once, got 'layer' twice",
}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BAD.items(), ids=range(len(BAD)))
def test_says_what_is_wrong_with_the_text(text, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        Plan.from_json(text)
    assert "\n" not in str(error.value)
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json: .*" + says):
        Plan.load(tmp_path / "plan.json")


def test_optional_keys_have_their_defaults():
    document = json.loads(GOOD)
    for name in ("lora_alpha", "lora_dropout", "provenance", "base_model"):
        del document[name]
    plan = Plan.from_json(json.dumps(document))
    assert (plan.lora_alpha, plan.lora_dropout, plan.provenance) == (16, 0.0, {})


def test_says_what_is_wrong_with_the_bytes(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a plan must be UTF-8 text, got .* position 7"):
        Plan.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # a byte-order mark is forgiven
    assert Plan.load(path) == PLAN


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_plan(tmp_path, monkeypatch, fails):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    path = tmp_path / "plan.json"
    PLAN.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, refuse)
        with pytest.raises(OSError, match="No space left"):
            Plan({}, "another").save(path)
    assert Plan.load(path) == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"placements": {"h.0.q": (8, 8)}}, r"placements\['h.0.q'\] must be a Placement, got"),
        ({"modules": {"q": (8, 8)}}, r"modules\['q'\] must be a ModuleSpec"),
        ({"modules": {3: ModuleSpec(8, 8, "h")}}, r"a module's name must be a string, got 3"),
        ({"modules": []}, r"modules must be a dict, got \[\]"),
        ({"provenance": {"x": object()}}, r"provenance\['x'\] must be something JSON can hold"),
        ({"provenance": {"x": {1: 2}}}, r"provenance\['x'\] must be something JSON can hold"),
        ({"provenance": {"x": [float("nan")]}}, r"provenance\['x'\]\[0\] must be .*got nan"),
        ({"lora_alpha": float("inf")}, r"lora_alpha must be a finite number, got inf"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_plan_made_by_hand_is_checked_too(fields, says):
    with pytest.raises(ValueError, match=says):
        Plan(**{"placements": {}, "method": "x", "modules": MODULES, **fields})


def test_placements_take_what_counts_as_a_whole_number():
    numpy = pytest.importorskip("numpy")
    assert Placement(numpy.array([4, 8])) == Placement((4, 8))
    assert type(Placement([numpy.int64(4)]).ranks[0]) is int
    plan = uniform(small(1), experts=2, lora_alpha=numpy.float32(8))
    assert Plan.from_json(plan.to_json()) == plan
