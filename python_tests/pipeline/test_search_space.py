"""Searching more than a rank: experts, fractions, depth groups, two objectives, a whole grid."""

import json
import multiprocessing
import types

import pytest
import torch

from floe_kernels.integrations.transformers import find_modules
from floe_kernels.pipeline import search, workbench
from floe_kernels.pipeline.encoding import Samples
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.report import render
from floe_kernels.pipeline.runs import load_run, open_run
from floe_kernels.pipeline.search import search_rank, trial_plan
from floe_kernels.pipeline.search_judge import judge_samplers
from floe_kernels.pipeline.tune import tune

SAMPLES = Samples.of([(list(range(3, 11)), 1) for _ in range(24)])
SCORES = {f"model.layers.{i}": float(i) for i in range(4)}


@pytest.fixture(scope="module")
def model(model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@pytest.fixture
def priced(monkeypatch):
    """Training does nothing; the loss is a function of what was adapted, lowest in the middle."""
    seen = []

    def loss(model, *_args, **_keywords):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seen.append(trained)
        return types.SimpleNamespace(loss=abs(trained / 5000 - 1) + 1)

    monkeypatch.setattr(search, "train", lambda *_args, **_keywords: None)
    monkeypatch.setattr(search, "evaluate", loss)
    return seen


def asked(**changes):
    return Options(**{"ranks": "2,4,8", "experts": 2, "trials": 6, "search_samples": 12, **changes})


def test_a_mixed_space_is_what_the_trials_adapt(model, priced):
    options = asked(search_experts="1,2,4", search_keep="0.25,1.0", sampler="tpe")
    found = search_rank(model, find_modules(model), SAMPLES, options, scores=SCORES)
    assert {tuple(t["params"]) for t in found.trials} == {("rank", "experts", "keep")}
    assert [t["parameters"] for t in found.trials] == priced
    assert len({json.dumps(t["params"]) for t in found.trials}) == 6
    for trial in found.trials:
        plan = trial_plan(find_modules(model), options, trial["params"], SCORES)
        layers = 1 if trial["params"]["keep"] == 0.25 else 4
        assert plan.layers() == list(SCORES)[-layers:]
        assert {p.experts for p in plan.placements.values()} == {trial["params"]["experts"]}


def test_groups_by_depth_have_a_rank_each(model, priced):
    options = asked(groups=2, trials=4, sampler="tpe")
    found = search_rank(model, find_modules(model), SAMPLES, options)
    config = found.best_params
    assert list(config) == ["rank_0", "rank_1"]
    plan = trial_plan(find_modules(model), options, {"rank_0": 2, "rank_1": 8})
    ranks = {plan.modules[n].layer: p.ranks for n, p in plan.placements.items()}
    assert ranks == {f"model.layers.{i}": (2, 2) if i < 2 else (8, 8) for i in range(4)}
    assert plan.lora_alpha == 2 * 5  # twice the mean


def test_two_objectives_have_a_front(model, priced):
    options = asked(objectives="loss,parameters", sampler="grid", search_experts="1,2")
    found = search_rank(model, find_modules(model), SAMPLES, options)
    assert found.completed == 6
    values = [t["value"] for t in found.trials]
    assert all(v[1] == t["parameters"] for v, t in zip(values, found.trials, strict=True))
    on_front = {t["number"] for t in found.front}
    for t in found.trials:
        beaten = any(
            o[0] <= t["value"][0] and o[1] <= t["value"][1] and o != t["value"] for o in values
        )
        assert (t["number"] in on_front) != beaten
    assert found.best["value"][0] == min(v[0] for v in values)


def test_a_grid_tries_every_point_whatever_the_trials(model, priced):
    options = asked(sampler="grid", trials=1, search_experts="1,2")
    found = search_rank(model, find_modules(model), SAMPLES, options)
    assert found.completed == 6
    assert found.best["value"] == min(t["value"] for t in found.trials)


def test_samplers_are_judged_by_the_grid():
    space = {"rank": (2, 4, 8, 16, 32), "experts": (1, 2, 4)}
    trials = [
        {"params": {"rank": r, "experts": e}, "value": abs(r - 8) + abs(e - 2), "state": "complete"}
        for r in space["rank"]
        for e in space["experts"]
    ]
    judged = judge_samplers(trials, space, samplers=("tpe", "random"))
    assert list(judged) == ["tpe", "random"]
    assert all(1 <= mean <= 15 for mean in judged.values())
    assert judge_samplers(trials[:2], space) == {}
    lone = [{**t, "state": "failed", "value": None} for t in trials]
    assert judge_samplers(lone, space) == {}


def work(folder, model_folder, storage):
    """One process of a search: a second one on the same file takes the other points."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.requires_grad_(False)
    mine = []
    search.train = lambda *_args, **_keywords: None
    search.evaluate = lambda model, *_args, **_keywords: types.SimpleNamespace(
        loss=float(sum(p.numel() for p in model.parameters() if p.requires_grad))
    )
    found = search_rank(
        model, find_modules(model), SAMPLES, asked(ranks="1,2,4,8,16,32", sampler="grid"),
        storage=storage, on_trial=lambda t: mine.append(t["params"]["rank"]),
    )  # fmt: skip
    folder.write_text(json.dumps([mine, found.completed]))


def test_two_processes_share_a_file_of_trials(model_folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    both = [
        context.Process(target=work, args=(out, model_folder, tmp_path / "shared.journal"))
        for out in outs
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(150)
        assert process.exitcode == 0
    (mine, seen), (others, also) = (json.loads(out.read_text()) for out in outs)
    assert seen == also == 6
    assert sorted(mine + others) == [1, 2, 4, 8, 16, 32]


def test_a_run_takes_what_was_found_and_reports_it(model_folder, data_file, tmp_path, monkeypatch):
    options = Options(
        model=str(model_folder), data=str(data_file), dtype="float32", length=32, ranks="2,4",
        search_experts="1,2", search_keep="0.5,1.0", objectives="loss,parameters", trials=3,
        search_steps=1, search_samples=8, score_samples=4, steps=1, eval_samples=4,
    )  # fmt: skip
    with open_run(tmp_path / "run", "tune", options.to_json()) as run:
        tune(run, options)
    config = run.state["search"]["config"]
    plan = run.state["plan"]
    assert len(plan["layers"]) == round(4 * config["keep"])
    assert {t["event"] for t in run.history.of("trial")} == {"trial"}
    page = render(load_run(tmp_path / "run"))
    assert "Pareto front" in page
    assert "on the front" in page
    # resumed, it decides as before and trains nothing
    monkeypatch.setattr(workbench, "train", None)
    monkeypatch.setattr(workbench, "search_rank", None)
    with open_run(tmp_path / "run", "tune", {}, resume=True) as run:
        tune(run, options)
    assert run.state["plan"] == plan


def test_a_grid_run_judges_the_samplers(model_folder, data_file, tmp_path, monkeypatch):
    options = Options(
        model=str(model_folder), data=str(data_file), dtype="float32", length=32, ranks="1,2,4",
        sampler="grid", trials=1, search_steps=1, search_samples=8, score_samples=4, steps=1,
        eval_samples=4, groups=1,
    )  # fmt: skip
    with open_run(tmp_path / "run", "tune", options.to_json()) as run:
        tune(run, options)
    assert run.state["search"]["completed"] == 3
    judged = run.state["search"]["judged"]
    assert list(judged) == ["gp", "tpe", "random"]
    assert all(1 <= mean <= 3 for mean in judged.values())
    assert "the samplers can be judged by it" in render(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_experts": "2,2"}, "--search-experts must be different whole numbers >= 1"),
        ({"search_experts": "0"}, "--search-experts must be"),
        ({"search_experts": "x"}, "--search-experts must be"),
        ({"search_keep": "0.5,2"}, r"--search-keep must be different numbers in \(0, 1\]"),
        ({"search_keep": "half"}, "--search-keep must be"),
        ({"search_keep": "nan"}, "--search-keep must be"),
        ({"groups": 0}, "--groups must be >= 1, got 0"),
        ({"objectives": "time"}, "--objectives must be one of loss, loss,parameters, got 'time'"),
        ({"percent": 101.0}, r"--percent must be in 0\.\.100, got 101\.0"),
        ({"lo": -2}, "--lo must be >= -1, got -2"),
    ],
)
def test_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        asked(**changes)
