"""Experiments on real tasks, here on a model of a few thousand weights."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))
from tiny_model import make_model

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import config, measured, runner
from benchmarks.evidence.accuracy import option_log_likelihoods
from benchmarks.evidence.choices import FAMILIES, RULES, choose
from benchmarks.evidence.questions import Encoded, accuracies, encode, read_questions
from benchmarks.evidence.stage import Stage
from floe_kernels.integrations.transformers import apply_plan, remove_adapters
from floe_kernels.scores.fisher import read_variant

TOML = """
title = "A trial."
methods = [{methods}]
seeds = [0, 1]
questions = 7
{more}

[options]
model = "{model}"
dtype = "float32"
experts = 2
rank = 2
keep = 0.5
steps = 2
batch_size = 4
learning_rate = 0.02
score_samples = 8
warm_up_steps = 2
max_samples = 16

[[datasets]]
label = "sums"
train = "sums.train.json"
test = "sums.test.json"
length = 40
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("evidence")
    make_model(folder / "model", layers=6)
    for name, count in (("train", 30), ("test", 12)):
        rows = []
        for i in range(count):
            words = [f"w{(i + 3 * j) % 40} w{(5 * i + j) % 40}" for j in range(2 + i % 3)]
            listed = " ".join(f"Answer{n}: {word}" for n, word in enumerate(words, 1))
            lead = f"Please choose the correct answer to the question: w{i} and w{i % 7} ="
            rows.append({
                "instruction": f"{lead}\n\n{listed}\n\nAnswer format: answer1/answer2",
                "input": "", "answer": f"answer{1 + i % 2}",
            })  # fmt: skip
        (folder / f"sums.{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def write(folder):
    def write(name, methods, more=""):
        listed = ", ".join(f'"{method}"' for method in methods)
        text = TOML.format(methods=listed, more=more, model=folder / "model")
        (folder / f"{name}.toml").write_text(text)
        return config.load(name, folder)

    return write


@pytest.fixture(scope="module")
def stage(folder, write):
    return Stage(write("stage", ["all"]), folder, folder / "work")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_read_in_both_forms(folder):
    text = read_questions(folder / "sums.test.json", "text")[1]
    assert (text.prompt, text.options) == ("w1 and w1 =", ("w1 w5", "w4 w6", "w7 w7"))
    assert text.answer == 1
    letter = read_questions(folder / "sums.test.json", "letter")[1]
    assert "Answer2: w4 w6" in letter.prompt
    assert letter.options[1] == "the correct answer is answer2"


def test_a_record_without_options_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "Why?", "answer": "answer1"}]')
    with pytest.raises(ValueError, match=r"a.json, record 1: must list options"):
        read_questions(tmp_path / "a.json", "text")


def direct(model, question):
    """Read every option by itself, unpadded."""
    values = []
    for option in question.options:
        ids = torch.tensor([question.prompt + option])
        with torch.no_grad():
            chosen = model(ids).logits[0].log_softmax(-1)
        at = len(question.prompt)
        values.append(sum(float(chosen[at + i - 1, t]) for i, t in enumerate(option)))
    return values


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("adapted", [False, True])
def test_options_side_by_side_are_as_likely_as_alone(stage, batch_size, adapted):
    task, model = stage.task("sums"), stage.loaded.model
    questions = [*task.questions, Encoded([3, 4], [[5], [6, 7, 8], [9, 2]], 1)]
    assert len(task.questions) == 7
    try:
        if adapted:
            apply_plan(model, choose(stage, config.Key("sums", "all", 0, "")).plan)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        found = option_log_likelihoods(model, questions, batch_size=batch_size)
        expected = [direct(model, question) for question in questions]
    finally:
        remove_adapters(model)
    for ours, theirs in zip(found, expected, strict=True):
        # float32, some ten rounded terms of size 10 a sum
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
    assert not model.training


def test_an_answer_is_right_when_its_option_is_likeliest(stage):
    questions = [Encoded([1], [[1, 2, 3], [4]], 0), Encoded([1], [[1], [2]], 1)]
    assert accuracies([[-3.0, -2.0], [-1.0, -0.5]], questions) == (0.5, 1.0)


def test_an_option_is_encoded_as_the_samples_are(stage, folder):
    question = read_questions(folder / "sums.test.json", "text")[0]
    encoded = encode(question, stage.loaded.tokenizer, 40)
    ids = stage.loaded.tokenizer.decode(encoded.prompt + encoded.options[question.answer])
    assert ids.endswith(f"{question.options[question.answer]} </s>")


def test_what_is_squared_can_be_a_sequence_a_token_or_a_batch(stage, monkeypatch):
    """A batch of one sequence is that sequence; a sum over tokens' squares is another number."""
    found = {}
    for what in ("cold", "batch", "token"):
        monkeypatch.setattr(stage, "options", lambda label, **m: config_options(stage, label, **m))
        found[what] = read_variant(measured.record(stage, "sums", 7, what), "init")
    for layer, score in found["cold"].items():
        assert found["batch"][layer] * 1 == pytest.approx(score, rel=1e-4)
        assert found["token"][layer] != pytest.approx(score, rel=1e-2)


def config_options(stage, label, **more):
    return stage.config.settings(stage.config.data(label), **{**more, "batch_size": 1})


def test_a_control_in_every_layer_takes_fewer_of_everything(stage):
    def plan(method):
        return choose(stage, config.Key("sums", method, 0, "")).plan

    whole = plan("all")
    single = plan("experts:1").placements
    assert list(single) == list(whole.placements)
    assert {placement.experts for placement in single.values()} == {1}
    some = plan("kinds:v_proj+o_proj").placements
    assert list(some) == [n for n in whole.placements if n.endswith(("v_proj", "o_proj"))]
    assert {placement.ranks for placement in some.values()} == {
        placement.ranks for placement in whole.placements.values()
    }
    with pytest.raises(ValueError, match="kinds must be of"):
        plan("kinds:v_proj+nothing")


BY_MATRIX = {"matrices:init": "floe", "random:matrices": "random"}


@pytest.mark.parametrize("method", [*(f"rule:{name}" for name in RULES), *BY_MATRIX])
def test_a_rule_keeps_to_the_parameters_of_the_layers(stage, method):
    plan = choose(stage, config.Key("sums", method, 0, "")).plan
    half = choose(stage, config.Key("sums", "random:0", 0, "")).plan
    assert 0.9 * half.parameters() <= plan.parameters() <= half.parameters()
    assert plan.method == BY_MATRIX.get(method, method.removeprefix("rule:"))


def test_a_killed_experiment_goes_on_without_repeating_a_line(folder, write, monkeypatch):
    chosen = write("killed", ["all", "floe:init", "random:0"])
    results = folder / "killed.jsonl"
    real, calls = runner.do, []

    def killed(stage, key, known):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(stage, key, known)

    monkeypatch.setattr(runner, "do", killed)
    stage = Stage(chosen, folder, folder / "work")
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(stage, results, say=lambda text: None)
    assert len(lines(results)) == 2
    with results.open("a") as file:
        file.write('{"event": "run", "dataset"')  # a kill in the middle of a line
    said = []
    assert runner.run_all(Stage(chosen, folder, folder / "work"), results, say=said.append) == 0
    found = lines(results)
    keys = [(line["seed"], line["method"]) for line in found]
    assert keys == [(s, m) for s in (0, 1) for m in ("all", "floe:init", "random:0")]
    assert calls[2] == calls[3]
    assert "4 of 6 runs to do" in said[0]
    assert runner.run_all(stage, results, say=said.append) == 0
    assert lines(results) == found
    assert not [path for path in (folder / "work").rglob("*") if path.name == "floe-init.0"]


def test_a_line_tells_the_whole_run(folder, write):
    write("told", ["all", "floe:gate_refined"])
    given = ["told", "--configs", folder, "--data", folder, "--work", folder / "work2",
             "--results", folder / "told"]  # fmt: skip
    assert command.main([str(part) for part in given]) == 0
    line = lines(folder / "told" / "told.jsonl")[1]
    assert line["layers"] == [i for i, n in enumerate(line["experts_by_layer"]) if n]
    assert len(line["layers"]) == 3
    assert len(line["scores"]) == 6
    assert line["steps"] == 2
    assert 0 <= line["accuracy"] <= 1
    for name in ("machine", "commit", "versions", "base_loss", "loss", "seconds", "peak_bytes"):
        assert line[name]


def test_a_plan_is_trained_once_whoever_comes_to_it(folder, write, monkeypatch):
    out = folder / "same"
    given = ["--configs", folder, "--data", folder, "--work", folder / "work3", "--results", out]
    write("first", ["floe:init", "position:first"])
    write("second", ["definition:sequence", "position:last"])
    assert command.main([str(part) for part in ("first", *given)]) == 0
    real, trained = runner.train, []
    monkeypatch.setattr(
        runner, "train", lambda stage, key, plan: trained.append(key) or real(stage, key, plan)
    )
    assert command.main([str(part) for part in ("second", *given)]) == 0
    again = {(line["method"], line["seed"]): line for line in lines(out / "second.jsonl")}
    first = {(line["method"], line["seed"]): line for line in lines(out / "first.jsonl")}
    for seed in (0, 1):
        line, earlier = again["definition:sequence", seed], first["floe:init", seed]
        assert line["trained_as"] == "floe:init"
        assert all(line[name] == earlier[name] for name in ("loss", "layers", "seconds", "scores"))
        assert "trained_as" not in again["position:last", seed]
    assert {key.method for key in trained} <= {"position:last"}


def test_one_data_set_can_be_done_alone(folder, write, capsys):
    chosen = write("alone", ["all"])
    label = chosen.datasets[-1].label
    assert {key.dataset for key in chosen.only(label).runs()} == {label}
    assert set(chosen.only(label).runs()) <= set(chosen.runs())
    with pytest.raises(ValueError, match="--only must be one of"):
        chosen.only("nothing")


def test_no_run_starts_that_would_end_too_late(folder, write, monkeypatch):
    chosen = write("late", ["all", "random:0"])
    now = [0.0]

    def do(stage, key, known):
        now[0] += 50
        return {"loss": 1.0, "base_loss": 2.0, "accuracy": None}

    monkeypatch.setattr(runner, "do", do)
    stage = Stage(chosen, folder, folder / "work")
    results, said = folder / "late.jsonl", []
    left = runner.run_all(
        stage, results, minutes=2.5, say=said.append, clock=lambda: now[0]
    )  # the third would end at 150 s, the fourth at 200
    assert (left, len(lines(results))) == (1, 3)
    assert "the time is up; 1 runs are left" in said[-1]


def test_agreement_between_samples_is_one_line_a_run(folder, write):
    chosen = write("steady", ["stability:init", "stability:gate"], "sizes = [1, 4]\ndraws = 5")
    stage = Stage(chosen, folder, folder / "work")
    results = folder / "steady.jsonl"
    assert runner.run_all(stage, results, say=lambda text: None) == 0
    found = lines(results)
    assert [line["method"] for line in found] == 2 * ["stability:init", "stability:gate"]
    for line in found:
        assert list(line["agreement"]) == ["1", "4"]
        mean, low, high = line["agreement"]["4"]["tau"]
        assert -1 <= low <= mean <= high <= 1


@pytest.mark.parametrize("name", config.names())
def test_every_committed_experiment_can_be_read(name):
    chosen = config.load(name)
    keys = chosen.runs()
    assert len(set(keys)) == len(keys)
    families = {key.method.partition(":")[0] for key in keys}
    assert families <= {*FAMILIES, "stability"}


def test_the_rules_share_the_setting_of_the_layers():
    assert config.load("layers").setting(config.load("layers").datasets[0]) == config.load(
        "rules"
    ).setting(config.load("rules").datasets[0])


def test_an_unknown_key_of_a_file_is_refused(folder, write):
    with pytest.raises(ValueError, match=r"must hold only .* got \['sedes'\]"):
        write("wrong", ["all"], "sedes = [1]")
