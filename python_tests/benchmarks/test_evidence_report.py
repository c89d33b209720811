"""The report on experiments: what a few made-up lines come to, and what is said where they lack."""

import json
import math
import re
import sys

import pytest

from benchmarks.evidence import config, intervals, regret, report, rules, tables

LAYERS = 8


def line(method, seed, loss, *, dataset="arc", base=3.0, layers=(0, 1), accuracy=0.5, **more):
    return {
        "event": "run", "dataset": dataset, "method": method, "seed": seed, "setting": "s",
        "base_loss": base, "loss": loss, "accuracy": accuracy, "base_accuracy": 0.4, "tokens": 100,
        "questions": 300, "layers": list(layers), "experts_by_layer": [1.0] * LAYERS, "scores": {},
        "parameters": 2_000_000, "seconds": 70.0, "cpu_seconds": 80.0, "wall_seconds": 80.0,
        "peak_bytes": 10**9, "machine": "CPU", "threads": 2, "commit": "abc", **more,
    }  # fmt: skip


@pytest.fixture
def lines():
    """FLoE keeps 95 % of the gain and beats both draws; bottom loses to them."""
    found = []
    for dataset in ("arc", "book"):
        for seed, noise in enumerate((0.0, 0.01, -0.01)):
            for method, loss in (
                ("all", 2.0), ("floe:init", 2.05), ("random:0", 2.2), ("random:1", 2.3),
                ("bottom:init", 2.6),
            ):  # fmt: skip
                wobble = noise * (1 + (method == "floe:init") * 0.1)
                chosen = range(LAYERS) if method == "all" else (1, 2, 3, 6)
                found.append(line(method, seed, loss + wobble, dataset=dataset, layers=chosen))
    return found


def test_a_t_interval_is_student_s():
    # sd 1, n 3: half width 4.3027 / sqrt 3
    mean, low, high, runs = intervals.t_interval([1.0, 2.0, 3.0])
    assert (mean, runs) == (2.0, 3)
    assert high - mean == mean - low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-4)
    assert intervals.t_interval([5.0]) == (5.0, None, None, 1)


def test_the_interval_does_without_scipy(monkeypatch):
    pytest.importorskip("scipy")
    exact = [intervals.t_quantile(n) for n in range(1, 60)]
    monkeypatch.setitem(sys.modules, "scipy", None)
    found = [intervals.t_quantile(n) for n in range(1, 60)]
    assert found == pytest.approx(exact, abs=6e-4)  # the table has three digits


def test_a_share_of_questions_has_wilson_s_interval():
    # Newcombe 1998, table I: 81 of 263
    _, low, high, _ = intervals.binomial_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_rankings_by_samples_that_agree_are_the_same():
    rows = [{"a": 1.0 + 0.01 * i, "b": 3.0, "c": 2.0} for i in range(6)]
    found = intervals.agreement(rows, 3, keep=0.3, draws=4, seed=0)
    assert found["tau"] == found["overlap"] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="need 8, got 6"):
        intervals.agreement(rows, 4, keep=0.3, draws=4, seed=0)


def test_the_gain_retained_is_seed_by_seed(lines):
    arc = tables.by_method(tables.by_dataset(lines)["arc"])
    shares = tables.retained(arc["floe:init"], arc["all"])
    assert shares[0] == pytest.approx(0.95)
    assert shares[1] == pytest.approx((3 - 2.061) / (3 - 2.01))
    assert tables.best_random(arc) == "random:0"


def test_findings_name_winner_and_goal(lines):
    found = tables.training_findings(lines)
    assert "arc: lowest loss by floe:init (2.0500), 0.95" in found[0]
    assert "beyond chance: floe:init; worse: bottom:init." in found[0]
    assert "is met by: floe:init (arc, book)" in tables.goal_findings(lines)[0]


def test_one_seed_or_one_data_set_meets_no_goal(lines):
    first = [x for x in lines if x["seed"] == 0]
    assert "One seed has no interval" in tables.training_findings(first)[0]
    assert "cannot be judged yet" in tables.goal_findings(first)[0]
    arc = [x for x in lines if x["dataset"] == "arc"]
    assert "is met by: none." in tables.goal_findings(arc)[0]


def test_a_table_says_what_a_method_costs(lines):
    rows = tables.training_table(tables.by_dataset(lines)["arc"]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells[2:]] == [
        "all", "floe:init", "random:0", "random:1", "bottom:init",
    ]  # fmt: skip
    assert cells[2][7] == "all"
    assert cells[3][7:] == ["1-3, 6", "2.00", "80", "1.00"]
    assert cells[3][4].startswith("0.1500 (0.14")


def test_definitions_are_compared_by_seed():
    scores = {f"h.{i}": float(i) for i in range(4)}
    turned = {name: -value for name, value in scores.items()}
    lines = [
        line("definition:sequence", 0, 2.0, scores=scores, layers=[3]),
        line("definition:token", 0, 2.1, scores=turned, layers=[0]),
        line("definition:token", 1, 2.1, scores=turned, layers=[0]),
    ]
    row = tables.definition_table(lines).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["arc", "sequence", "token", "-1.00", "-0.33", "0.1000"]


def test_stability_says_how_many_samples_are_enough():
    def one(corrected):
        return {"tau": [0.9, 0.8, 1.0], "overlap": [0.9, 0.8, 1.0], "corrected": corrected}

    sizes = {"4": one([0.5, 0.1, 0.9]), "16": one([0.85, 0.7, 1.0])}
    lines = [line("stability:init", 0, 0.0, agreement=sizes)]
    assert "arc, init: 16 samples are enough" in tables.stability_findings(lines)[0]
    assert "16 are not enough" in tables.stability_findings(lines, enough=0.9)[0]
    assert "0.90 / 0.50 | 0.90 / 0.85" in tables.stability_table(lines)


def test_a_search_that_tried_everything_has_no_regret():
    pytest.importorskip("optuna")
    ranks = (2, 4, 8)
    lines = [
        line(f"rank:{a}-{b}", 0, abs(a - 4) + 0.1 * b) for a in ranks for b in ranks
    ]  # fmt: skip
    grid = regret.grid_losses(lines)[0]
    assert regret.is_whole(grid, ranks, 2)
    curve = regret.regrets(grid, ranks, 2, "random", seed=0)
    assert len(curve) == 9
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == 0
    assert regret.mean_regrets(lines[:-1], ranks, 2) == {}


def test_matrices_are_compared_with_matrices_drawn_by_chance():
    losses = {"all": 1.0, "random:0": 1.5, "random:matrices": 1.4, "matrices:init": 1.3}
    lines = [line(name, seed, loss) for name, loss in losses.items() for seed in (0, 1)]
    (found,) = tables.training_findings(lines)
    assert "the best of 1 random draws, random:0," in found
    assert "matrices:init is below matrices drawn by chance by 0.1000 (0.1000 to 0.1000)" in found


CONFIG = """
title = "Which layers?"
left_out = "For time: the middle layers."
methods = ["all", "floe:init", "random:0", "random:1", "bottom:init"]
seeds = [0, 1, 2]
[[datasets]]
label = "arc"
train = "stdlib"
[[datasets]]
label = "book"
train = "stdlib"
[options]
steps = 4
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "layers.toml").write_text(CONFIG)
    (tmp_path / "results").mkdir()
    return tmp_path


def write(folder, lines):
    chosen = config.load("layers", folder)
    settings = {data.label: chosen.setting(data) for data in chosen.datasets}
    rows = [{**x, "setting": settings[x["dataset"]]} for x in lines]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "results" / "layers.jsonl").write_text(text)
    written = report.write(folder, folder / "results", folder / "EVIDENCE.md")
    return (folder / "EVIDENCE.md").read_text(), written


def test_the_report_says_so_without_lines(folder):
    report.write(folder, folder / "results", folder / "EVIDENCE.md")
    text = (folder / "EVIDENCE.md").read_text()
    assert "No line yet: all 30 runs are missing." in text
    assert "Left out. For time: the middle layers." in text
    assert "![" not in text


def test_the_report_is_the_same_from_the_same_lines(folder, lines):
    pytest.importorskip("matplotlib")
    text, written = write(folder, lines)
    assert "Missing" not in text
    assert "is met by: floe:init (arc, book)" in text
    assert "![layers](results/layers.svg)" in text
    assert "30 runs, 0.7 h; CPU, 2 threads; commit abc." in text
    picture = written[1].read_bytes()
    assert re.search(rb"<svg", picture)
    assert write(folder, lines)[0] == text
    assert written[1].read_bytes() == picture


def test_the_report_counts_what_is_missing_or_stale(folder, lines):
    pytest.importorskip("matplotlib")
    chosen = config.load("layers", folder)
    some = [x for x in lines if x["seed"] == 0 and x["method"] != "bottom:init"]
    text, _ = write(folder, some)
    assert "Missing: 22 of 30 runs (bottom:init, all, floe:init, random:0, random:1)." in text
    of_now = {**lines[0], "setting": chosen.setting(chosen.data(lines[0]["dataset"]))}
    stale = [{**of_now, "setting": "old"}, {**of_now, "method": "experts:1"}]
    path = folder / "results" / "layers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in stale))
    report.write(folder, folder / "results", folder / "EVIDENCE.md")
    text = (folder / "EVIDENCE.md").read_text()
    assert "2 lines are of another setting or method and left out" in text
    assert f"all {len(chosen.runs())} runs are missing" in text


# gates: a and b always move together, c by itself, d hardly at all
GATES = [[3.0, 3.0, 1.0, 0.1], [-3.0, -3.0, 1.0, 0.1], [3.0, 3.0, -1.0, 0.0]]
SCORES = {"a": 9.0, "b": 8.9, "c": 1.0, "d": 0.1}


def test_a_redundant_layer_is_left_out():
    assert rules.best(SCORES, 2) == ["a", "b"]
    assert rules.less_redundant(SCORES, GATES, 2, penalty=0) == ["a", "b"]
    assert rules.less_redundant(SCORES, GATES, 2) == ["a", "c"]
    assert rules.most_explained(list(SCORES), GATES, 2) == ["a", "c"]
    assert rules.block_fisher(GATES)[0][0] == pytest.approx(9.0)


def test_spread_out_layers_are_the_best_of_their_stretch():
    assert rules.spread_out({"a": 1.0, "b": 9.0, "c": 8.0, "d": 3.0}, 2) == ["b", "c"]


def test_spaced_layers_leave_the_worst_third_out():
    scores = {name: float(score) for name, score in zip("abcdef", (6, 1, 5, 4, 2, 3), strict=True)}
    assert rules.spaced_above(scores, 2) == ["c", "f"]  # of a, c, d, f
    assert rules.spaced_above(scores, 6) == list(scores)
    assert rules.spaced_above(scores, 2, without=0) == ["b", "e"]  # of all six


def test_matrices_fill_a_budget_by_falling_score():
    costs = {"a": 5, "b": 4, "c": 3, "d": 1}
    assert rules.within(SCORES, costs, 8) == ["a", "c"]
    assert rules.priced(SCORES, costs, "by_root")["b"] == pytest.approx(4.45)
    assert rules.priced(SCORES, costs, "by_cost")["b"] == pytest.approx(2.225)
