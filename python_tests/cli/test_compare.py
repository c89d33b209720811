"""``floe compare``: one table, the controls in it, and nothing lost when it is killed."""

import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from floe_kernels.allocation import Plan
from floe_kernels.pipeline.comparison import compared
from floe_kernels.pipeline.history import History
from floe_kernels.pipeline.runs import RESULTS, load_run

METHODS = "floe,lora_smoe,alphalora,layerif,mola-8642,uniform,random,random_layers,inverted-floe"
TITLES = [
    "floe", "lora_smoe", "alphalora", "layerif", "mola 8642", "uniform", "random", "random_layers",
    "inverted floe",
]  # fmt: skip
QUICK = ("--rank", 2, "--score-samples", 6, "--steps", 2, "--eval-samples", 8)


@pytest.fixture(scope="module")
def folder(model_folder, data_file, tmp_path_factory):
    """A finished comparison of everything, two seeds each."""
    pytest.importorskip("typer")
    from floe_kernels.cli.app import run

    out = tmp_path_factory.mktemp("compare") / "run"
    arguments = [
        "compare", "--methods", METHODS, "--seeds", 2, "--model", model_folder,
        "--data", data_file, "--dtype", "float32", "--length", 32, *QUICK, "--budget", 12,
        "--cache", out.parent / "spectra", "--out", out,
    ]  # fmt: skip
    assert run([str(a) for a in arguments]) == 0
    return out


def test_the_table_has_every_method_and_its_controls(floe, folder):
    code, text, error = floe("show", folder)
    assert (code, error) == (0, "")
    for title in TITLES:
        assert len(re.findall(rf"^{title} +[\d.]+ +[\d.]+ +[+-]", text, re.M)) == 1, title
    assert "2 seeds draw adapters" in text
    assert "To go on" not in text
    lines = History(folder / RESULTS).of("run")
    assert [line["method"] for line in lines] == TITLES * 2
    assert [line["seed"] for line in lines] == [0] * 9 + [1] * 9


def test_every_method_costs_the_same(folder):
    lines = {line["method"]: line for line in History(folder / RESULTS).of("run")}
    assert {lines[t]["experts"] for t in TITLES if t != "lora_smoe"} == {12}
    costs = {t: lines[t]["parameters"] for t in TITLES}
    assert len({costs[t] for t in TITLES if t != "lora_smoe"}) == 1
    # by matrix there may be left less than the cheapest matrix' expert
    assert 0 <= costs["uniform"] - costs["lora_smoe"] < 2 * (16 + 8) + 16
    assert lines["floe"]["layers"] == lines["random_layers"]["layers"] == 1
    assert lines["uniform"]["experts_by_layer"] == [3, 3, 3, 3]
    assert lines["mola 8642"]["experts_by_layer"] == [5, 4, 2, 1]


def test_the_controls_are_what_they_say(folder):
    plans = {path.stem: Plan.load(path) for path in (folder / "plans").iterdir()}
    assert plans["random.0"] != plans["random.1"]
    scores = plans["floe"].provenance["scores"]
    assert plans["floe"].layers() == [max(scores, key=scores.get)]
    assert plans["inverted-floe"].layers() == [min(scores, key=scores.get)]
    assert plans["inverted-floe"].method == "inverted floe"
    assert {p.fingerprint for p in plans.values()} == {plans["floe"].fingerprint}


def test_seeds_change_the_start_and_methods_share_it(folder):
    run = load_run(folder)
    first = {
        name: run.history.of("step", run=name)[0]["loss"]
        for name in ("uniform.0", "uniform.1", "alphalora.0")
    }
    # adapters start without effect: the first loss is that of the data alone
    assert first["uniform.0"] == pytest.approx(first["alphalora.0"], rel=1e-6)
    assert abs(first["uniform.0"] - first["uniform.1"]) > 1e-4


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), value


def test_the_report_has_the_table_and_the_plot(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 1
    assert page.tags.count("table") == 4
    assert all(text.count(title) >= 3 for title in TITLES)


def test_a_finished_comparison_trains_nothing_again(floe, folder, monkeypatch):
    from floe_kernels.pipeline import scoring, workbench

    monkeypatch.setattr(workbench, "train", None)
    monkeypatch.setattr(workbench, "collect", None)
    monkeypatch.setattr(scoring, "sample_sensitivity", None)
    before = (folder / RESULTS).read_bytes()
    code, text, error = floe("compare", "--out", folder, "--resume")
    assert (code, error) == (0, "")
    assert "inverted floe" in text
    assert (folder / RESULTS).read_bytes() == before
    code, _, error = floe("compare", "--out", folder, "--resume", "--seed", 9)
    assert code == 1
    assert "keeps its arguments: seed was 0, got 9" in error
    code, _, error = floe("compare", "--out", folder, "--resume", "--methods", "uniform")
    assert code == 1
    assert "keeps its arguments: methods was 'floe,lora_smoe" in error


def test_a_kill_loses_no_finished_run(floe, model_folder, data_file, tmp_path):
    out = tmp_path / "run"
    arguments = [
        "compare", "--methods", "uniform,random", "--seeds", 2, "--model", model_folder,
        "--data", data_file, "--dtype", "float32", "--length", 32, "--rank", 2, "--steps", 20,
        "--checkpoint-seconds", 0, "--eval-samples", 8, "--out", out,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "floe_kernels", *map(str, arguments)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 100
        while not (out / RESULTS).exists():
            assert time.monotonic() < limit
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    done = (out / RESULTS).read_text().splitlines(keepends=True)
    (out / RESULTS).write_text("".join(done) + '{"event": "run", "meth')  # half a line
    code, text, _ = floe("show", out)
    assert code == 0
    assert "To go on: floe compare" in text
    code, text, error = floe("compare", "--out", out, "--resume")
    assert (code, error) == (0, "")
    after = (out / RESULTS).read_text().splitlines(keepends=True)
    assert after[: len(done)] == done
    runs = [(line["method"], line["seed"]) for line in map(json.loads, after)]
    assert runs == [("uniform", 0), ("random", 0), ("uniform", 1), ("random", 1)]


def test_differences_are_paired_by_seed():
    same = {"layers": 1, "experts": 2, "parameters": 9, "seconds_per_step": 1.0,
            "experts_by_layer": [2.0]}  # fmt: skip
    losses = {"uniform": [3.0, 5.0, 4.0], "floe": [2.0, 4.2, 2.8]}
    lines = [
        {"method": m, "seed": s, "loss": loss, **same}
        for m, found in losses.items()
        for s, loss in enumerate(found)
    ]
    rows = {row.title: row for row in compared(lines)}
    assert rows["floe"].gain == pytest.approx(1.0)
    assert rows["floe"].error == pytest.approx(0.2 / 3**0.5)  # of 1.0, 0.8, 1.2
    assert rows["uniform"].error is None
    assert rows["floe"].texts()[3:5] == ("+1.0000", "0.1155")
    assert rows["uniform"].texts()[3:5] == ("+0.0000", "-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best"], "--methods: a method must be one of floe, lora_smoe"),
        (["--methods", "mola-24"], "got 'mola-24'"),
        (["--methods", "inverted-uniform"], "only a method with a ranking can be inverted"),
        (["--methods", "floe,floe"], "--methods must be different and at least one"),
        (["--methods", ""], "--methods must be different and at least one, got ''"),
        (["--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["--rank", "0"], "--rank must be >= 1 here, got 0"),
        (["--unit", "euros"], "--unit must be one of experts, parameters, bytes, got 'euros'"),
    ],
)
def test_mistakes_get_one_sentence(floe, tmp_path, arguments, message):
    code, _, error = floe("compare", "--data", "d.json", *arguments, "--out", tmp_path / "no")
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()
