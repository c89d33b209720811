"""floe: top-K, the knapsack against brute force, refinement that never loses."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import layer_scores, small, transformer

from floe_kernels.allocation import adapter_parameters, floe, knapsack, refine, removal_loss


@pytest.mark.parametrize(
    ("keep", "layers", "kept"),
    [(0.25, 32, 8), (0.25, 30, 8), (0.07, 100, 7), (1, 5, 5), (1e-9, 5, 1)],
)
def test_keeps_the_best_fraction_rounded_up(keep, layers, kept):
    scores = [math.sin(i) for i in range(layers)]
    plan = floe(layer_scores(scores), small(layers), keep=keep)
    best = sorted(range(layers), key=lambda i: -scores[i])[:kept]
    assert plan.layers() == [f"model.layers.{i}" for i in sorted(best)]
    assert all(p.ranks == (8,) * 4 for p in plan.placements.values())
    assert len(plan.placements) == 2 * kept


def test_ties_keep_model_order():
    plan = floe(layer_scores([1, 2, 2, 1, 2, 2]), small(6), keep=0.5)
    assert plan.layers() == ["model.layers.1", "model.layers.2", "model.layers.4"]
    costs = layer_scores([1.0] * 6)
    for keywords in ({"budget": 3}, {"keep": 0.5}):
        paid = floe(layer_scores([1, 2, 2, 1, 2, 2]), small(6), costs=costs, **keywords)
        assert paid.placements == plan.placements


def test_decides_per_module_or_sums_modules_to_layers():
    modules = small(3)
    scores = dict(zip(modules, [0.0, 5.0, 3.0, 3.0, 4.0, 0.0], strict=True))
    assert list(floe(scores, modules, keep=0.3).placements) == [
        "model.layers.0.up",
        "model.layers.2.q",
    ]
    assert floe(scores, modules, keep=0.3, per="layer").layers() == ["model.layers.1"]


@pytest.mark.parametrize(
    ("scores", "keywords", "says"),
    [
        ({"model.layers.0": 1.0}, {}, r"scores must name every layer .*'model.layers.1' is mis"),
        ({}, {}, r"scores must name every module .*'model.layers.0.q' is missing \(4 of 4 are\)"),
        (
            layer_scores([1, 2, 3]), {},
            r"scores must all name layers or all name modules of the model, got 'model.layers.2' ",
        ),
        (layer_scores([1, math.nan]), {}, r"the score of 'model.layers.1' must be .* got nan"),
        (layer_scores([1, 2]), {"keep": 0}, r"keep must be in \(0, 1\], got 0"),
        (layer_scores([1, 2]), {"keep": 1.1}, r"keep must be in \(0, 1\], got 1.1"),
        (layer_scores([1, 2]), {"experts": 0}, r"experts must be .* at least 1, got 0"),
        (layer_scores([1, 2]), {"per": "module"}, r"scores must be per module .*got scores per la"),
        (layer_scores([1, 2]), {"costs": {"x": 1}}, r"costs must name units of the model, got 'x'"),
        (layer_scores([1, 2]), {"costs": layer_scores([1])}, r"costs .*layers.1' is missing"),
        (layer_scores([1, 2]), {"costs": layer_scores([1, 0])}, r"cost 1 must be above 0, got 0"),
        (layer_scores([1, 2]), {"gradients": [[1.0]]}, r"N samples by L = 2 units, got \[1\]"),
        (layer_scores([1, 2]), {"gradients": []}, r"gradients must hold at least one sample"),
        (
            layer_scores([1, 2]), {"gradients": {"model.layers.0": [1.0]}},
            r"gradients must name every unit, 'model.layers.1' is missing",
        ),
        (
            layer_scores([1, 2]),
            {"gradients": {"model.layers.0": [1.0], "model.layers.1": [1.0, 2.0]}},
            r"every unit needs the same number of samples, got \[1, 2\]",
        ),
    ],
)  # fmt: skip
def test_says_what_is_wrong(scores, keywords, says):
    with pytest.raises(ValueError, match=says):
        floe(scores, small(2), **keywords)


def brute_force(scores, costs, budget):
    """The best set: highest score, then cheapest, then earliest."""
    sets = (
        s for n in range(len(scores) + 1) for s in itertools.combinations(range(len(scores)), n)
    )
    feasible = [s for s in sets if sum(costs[i] for i in s) <= budget]
    return max(
        feasible,
        key=lambda s: (
            sum(scores[i] for i in s),
            -sum(costs[i] for i in s),
            [i in s for i in range(len(scores))],
        ),
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(0, 40),
)
def test_the_knapsack_is_exact(items, budget):
    scores, costs = zip(*items, strict=True)
    assert tuple(knapsack(scores, costs, budget)) == brute_force(scores, costs, budget)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=9),
    st.floats(0, 3),
)
def test_the_knapsack_is_exact_for_any_numbers(items, budget):
    scores, costs = zip(*items, strict=True)
    chosen = knapsack(scores, costs, budget)
    assert sum(costs[i] for i in chosen) <= budget * (1 + 1e-12)
    best = brute_force(scores, costs, budget * (1 - 1e-12))
    assert sum(scores[i] for i in chosen) >= sum(scores[i] for i in best) * (1 - 1e-12)


def test_the_knapsack_counts_decimals_as_they_are_written():
    assert knapsack([1.0, 1.0, 1.0], [0.1, 0.1, 0.1], 0.3) == [0, 1, 2]


def test_the_knapsack_of_a_whole_model():
    modules = transformer(32)
    costs = [adapter_parameters(spec, [8] * 4) for spec in modules.values()]
    scores = [1 + math.sin(37 * i) for i in range(len(costs))]
    chosen = knapsack(scores, costs, sum(costs) // 4)
    assert sum(costs[i] for i in chosen) <= sum(costs) // 4
    by_ratio = sorted(range(len(costs)), key=lambda i: -scores[i] / costs[i])
    greedy, room = 0.0, sum(costs) // 4
    for i in by_ratio:
        if costs[i] <= room:
            greedy, room = greedy + scores[i], room - costs[i]
    assert sum(scores[i] for i in chosen) >= greedy


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([1.0], [1, 2], 3), r"every item needs one cost, got 2 for 1 items"),
        (([1.0], [-1], 3), r"cost 0 must be above 0, got -1"),
        (([1.0], [1], -3), r"budget must be at least 0, got -3"),
        (([math.inf], [1], 3), r"score 0 must be a finite number, got inf"),
        (([1.0], [math.nan], 3), r"cost 0 must be a finite number, got nan"),
    ],
)
def test_the_knapsack_says_what_is_wrong(arguments, says):
    with pytest.raises(ValueError, match=says):
        knapsack(*arguments)


def test_the_knapsack_gives_up_loudly():
    costs = [2**20 + 2**i for i in range(20)]  # every subset costs another sum
    with pytest.raises(ValueError, match=r"at most 50 undominated sums, got \d+: round the costs"):
        knapsack([c / 1000 for c in costs], costs, sum(costs) // 2, max_states=50)


def test_a_budget_in_parameters_is_kept():
    modules = small(6)
    per_layer = sum(
        adapter_parameters(modules[f"model.layers.0.{n}"], [8] * 4) for n in ("q", "up")
    )
    scores = layer_scores([3, 1, 4, 1, 5, 9])
    plan = floe(scores, modules, budget=2 * per_layer + 1)
    assert plan.layers() == ["model.layers.4", "model.layers.5"]
    assert plan.parameters() == 2 * per_layer
    assert floe(scores, modules, budget=16 * per_layer, unit="bytes").layers() == plan.layers()
    assert floe(scores, modules, budget=per_layer - 1).layers() == []


GRADIENTS = st.integers(2, 7).flatmap(
    lambda L: st.lists(
        st.lists(st.floats(-9, 9) | st.sampled_from([0.0, 1.0, -1.0]), min_size=L, max_size=L),
        min_size=1, max_size=6,
    )
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(GRADIENTS, st.data())
def test_refinement_never_loses(gradients, data):
    L = len(gradients[0])
    kept = data.draw(st.sets(st.integers(0, L - 1)))
    result = refine(gradients, kept)
    assert len(result.kept) == len(kept)
    assert result.before == removal_loss(gradients, kept)
    assert result.after == removal_loss(gradients, result.kept) <= result.before
    assert (result.swaps > 0) == (result.kept != sorted(kept)) or result.after == result.before
    best = min(removal_loss(gradients, s) for s in itertools.combinations(range(L), len(kept)))
    assert result.after >= best
    for out in result.kept:  # no single exchange is left that would gain
        for back in set(range(L)) - set(result.kept):
            other = removal_loss(gradients, (set(result.kept) - {out}) | {back})
            assert other >= result.after - 1e-9 * max(1.0, result.before)


def test_refinement_sees_layers_that_act_together():
    # 0 and 1 cancel, so they may go together although each alone matters most
    gradients = [[5.0, -5.0, 1.0, 1.0], [4.0, -4.0, 1.0, 1.0]]
    scores = [sum(row[i] ** 2 for row in gradients) for i in range(4)]
    plan = floe(layer_scores(scores), small(4), keep=0.5, gradients=gradients)
    assert plan.layers() == ["model.layers.2", "model.layers.3"]
    assert plan.provenance["refinement"] == {
        "kept_before": ["model.layers.0", "model.layers.1"],
        "loss_before": 4.0,
        "loss_after": 0.0,
        "swaps": 2,
    }
    by_name = {f"model.layers.{i}": [row[i] for row in gradients] for i in range(4)}
    assert floe(layer_scores(scores), small(4), keep=0.5, gradients=by_name) == plan
    unrefined = floe(layer_scores(scores), small(4), keep=0.5, gradients=gradients, refine=False)
    assert unrefined.layers() == ["model.layers.0", "model.layers.1"]


@settings(max_examples=60, deadline=None)
@given(GRADIENTS, st.data())
def test_refinement_keeps_to_its_budget(gradients, data):
    L = len(gradients[0])
    costs = data.draw(st.lists(st.integers(1, 5), min_size=L, max_size=L))
    kept = data.draw(st.sets(st.integers(0, L - 1)))
    budget = sum(costs[i] for i in kept) + data.draw(st.integers(0, 3))
    result = refine(gradients, kept, costs=costs, budget=budget)
    assert sum(costs[i] for i in result.kept) <= budget
    assert result.after <= result.before


def test_refinement_pays_for_every_exchange():
    gradients = [[1.0 * (i < 3) * (i + 1 == n) for i in range(6)] for n in range(4)]
    gradients = [[0.0] * 3 + [g * 9 for g in row[:3]] for row in gradients]
    costs = [1, 1, 1, 2, 2, 2]  # what matters is dear, and only one exchange can be paid
    assert refine(gradients, [0, 1, 2], costs=costs, budget=4).kept == [1, 2, 3]
    assert refine(gradients, [0, 1, 2], costs=costs, budget=5).kept == [2, 3, 4]
    assert refine(gradients, [0, 1, 2]).kept == [3, 4, 5]


@pytest.mark.parametrize(
    ("gradients", "kept", "says"),
    [
        ([[1.0, 2.0], [1.0]], [0], r"N samples by L = 2 layers, got 1 numbers in sample 1"),
        ([[1.0, math.nan]], [0], r"a gate gradient must be a finite number, got nan"),
        ([[1.0, 2.0]], [2], r"a kept index must be in 0\.\.L-1 = 0\.\.1, got 2"),
        ([[1.0, 2.0]], [-1], r"a kept index must be a whole number of at least 0, got -1"),
    ],
)
def test_refinement_says_what_is_wrong(gradients, kept, says):
    with pytest.raises(ValueError, match=says):
        refine(gradients, kept)
