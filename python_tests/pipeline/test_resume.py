"""Killed at any moment and resumed, a run ends in the same numbers."""

import json
import multiprocessing
import random
import time

import pytest
import torch
from safetensors.torch import load_file

from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.runs import load_run, open_run

SMALL = {
    "dtype": "float32", "length": 32, "ranks": "2,4,8", "trials": 3, "search_steps": 6,
    "search_samples": 8, "score_samples": 8, "steps": 20, "experts": 2, "keep": 0.5,
    "learning_rate": 0.02, "dropout": 0.1, "variant": "gate", "warm_up_steps": 6,
    "checkpoint_seconds": 0.0, "eval_every": 7, "threads": 1, "targets": "q_proj,down_proj",
}  # fmt: skip
PRELOAD = [
    "floe_kernels.pipeline.tune", "matplotlib.backends.backend_svg", "optuna.samplers._gp.sampler",
    "scipy.optimize", "torch._dynamo", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers",
]  # fmt: skip


@pytest.fixture(scope="module")
def spawn():
    """Return a function that starts a tuning process in a second's fraction, from a clean one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def start(folder, options):
        process = context.Process(target=work, args=(folder, options))
        process.start()
        return process

    return start


def work(folder, options):
    from floe_kernels.pipeline.tune import tune

    torch.set_num_threads(1)
    resume = (folder / "config.json").exists()
    with open_run(folder, "tune", {} if resume else options, resume=resume) as run:
        tune(run, Options(**run.arguments))


def finished(process):
    process.join(120)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def options(model_folder, data_file):
    return Options(model=str(model_folder), data=str(data_file), **SMALL).to_json()


@pytest.fixture(scope="module")
def undisturbed(spawn, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(spawn(folder, options))
    return folder


def lines(folder, event):
    path = folder / "history.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(row) for row in rows if row.endswith("}")]
    return [row for row in whole if row["event"] == event]


def wait_for(process, condition):
    limit = time.monotonic() + 60
    while not condition() and process.is_alive():
        assert time.monotonic() < limit
        time.sleep(0.002)


def numbers(folder):
    """Return everything that must come out the same; times and memory may differ."""
    run = load_run(folder)
    trials = [t for t in run.history.of("trial") if t["state"] == "complete"]
    return {
        "trials": [(t["rank"], t["loss"], t["reports"]) for t in trials],
        "scores": run.state["score"]["scores"],
        "plan": run.state["plan"],
        "steps": [(x["run"], x["step"], x["loss"]) for x in run.history.of("step")],
        "evaluations": [(x["run"], x["step"], x["loss"]) for x in run.history.of("evaluation")],
        "loss": run.state["trained"]["floe"]["loss"],
    }


def assert_same(folder, undisturbed):
    expected, found = numbers(undisturbed), numbers(folder)
    assert len(found["trials"]) == SMALL["trials"]
    assert [step for run, step, _ in found["steps"] if run == "floe"] == list(range(1, 21))
    assert sorted(found["trials"]) == sorted(expected["trials"])
    for key in expected.keys() - {"trials"}:
        assert found[key] == expected[key], key
    ours, theirs = (load_file(f / "adapter" / "adapter.safetensors") for f in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kills_in_the_search_the_warm_up_and_the_training(spawn, options, undisturbed, tmp_path):
    def in_search():
        return len(lines(tmp_path, "trial")) >= 1

    def in_step(name, least):
        return lambda: any(
            row["run"] == name and row["step"] >= least for row in lines(tmp_path, "step")
        )

    for condition in (in_search, in_step("warm_up", 2), in_step("floe", 4), in_step("floe", 13)):
        process = spawn(tmp_path, options)
        wait_for(process, condition)
        assert process.is_alive(), "the run was over before it could be killed"
        process.kill()
        process.join()
    finished(spawn(tmp_path, options))
    assert_same(tmp_path, undisturbed)


def test_kills_at_random_moments(spawn, options, undisturbed, tmp_path):
    draw = random.Random(time.time_ns())
    kills = 0
    for _ in range(4):
        process = spawn(tmp_path, options)
        process.join(draw.uniform(0.1, 2.5))
        kills += process.is_alive()
        process.kill()
        process.join()
    finished(spawn(tmp_path, options))
    assert kills
    assert_same(tmp_path, undisturbed)
