"""Sharing totals out: exact, bounded, monotone, in every unit."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import layer_scores, small, transformer

from floe_kernels.allocation import (
    POLICIES,
    adapter_parameters,
    allocate_budget,
    allocate_experts,
    alphalora,
    experts_cost,
    uniform,
)

ROW_1 = [1.9, 2.1, 3.0, 4.2]
ROW_2 = [1.2, 2.2, 2.4, 2.6, 3.4, 3.6, 3.8, 5.0]


@pytest.mark.parametrize(
    ("scores", "total", "lo", "want"),
    [
        (ROW_1, 10, 0, [1, 1, 2, 6]),
        (ROW_1, 10, 1, [1, 2, 3, 4]),
        (ROW_2, 24, 0, [0, 1, 1, 2, 3, 4, 4, 9]),
        (ROW_2, 24, 1, [1, 2, 2, 2, 3, 3, 4, 7]),
    ],
)
def test_known_shares(scores, total, lo, want):
    assert allocate_experts(scores, total, beta=2.5, lo=lo) == want


SCORES = st.lists(
    st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 1e300, allow_subnormal=False),
    min_size=1, max_size=12,
)  # fmt: skip


@st.composite
def requests(draw):
    scores = draw(SCORES)
    lo = draw(st.integers(0, 3))
    hi = draw(st.none() | st.integers(lo, lo + 9))
    most = len(scores) * (lo + 30 if hi is None else hi)
    total = draw(st.integers(len(scores) * lo, most))
    return scores, total, draw(st.sampled_from([0.0, 0.5, 1.0, 2.5, 40.0])), lo, hi


@settings(max_examples=150, deadline=None)
@given(requests())
def test_exact_bounded_monotone(request):
    scores, total, beta, lo, hi = request
    counts = allocate_experts(scores, total, beta=beta, lo=lo, hi=hi)
    assert sum(counts) == total
    assert all(n >= lo and (hi is None or n <= hi) for n in counts)
    for s, n in zip(scores, counts, strict=True):
        for other, m in zip(scores, counts, strict=True):
            assert s <= other or n >= m or beta == 0
            assert s != other or abs(n - m) <= 1
    for i in range(1, len(scores)):  # of equal scores the earlier one is never behind
        if scores[i] == scores[i - 1]:
            assert counts[i - 1] >= counts[i]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8, unique=True), st.data())
def test_a_permutation_permutes_the_shares(scores, data):
    total = data.draw(st.integers(0, 60))
    order = data.draw(st.permutations(range(len(scores))))
    counts = allocate_experts(scores, total)
    moved = allocate_experts([scores[i] for i in order], total)
    if [counts[i] for i in order] != moved:  # then two remainders are equal to the last bit
        assert sorted(counts) == sorted(moved)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_all_zero_scores_share_equally(beta):
    assert allocate_experts([0.0] * 4, 10, beta=beta) == [3, 3, 2, 2]


def test_what_a_bound_cuts_off_goes_to_the_others():
    assert allocate_experts([100.0, 3.0, 1.0], 10, hi=4) == [4, 4, 2]
    assert allocate_experts([1.0, 0.0, 0.0], 10, hi=4) == [4, 3, 3]
    assert allocate_experts([5.0, 1.0], 4, lo=2, hi=2) == [2, 2]


def test_extreme_scores_and_powers():
    assert allocate_experts([1e308, 1e308, 0.0], 4, beta=40.0) == [2, 2, 0]
    assert allocate_experts([5e-324, 5e-324], 3) == [2, 1]
    assert allocate_experts([], 0) == []
    assert allocate_experts({"a": 1.0, "b": 3.0}, 4) == [1, 3]


@pytest.mark.parametrize(
    ("scores", "total", "keywords", "says"),
    [
        ([1.0, 2.0], 1, {"lo": 1}, r"total must be in L\*lo\.\.L\*hi = 2\.\.any number .*got 1"),
        ([1.0, 2.0], 9, {"hi": 4}, r"total must be in L\*lo\.\.L\*hi = 0\.\.8 for L = 2, got 9"),
        ([], 1, {}, r"total must be 0 where there is nothing to share, got 1"),
        ([1.0], -1, {}, r"total must be a whole number of at least 0, got -1"),
        ([1.0], 2.5, {}, r"total must be a whole number of at least 0, got 2.5"),
        ([1.0], 2, {"lo": 2, "hi": 1}, r"hi must be at least lo = 2, got 1"),
        ([1.0, -1.0], 2, {}, r"the score of 1 must be a finite number of at least 0, got -1.0"),
        ({"a": float("nan")}, 2, {}, r"the score of 'a' must be a finite number .* got nan"),
        ([1.0, float("inf")], 2, {}, r"the score of 1 must be a finite number .* got inf"),
        ([1.0], 2, {"beta": -1.0}, r"beta must be a finite number of at least 0, got -1.0"),
    ],
)
def test_says_what_is_wrong(scores, total, keywords, says):
    with pytest.raises(ValueError, match=says):
        allocate_experts(scores, total, **keywords)


def test_costs_of_experts():
    modules = small(1)
    block = list(modules.values())
    assert experts_cost(block, 3, unit="experts") == 3
    per_expert = 4 * (8 + 8) + 8 + 4 * (8 + 24) + 8
    assert experts_cost(block, 3, unit="parameters", rank=4) == 3 * per_expert
    assert experts_cost(block, 3, unit="bytes", rank=4, bytes_per_parameter=12) == 36 * per_expert
    shared = sum(adapter_parameters(m, [4, 4, 4], shared_A=True) for m in block)
    assert experts_cost(block, 3, unit="parameters", rank=4, shared_A=True) == shared
    assert shared == (4 * 8 + 3 * 4 * 8 + 3 * 8) + (4 * 8 + 3 * 4 * 24 + 3 * 8)
    with pytest.raises(ValueError, match="unit must be experts, parameters or bytes, got 'GB'"):
        experts_cost(block, 1, unit="GB")


def spent(modules, counts, per, rank=8, shared_A=False):
    return sum(
        adapter_parameters(
            spec, [rank] * counts[spec.layer if per == "layer" else name], shared_A=shared_A
        )
        for name, spec in modules.items()
    )


def test_equal_costs_spend_like_experts():
    modules, scores = transformer(8), layer_scores(ROW_2)
    for total in (0, 660_223, 660_224, 24 * 660_224, 25 * 660_224 - 1):
        counts = allocate_budget(scores, modules, total, unit="parameters", beta=2.5)
        assert list(counts.values()) == allocate_experts(ROW_2, total // 660_224, beta=2.5)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(0, 9), min_size=3, max_size=3),
    st.sampled_from(["layer", "module"]),
    st.lists(st.integers(1, 6), min_size=6, max_size=6),
    st.integers(0, 1),
    st.none() | st.integers(2, 5),
    st.booleans(),
)
@example([0.0, 0.0, 1.0], "layer", [1, 6, 6, 1, 1, 1], 0, None, True)
def test_a_budget_is_kept_and_used_up(values, per, bought, lo, hi, shared_A):
    modules = small(3)
    names = list(layer_scores(values)) if per == "layer" else list(modules)
    scores = dict(zip(names, values * 2, strict=False))
    total = spent(modules, dict(zip(names, bought, strict=False)), per, shared_A=shared_A)
    keywords = {"per": per, "lo": lo, "hi": hi, "shared_A": shared_A}
    counts = allocate_budget(scores, modules, total, unit="parameters", **keywords)
    assert spent(modules, counts, per, shared_A=shared_A) <= total
    for name in counts:
        assert counts[name] >= lo
        if hi is None or counts[name] < hi:
            more = {**counts, name: counts[name] + 1}
            assert spent(modules, more, per, shared_A=shared_A) > total
    in_bytes = allocate_budget(scores, modules, total * 8, unit="bytes", **keywords)
    assert in_bytes == counts

    def shared_out(experts):
        return dict(zip(names, allocate_experts(scores, experts, lo=lo, hi=hi), strict=True))

    # it holds the rule's own allocation of some number of experts, the next of which is too dear
    most = len(names) * hi if hi is not None else sum(counts.values())
    fits = [
        n
        for n in range(len(names) * lo, most + 1)
        if all(a <= b for a, b in zip(shared_out(n).values(), counts.values(), strict=True))
    ]
    assert any(
        n == most or spent(modules, shared_out(n + 1), per, shared_A=shared_A) > total for n in fits
    )


def test_a_budget_too_small_for_its_lower_bound():
    with pytest.raises(ValueError, match=r"total must pay lo = 1 experts everywhere, .* got 100"):
        allocate_budget(layer_scores([1, 2]), small(2), 100, unit="parameters", lo=1)


def test_no_expert_leaves_a_module_untouched_and_one_expert_drops_top_k():
    plan = alphalora(layer_scores([0.0, 1.0, 5.0]), small(3), total=6, beta=1.0, lo=0, top_k=2)
    assert [p.experts for p in plan.placements.values()] == [1, 1, 5, 5]
    assert [p.top_k for p in plan.placements.values()] == [1, 1, 2, 2]
    assert plan.layers() == ["model.layers.1", "model.layers.2"]


@pytest.mark.parametrize(("shared_A", "top_k"), [(False, 2), (True, 3)])
def test_top_k_by_default(shared_A, top_k):
    plan = uniform(small(1), experts=3, shared_A=shared_A)
    assert {p.top_k for p in plan.placements.values()} == {top_k}


def test_ranks_by_layer_or_module():
    modules = small(2)
    ranks = {"model.layers.0": 4, "model.layers.1.q": 2, "model.layers.1": 16}
    plan = uniform(modules, experts=1, rank=ranks)
    assert [p.ranks for p in plan.placements.values()] == [(4,), (4,), (2,), (16,)]
    with pytest.raises(ValueError, match=r"rank must be given for every module .*layers.1.q' has"):
        uniform(modules, experts=1, rank={"model.layers.0": 4})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"top_k": 5}, ValueError, r"top_k must be in 1\.\.E = 1\.\.4, got 5"),
        ({"top_k": 0}, ValueError, r"top_k must be a whole number of at least 1, got 0"),
        ({"rank": 0}, ValueError, r"rank must be a whole number of at least 1, got 0"),
        ({"per": "head"}, ValueError, r"per must be layer or module, got 'head'"),
        ({"lora_alfa": 8}, TypeError, r"a policy has no keyword 'lora_alfa' \(nearest: lora_alpha"),
    ],
)
def test_options_are_checked(options, error, says):
    with pytest.raises(error, match=says):
        uniform(small(2), **options)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_hands_its_options_on(name):
    keywords = {
        "floe": {"scores": layer_scores([1.0, 2.0])},
        "lora_smoe": {"scores": {"task": {m: float(i) for i, m in enumerate(small(2))}}},
        "alphalora": {"scores": layer_scores([1.0, 2.0]), "total": 8},
        "layerif": {"scores": layer_scores([1.0, 2.0]), "total": 8},
    }.get(name, {})
    options = {
        "rank": 2, "top_k": 1, "lora_alpha": 4, "lora_dropout": 0.5, "shared_A": True,
        "use_rslora": True, "base_model": "b", "fingerprint": "f", "provenance": {"mine": 1},
    }  # fmt: skip
    plan = POLICIES[name](modules=small(2), **keywords, **options)
    assert plan.placements
    assert all(set(p.ranks) == {2} and p.top_k == 1 for p in plan.placements.values())
    for key in ("lora_alpha", "lora_dropout", "shared_A", "use_rslora", "base_model"):
        assert getattr(plan, key) == options[key]
    assert plan.fingerprint == "f"
    assert plan.provenance["mine"] == 1
    assert plan.provenance["per"] in ("layer", "module")
    assert plan.provenance["arguments"]
    assert type(plan).from_json(plan.to_json()) == plan
