"""From data to adapter on a tiny model: what a run leaves, and that the parts agree."""

import html.parser
import json
import re

import pytest
import torch

from floe_kernels.allocation import Plan
from floe_kernels.integrations.transformers import load_adapter
from floe_kernels.pipeline import report, workbench
from floe_kernels.pipeline.evaluation import evaluate
from floe_kernels.pipeline.models import load_model
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.results import results
from floe_kernels.pipeline.runs import load_run, open_run
from floe_kernels.pipeline.tune import load_dataset, train_plan, tune

SMALL = {
    "dtype": "float32", "length": 32, "ranks": "2,4", "trials": 2, "search_steps": 2,
    "search_samples": 8, "score_samples": 8, "steps": 4, "experts": 2, "eval_every": 2,
    "learning_rate": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def options(model_folder, data_file):
    return Options(model=str(model_folder), data=str(data_file), **SMALL)


@pytest.fixture(scope="module")
def folder(options, tmp_path_factory):
    """A finished run with comparisons."""
    folder = tmp_path_factory.mktemp("run") / "a <b> & {c}"
    options = Options(**{**options.to_json(), "compare": True})
    with open_run(folder, "tune", options.to_json()) as run:
        tune(run, options)
    return folder


def test_a_run_leaves_everything(folder):
    left = {path.name for path in folder.iterdir()}
    assert {"plan.json", "history.jsonl", "report.html", "config.json", "state.json"} <= left
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter.json", "adapter.safetensors",
    }  # fmt: skip
    assert not list((folder / "checkpoints").iterdir())
    run = load_run(folder)
    assert [t["state"] for t in run.history.of("trial")] == ["complete", "complete"]
    for name in ("all", "floe", "random"):
        assert [line["step"] for line in run.history.of("step", run=name)] == [1, 2, 3, 4]
        assert [line["step"] for line in run.history.of("evaluation", run=name)] == [2, 4]


def test_the_plan_keeps_the_layers_that_score_highest(folder):
    run, plan = load_run(folder), Plan.load(folder / "plan.json")
    scores = run.state["score"]["scores"]
    assert len(scores) == 4
    assert plan.layers() == [max(scores, key=scores.get)] == run.state["plan"]["layers"]
    ranks = {r for p in plan.placements.values() for r in p.ranks}
    assert ranks == {run.state["search"]["rank"]}
    assert plan.provenance["search"]["completed"] == 2
    assert plan.lora_alpha == 2 * run.state["search"]["rank"]


def test_the_adapter_gives_the_loss_that_was_reported(folder, options):
    loaded = load_model(options)
    dataset = load_dataset(options, loaded.tokenizer)
    base = evaluate(loaded.model, dataset.held_out, pad=dataset.pad).loss
    load_adapter(loaded.model, folder / "adapter")
    adapted = evaluate(loaded.model, dataset.held_out, pad=dataset.pad).loss
    state = load_run(folder).state
    assert base == state["base"]["loss"]
    assert adapted == state["trained"]["floe"]["loss"] != base


def test_the_table_has_the_four_configurations(folder):
    rows = results(load_run(folder).state)
    assert [row.title for row in rows] == [
        "base model", "MoE-LoRA, all 4 layers", "FLoE, 1 of 4 layers", "random, 1 of 4 layers",
    ]  # fmt: skip
    everywhere, sparse = rows[1], rows[2]
    assert sparse.parameters * 4 == everywhere.parameters
    assert everywhere.seconds > 0
    assert everywhere.peak > 1e8
    expected = (rows[0].loss - sparse.loss) / (rows[0].loss - everywhere.loss)
    assert sparse.gain == pytest.approx(expected) or everywhere.loss >= rows[0].loss


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag in self.open[-1:]:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_well_formed_page_that_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4
    assert page.tags.count("table") >= 4
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|url\((?!#)", text)
    # namespaces name, they do not load
    for address in re.findall(r"https?://[^\"' <]+", text):
        assert address.startswith("http://www.w3.org/"), address


def test_the_report_escapes_what_users_wrote(folder):
    run = load_run(folder)
    run.arguments["model"] = "<script>alert('x')</script>{}"
    run.state["trained"]["floe"]["title"] = "<b>&amp;"
    page = Page(report.render(run))
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_the_report_marks_the_kept_layer_and_names_its_cost(folder):
    text, plan = (folder / "report.html").read_text(), Plan.load(folder / "plan.json")
    assert f"<td>{plan.layers()[0]}</td>" in text
    assert f"{plan.parameters():,}" in text
    assert text.count("MoE-LoRA, all 4 layers") >= 2  # table and legend


def test_equal_runs_give_equal_plots(folder):
    run = load_run(folder)
    assert report.render(run) == report.render(run)


def test_a_report_of_an_unfinished_run_is_a_page_too(tmp_path):
    with open_run(tmp_path, "tune", {"model": "m"}) as run:
        Page(report.render(run))


def test_a_finished_run_does_nothing_twice(folder, options, monkeypatch):
    def never(*_args, **_keywords):
        raise AssertionError("done again")

    monkeypatch.setattr(workbench, "train", never)
    monkeypatch.setattr(workbench, "search_rank", never)
    monkeypatch.setattr(workbench, "collect", never)
    options = Options(**{**options.to_json(), "compare": True})
    with open_run(folder, "tune", {}, resume=True) as run:
        tune(run, options)


def test_changed_data_stop_a_resumed_run(folder, options, tmp_path):
    rows = [{"instruction": f"w{i}", "output": "w1"} for i in range(40)]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = Options(**{**options.to_json(), "data": str(tmp_path / "other.jsonl")})
    resumed = open_run(folder, "tune", {}, resume=True)
    with resumed as run, pytest.raises(ValueError, match="needs the training data it began with"):
        tune(run, other)


@pytest.mark.parametrize("variant", ["param_sum", "gate"])
def test_linears_are_chosen_for_a_fraction_of_the_parameters(options, tmp_path, variant):
    options = Options(**{
        **options.to_json(), "rank": 2, "variant": variant, "per": "module", "keep": 0.4,
        "warm_up_steps": 2, "compare": True,
    })  # fmt: skip
    with open_run(tmp_path / "run", "tune", options.to_json()) as run:
        tune(run, options)
    plan, scores = Plan.load(tmp_path / "run" / "plan.json"), run.state["score"]["scores"]
    assert list(scores) == list(plan.modules)
    trained = run.state["trained"]
    assert 0.3 < trained["floe"]["parameters"] / trained["all"]["parameters"] <= 0.4
    assert trained["floe"]["title"] == f"FLoE, {len(plan.placements)} of {len(scores)} linears"
    assert 1 < len({plan.modules[name].layer for name in plan.placements}) <= len(plan.placements)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert all(layer in page for layer in plan.layers())


@pytest.mark.parametrize("variant", ["gate", "base", "taylor1"])
def test_scores_after_a_warm_up_or_of_the_base(options, tmp_path, variant):
    changes = {"variant": variant, "rank": 2, "warm_up_steps": 3, "keep": 0.5}
    options = Options(**{**options.to_json(), **changes})
    with open_run(tmp_path, "tune", options.to_json()) as run:
        tune(run, options)
    scores = run.state["score"]["scores"]
    assert min(scores.values()) > 0
    warmed = [line["step"] for line in run.history.of("step", run="warm_up")]
    assert warmed == ([] if variant == "base" else [1, 2, 3])
    plan = Plan.load(tmp_path / "plan.json")
    assert len(plan.layers()) == 2
    assert ("refinement" in plan.provenance) == (variant == "gate")
    gradients = run.state["score"]["gradients"]
    if variant == "gate":
        means = {n: sum(g * g for g in column) / len(column) for n, column in gradients.items()}
        assert means == pytest.approx(scores, rel=1e-6)


def test_a_plan_of_ones_own_is_trained(options, folder, tmp_path):
    plan = Plan.load(folder / "plan.json")
    with open_run(tmp_path, "train", options.to_json()) as run:
        train_plan(run, options, plan)
    assert (
        run.state["trained"]["floe"]["loss"] == (load_run(folder).state["trained"]["floe"]["loss"])
    )
    Page((tmp_path / "report.html").read_text())
    other, resumed = (
        Plan({}, "none", modules=plan.modules),
        open_run(tmp_path, "train", {}, resume=True),
    )
    with resumed as run, pytest.raises(ValueError, match="needs the plan it began with"):
        train_plan(run, options, other)


def test_the_model_ends_as_it_began(options, tmp_path):
    from floe_kernels.pipeline.progress import SILENT
    from floe_kernels.pipeline.tune import open_bench

    with open_run(tmp_path, "tune", options.to_json()) as run:
        bench = open_bench(run, options, SILENT)
        before = {name: p.clone() for name, p in bench.model.named_parameters()}
        plan = bench.choose(2)
        bench.train("floe", plan)
        after = dict(bench.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
