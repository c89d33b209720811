"""LoRA-SMoE, AlphaLoRA, MoLA, LayerIF and the controls."""

import itertools
import math
import random as stdlib_random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import layer_scores, small, transformer

from floe_kernels.allocation import (
    alphalora,
    alphalora_compat,
    by_position,
    corrected_overlap,
    floe,
    inverted,
    inverted_scores,
    kendall_tau,
    layerif,
    lora_smoe,
    mola,
    random,
    stability,
    uniform,
    votes,
)
from floe_kernels.allocation.lora_smoe import percentile

ROW_1 = [1.9, 2.1, 3.0, 4.2]
ROW_2 = [1.2, 2.2, 2.4, 2.6, 3.4, 3.6, 3.8, 5.0]
QKVO = {name: (64, 64) for name in ("q", "k", "v", "o")}


def experts(plan):
    return [plan.placements[m].experts if m in plan.placements else 0 for m in plan.modules]


def distinct_scores(names, tasks, seed=0):
    draw = stdlib_random.Random(seed)
    return {f"task {t}": {name: draw.random() for name in names} for t in range(tasks)}


def test_votes_reach_the_released_total():
    scores = distinct_scores(transformer(36, QKVO), tasks=8)
    counts = votes(scores, p=60)
    assert len(counts) == 144
    assert sum(counts.values()) == 688
    assert max(counts.values()) <= 8


@pytest.mark.parametrize(("matrices", "kept"), [(144, 86), (252, 151), (36, 21)])
def test_votes_of_one_task(matrices, kept):
    counts = votes(distinct_scores(range_names(matrices), tasks=1), p=60)
    assert sum(counts.values()) == kept == matrices - 1 - math.floor(0.4 * (matrices - 1))


def range_names(n):
    return [f"layers.{i}.q" for i in range(n)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_is_numpys(values, q):
    numpy = pytest.importorskip("numpy")
    assert percentile(values, q) == numpy.percentile(values, q)


def test_equal_scores_at_the_threshold_all_lose():
    assert votes({"t": dict.fromkeys("abcd", 1.0)}, p=60) == dict.fromkeys("abcd", 0)
    assert votes({"t": {"a": 0.0, "b": 1.0, "c": 1.0}}, p=100) == {"a": 0, "b": 1, "c": 1}


def test_votes_within_pools():
    scores = {"t": {"0.q": 1.0, "1.q": 2.0, "0.up": 10.0, "1.up": 20.0}}
    assert votes(scores, p=50) == {"0.q": 0, "1.q": 0, "0.up": 1, "1.up": 1}
    assert votes(scores, p=50, pool="type") == {"0.q": 0, "1.q": 1, "0.up": 0, "1.up": 1}
    depth = {"0.q": "a", "1.q": "b", "0.up": "a", "1.up": "b"}
    assert votes(scores, p=50, pool=depth) == {"0.q": 0, "1.q": 0, "0.up": 1, "1.up": 1}


def test_lora_smoe_by_votes_and_by_budget():
    modules = transformer(6, QKVO)
    scores = distinct_scores(modules, tasks=3)
    by_votes = lora_smoe(scores, modules)
    assert dict(zip(modules, experts(by_votes), strict=True)) == votes(scores)
    assert set(by_votes.placements) == {name for name, n in votes(scores).items() if n}
    by_total = lora_smoe(scores, modules, total=50, hi=4)
    assert sum(experts(by_total)) == 50
    assert max(experts(by_total)) <= 4
    louder = {**scores, "task 0": {name: 1e6 * s for name, s in scores["task 0"].items()}}
    assert experts(lora_smoe(louder, modules, total=50)) == experts(
        lora_smoe(scores, modules, total=50)
    )
    per_layer = lora_smoe(scores, modules, total=12, per="layer")
    assert sum(experts(per_layer)) == 12 * 4
    zero = {"t": dict.fromkeys(modules, 0.0)}
    assert experts(lora_smoe(zero, modules, total=24)) == [1] * 24


@pytest.mark.parametrize(
    ("scores", "keywords", "says"),
    [
        ({}, {}, r"scores must be task -> module name -> number, with at least one task"),
        ({"model.layers.0.q": 1.0}, {}, r"scores must be task -> module name -> number"),
        (
            {"a": dict.fromkeys(small(1), 1.0), "b": {}},
            {},
            r"'a' and 'b' differ in 'model.layers.0",
        ),
        ({"a": {"q": 1.0}}, {}, r"scores must all name .*got 'q' \(nearest: "),
        ({"a": dict.fromkeys(small(1), -1.0)}, {}, r"the score of .* in 'a' must be .*got -1.0"),
        ({"a": dict.fromkeys(small(1), 1.0)}, {"p": 101}, r"p must be in 0\.\.100, got 101"),
        ({"a": dict.fromkeys(small(1), 1.0)}, {"pool": "head"}, r"pool must be all, type or a map"),
        ({"a": dict.fromkeys(small(1), 1.0)}, {"pool": {}}, r"pool must name every matrix, "),
    ],
)
def test_lora_smoe_says_what_is_wrong(scores, keywords, says):
    with pytest.raises(ValueError, match=says):
        lora_smoe(scores, small(1), **keywords)


def test_alphalora_and_its_released_rule():
    assert alphalora_compat(ROW_1, 10) == [1, 1, 2, 6]
    assert alphalora_compat(ROW_2, 24) == [1, 1, 1, 2, 3, 4, 4, 8]
    modules = small(8)
    clean = alphalora(layer_scores(ROW_2), modules, total=24, lo=0)
    assert experts(clean)[::2] == [0, 1, 1, 2, 3, 4, 4, 9]
    compat = alphalora(layer_scores(ROW_2), modules, total=24, compat=True)
    assert experts(compat)[::2] == [1, 1, 1, 2, 3, 4, 4, 8]
    assert [p.top_k for p in compat.placements.values()][::2] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_the_released_rule_breaks_as_described():
    draw = stdlib_random.Random(0)
    lone, empty, corrected = 0, 0, 0
    for _ in range(300):
        alphas = [draw.uniform(1.5, 6) for _ in range(32)]
        powers = [a**2.5 for a in alphas]
        plain = [round(p / sum(powers) * 160) for p in powers]
        counts = alphalora_compat(alphas, 160)
        assert sum(counts) == 160
        moved = sum(a != b for a, b in zip(counts, plain, strict=True))
        corrected += sum(plain) != 160
        lone += moved == 1
        empty += min(counts) <= 0
    assert lone == corrected > 150
    assert empty > 50


def test_alphalora_averages_modules_and_says_what_is_wrong():
    modules = small(2)
    scores = dict(zip(modules, [1.0, 3.0, 4.0, 4.0], strict=True))
    plan = alphalora(scores, modules, total=6, beta=1.0, per="layer")
    assert plan.provenance["scores"] == layer_scores([2.0, 4.0])
    assert experts(plan) == [2, 2, 4, 4]
    with pytest.raises(ValueError, match=r"the compatible rule must count experts, got .*'bytes'"):
        alphalora(scores, modules, total=6, unit="bytes", compat=True)
    with pytest.raises(ValueError, match=r"exponents must be above 0 and at least one, got \[0\]"):
        alphalora_compat([0], 3)
    with pytest.raises(ValueError, match=r"total must be in L\*lo\.\.L\*hi = 2\.\.any number"):
        alphalora(layer_scores([1, 2]), modules, total=1)


@pytest.mark.parametrize(
    ("row", "total", "want"), [(ROW_1, 10, [1, 2, 3, 4]), (ROW_2, 24, [1, 2, 2, 2, 3, 3, 4, 7])]
)
def test_layerif(row, total, want):
    plan = layerif(layer_scores(row), small(len(row)), total=total, beta=2.5)
    assert experts(plan)[::2] == want
    negative = layerif(layer_scores([-5.0, 1.0, 3.0]), small(3), total=7)
    assert experts(negative)[::2] == [1, 2, 4]
    assert experts(layerif(layer_scores([-5.0, -1.0]), small(2), total=6))[::2] == [3, 3]


@pytest.mark.parametrize(
    ("layers", "preset", "want"),
    [
        (8, "2468", [2, 2, 4, 4, 6, 6, 8, 8]),
        (4, "10-2-0-3", [10, 2, 0, 3]),
        (6, "8228", [8, 8, 2, 2, 2, 8]),
        (2, "1234", [1, 3]),
    ],
)
def test_mola(layers, preset, want):
    assert experts(mola(small(layers), preset))[::2] == want


def test_mola_of_30_layers_has_quarters_of_8_7_8_7():
    counts = experts(mola(small(30), "2468"))[::2]
    assert [len(list(same)) for _, same in itertools.groupby(counts)] == [8, 7, 8, 7]


@pytest.mark.parametrize(
    "preset", ["246", "24680", "2-4-6", "a-b-c-d", "-1-2-3-4", "", 2468, "\uff12468"]
)
def test_mola_says_what_is_wrong(preset):
    with pytest.raises(ValueError, match=r"preset must be four digits or a-b-c-d, got "):
        mola(small(4), preset)


def test_uniform():
    assert experts(uniform(small(3))) == [4] * 6
    assert experts(uniform(small(3), total=7))[::2] == [3, 2, 2]
    assert experts(uniform(small(3), total=7, per="module")) == [2, 1, 1, 1, 1, 1]
    assert uniform(small(3), experts=0).placements == {}


def test_random_is_a_function_of_its_seed():
    plans = [random(small(16), seed=seed) for seed in range(40)]
    assert plans[3] == random(small(16), seed=3)
    assert {len(plan.layers()) for plan in plans} == {4}
    kept = [layer for plan in plans for layer in plan.layers()]
    assert len(set(kept)) == 16
    assert len({tuple(plan.layers()) for plan in plans}) > 30
    totals = [random(small(16), total=80, lo=1, hi=9, seed=seed) for seed in range(40)]
    assert {sum(experts(plan)[::2]) for plan in totals} == {80}
    assert all(1 <= n <= 9 for plan in totals for n in experts(plan))
    assert len({tuple(experts(plan)) for plan in totals}) == 40
    # in every Python and on every machine
    assert random(small(16), seed=3).layers() == [f"model.layers.{i}" for i in (7, 10, 12, 14)]


@pytest.mark.parametrize(
    ("where", "kept"),
    [("first", [0, 1, 2]), ("middle", [3, 4, 5]), ("last", [7, 8, 9]), ("spaced", [1, 5, 8])],
)
def test_by_position(where, kept):
    plan = by_position(small(10), where=where, keep=0.3)
    assert plan.layers() == [f"model.layers.{i}" for i in kept]
    assert plan.method == where
    assert len(by_position(small(10), where=where, keep=1).layers()) == 10
    with pytest.raises(ValueError, match="where must be first, middle, last or spaced, got 'top'"):
        by_position(small(10), where="top")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
def test_inverted_scores_reverse_the_order(values):
    scores = layer_scores(values)
    turned = inverted_scores(scores)
    for a, b in itertools.combinations(scores, 2):
        assert scores[a] <= scores[b] or turned[a] <= turned[b]
        assert scores[a] != scores[b] or turned[a] == turned[b]
    assert inverted_scores({}) == {}


def test_inverted_deals_the_same_placements_the_other_way():
    scores = layer_scores([5.0, 1.0, 4.0, 2.0, 3.0])
    kept = floe(scores, small(5), keep=0.4)
    assert kept.layers() == ["model.layers.0", "model.layers.2"]
    turned = inverted(kept)
    assert turned.layers() == ["model.layers.1", "model.layers.3"]
    assert turned.parameters() == kept.parameters()
    assert turned.method == "inverted floe"
    assert type(turned).from_json(turned.to_json()) == turned

    plan = layerif(scores, small(5), total=15)
    assert experts(plan)[::2] == [4, 2, 4, 2, 3]
    assert experts(inverted(plan))[::2] == [2, 4, 2, 4, 3]
    assert experts(inverted(mola(small(4), "2468")))[::2] == [8, 6, 4, 2]
    with pytest.raises(ValueError, match="inverted needs one placement a layer, got 2 in 'model"):
        inverted(lora_smoe_per_layer())


def lora_smoe_per_layer():
    plan = uniform(small(2))
    lone = {"model.layers.0.q": plan.placements["model.layers.0.q"]}
    return type(plan)(lone, "x", modules=plan.modules, provenance={"per": "layer"})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_kendall_tau_is_scipys(pairs):
    stats = pytest.importorskip("scipy.stats")
    a, b = zip(*pairs, strict=True)
    got = kendall_tau(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


def test_overlap_is_corrected_for_chance():
    assert corrected_overlap({1, 2, 3}, {1, 2, 3}, 9) == 1
    assert corrected_overlap({1, 2, 3}, {4, 5, 6}, 9) == pytest.approx(-0.5)
    # two sets of 201 of 252 that share 89.1 % agree by 0.46 only
    a, b = set(range(201)), set(range(22, 223))
    assert len(a & b) / 201 == pytest.approx(0.891, abs=1e-3)
    assert corrected_overlap(a, b, 252) == pytest.approx(0.46, abs=0.005)
    assert math.isnan(corrected_overlap({0, 1}, {0, 1}, 2))


def test_stability_tells_signal_from_noise():
    draw = stdlib_random.Random(1)
    signal = [{f"l{i}": i + draw.gauss(0, 0.5) for i in range(16)} for _ in range(20)]
    noise = [{f"l{i}": draw.expovariate(1) for i in range(16)} for _ in range(20)]
    steady, shaky = (stability(samples, draws=60, seed=4) for samples in (signal, noise))
    assert steady.kendall_tau.low > 0.9
    assert steady.corrected.mean > 0.9
    assert (steady.samples, steady.units, steady.kept) == (20, 16, 4)
    # one draw of the noise agrees with itself only as far as both resample the same samples
    assert shaky.kendall_tau.mean < 0.6
    assert shaky.corrected.mean < shaky.overlap.mean < 0.8
    assert shaky.kendall_tau.low < shaky.kendall_tau.mean < shaky.kendall_tau.high
    assert stability(noise, draws=60, seed=4) == shaky
    flat = stability([{"a": 1.0, "b": 1.0}] * 3, draws=5)
    assert math.isnan(flat.kendall_tau.mean)


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ([{"a": 1.0, "b": 2.0}], r"stability needs at least 2 samples, got 1"),
        ([{"a": 1.0}] * 3, r"stability needs at least 2 units, got 1"),
        ([{"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}], r"the same units, sample 1 differs"),
        ([{"a": 1.0, "b": math.inf}] * 2, r"a score of 'b' must be a finite number, got inf"),
    ],
)
def test_stability_says_what_is_wrong(samples, says):
    with pytest.raises(ValueError, match=says):
        stability(samples)


@pytest.mark.parametrize(
    ("preset", "total", "want"),
    [
        ("2468", 40, [2, 2, 4, 4, 6, 6, 8, 8]),  # its own sum gives its own numbers
        ("2468", 41, [2, 2, 4, 4, 6, 6, 9, 8]),
        ("2468", 20, [1, 1, 2, 2, 3, 3, 4, 4]),
        ("10-2-0-0", 24, [10, 10, 2, 2, 0, 0, 0, 0]),
        ("0000", 9, [2, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_mola_shares_a_total_in_the_presets_proportions(preset, total, want):
    plan = mola(small(8), preset, total=total)
    assert experts(plan)[::2] == want
    assert sum(want) == total


def test_mola_of_a_total_keeps_to_bounds_and_units():
    assert experts(mola(small(4), "2468", total=12, lo=2, hi=4))[::2] == [2, 3, 3, 4]
    cost = uniform(small(1), experts=1).parameters()
    plan = mola(small(8), "8642", total=40 * cost, unit="parameters")
    assert experts(plan)[::2] == [8, 8, 6, 6, 4, 4, 2, 2]
    assert plan.parameters() == 40 * cost


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=10),
    st.floats(0.05, 1.0),
    st.integers(0, 60),
    st.sampled_from(["experts", "parameters", "bytes"]),
)
def test_floe_shares_a_total_over_the_layers_it_keeps(values, keep, total, unit):
    modules = small(len(values))
    cost = {"experts": 1, "parameters": 1, "bytes": 8}[unit]
    cost *= 1 if unit == "experts" else uniform(small(1), experts=1).parameters()
    plan = floe(layer_scores(values), modules, keep=keep, total=total * cost, unit=unit)
    counts = experts(plan)[::2]
    assert counts == experts(plan)[1::2]
    assert sum(counts) == total
    kept = floe(layer_scores(values), modules, keep=keep).layers()
    shares = [n for i, n in enumerate(counts) if f"model.layers.{i}" in kept]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


def test_floe_counts_a_layers_experts_once():
    plan = floe(layer_scores([1, 2, 3, 4]), small(4), budget=8, unit="experts", experts=4)
    assert plan.layers() == ["model.layers.2", "model.layers.3"]
    with pytest.raises(ValueError, match="total cannot be given beside costs or budget"):
        floe(layer_scores([1, 2]), small(2), budget=8, total=3)
