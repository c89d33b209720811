"""The commands, one after the other as people use them, and every sentence they can fail with."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from floe_kernels.pipeline.runs import load_run

QUICK = (
    "--ranks", "2,4", "--trials", 2, "--search-steps", 2, "--score-samples", 8, "--steps", 3,
    "--experts", 2, "--search-samples", 8,
)  # fmt: skip


def test_tune_prints_the_table_and_leaves_the_folder(floe, small, tmp_path):
    out = tmp_path / "run"
    code, text, error = floe("tune", *small, *QUICK, "--out", out, "--compare")
    assert (code, error) == (0, "")
    for title in ("base model", "MoE-LoRA, all 4 layers", "random, 1 of 4"):
        assert title in text
    assert re.search(r"FLoE, \d+ of (4 layers|28 linears)", text)
    score = load_run(out).state["score"]
    assert (score["variant"], len(score["scores"])) == ("param_sum", 28)
    assert {"plan.json", "report.html", "history.jsonl", "adapter"} <= set(os.listdir(out))

    code, again, _ = floe("show", out)
    assert code == 0
    assert re.findall(r"\d\.\d{4}", text)[-4:] == re.findall(r"\d\.\d{4}", again)[-4:]
    assert "To go on" not in again

    code, _, error = floe("tune", *small, *QUICK, "--out", out)
    assert code == 1
    assert "holds a run already: add --resume" in error
    code, _, error = floe("tune", "--out", out, "--resume", "--seed", 5)
    assert code == 1
    assert "keeps its arguments: seed was 0, got 5" in error
    assert floe("tune", "--out", out, "--resume")[0] == 0


def test_the_single_steps_hand_on_to_each_other(floe, small, tmp_path):
    scores, plan, out = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "run"
    adapter = ("--experts", 2, "--rank", 2)
    code, text, error = floe("score", *small, *adapter, "--score-samples", 8, "--out", scores)
    assert (code, error) == (0, "")
    assert "model.layers.3" in text

    code, text, _ = floe("plan", scores, *adapter, "--keep", 0.5, "--out", plan)
    assert code == 0
    assert "2 of 4 layers" in text

    code, text, error = floe("train", *small, "--plan", plan, "--steps", 3, "--out", out)
    assert (code, error) == (0, "")
    trained = re.search(r"floe, 2 layers +(\d+\.\d{4})", text).group(1)
    assert "To go on" not in floe("show", out)[1]

    code, text, _ = floe("evaluate", *small, "--adapter", out / "adapter")
    assert code == 0
    assert f"held-out loss {trained} nats a token" in text
    code, text, _ = floe("evaluate", *small)
    assert code == 0
    assert f"{load_run(out).state['base']['loss']:.4f}" in text


def test_the_demo_ends_is_shown_again_and_starts_over(floe, model_folder, tmp_path):
    out = tmp_path / "demo"
    quick = ("--length", 32, "--max-samples", 16, "--eval-samples", 4, *QUICK, "--top-k", 2)
    base = ("demo", "--out", out)
    code, text, error = floe(*base, "--model", model_folder, "--dtype", "float32", *quick)
    assert (code, error) == (0, "")
    assert "a step of 8 x 32 tokens with all layers takes" in text
    assert text.count("layers") > 3
    modified = (out / "state.json").stat().st_mtime_ns

    code, again, _ = floe(*base)
    assert code == 0
    assert "To start over: floe demo --fresh" in again
    assert "random, 1 of 4 layers" in again
    assert (out / "state.json").stat().st_mtime_ns == modified

    (out / "report.html").unlink()
    state = json.loads((out / "state.json").read_text())
    del state["report"], state["trained"]["random"]
    (out / "state.json").write_text(json.dumps(state))
    code, text, _ = floe(*base)
    assert code == 0
    assert "going on with the run" in text
    assert (out / "report.html").exists()
    assert load_run(out).state["trained"]["floe"] == state["trained"]["floe"]


def test_fresh_deletes_nothing_but_a_run(floe, model_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    code, _, error = floe("demo", "--out", tmp_path, "--fresh", "--model", tmp_path / "none")
    assert code == 1
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert "error: " in error


def test_info_names_versions_and_who_serves_every_operator(floe):
    from floe_kernels.cli.info import operator_rows

    code, text, _ = floe("info")
    assert code == 0
    assert torch.__version__ in text
    rows = {name: (cpu, cuda) for name, cpu, cuda in operator_rows()}
    assert {"topk_softmax", "moe_lora_linear", "moe_lora_backward"} <= rows.keys()
    assert all(name in text for name in rows)
    native = "floe_kernels._C" in sys.modules
    assert rows["topk_softmax"][0].startswith("csrc/" if native else "reference")
    if not torch.cuda.is_available():
        assert "have not run on this machine" in text


def test_bench_compares_with_the_frozen_layer(floe):
    code, text, _ = floe(
        "bench", "--tokens", 16, "--in-features", 8, "--out-features", 8, "--device", "cpu"
    )
    assert code == 0
    assert "with 4 experts of rank 8" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tune"], 1, "--data must name a .jsonl, .json or .txt file, or stdlib, got nothing"),
        (["tune", "--data", "a.csv"], 1, "data must be a file ending in .jsonl, .json, .txt"),
        (["tune", "--data", "none.txt"], 1, "none.txt: No such file or directory"),
        (["tune", "--keep", "2"], 2, "--keep must be in (0, 1], got 2.0"),
        (["tune", "--keep", "x"], 2, "--keep"),
        (["tune", "--variant", "x"], 2, "--variant must be one of init, gate"),
        (["tune", "--wrong"], 2, "No such option"),
        (["nothing"], 2, "No such command"),
        (["tune", "--resume", "--out", "none"], 1, "none holds no run"),
        (["show", "none"], 1, "none holds no run: there is no config.json"),
        (["train"], 2, "--plan"),
        (["train", "--plan", "none.json"], 1, "none.json: No such file or directory"),
        (["plan", "none.json"], 1, "none.json: No such file or directory"),
        (["plan", "bad.json"], 1, "bad.json must be a file of scores"),
        (["plan", "half.json"], 1, "half.json must be whole JSON, but is damaged"),
        (["plan", "bad.json", "--method", "best"], 2, "--method: a method must be one of floe,"),
        (["plan", "--method", "alphalora"], 2, "needs a file of scores: floe score"),
        (["score", "--method", "best"], 2, "--method must be one of fisher, sensitivity"),
        (["plan", "bad.json", "--rank", "0"], 2, "--rank must be >= 1 here, got 0"),
        (["evaluate", "--data", "d.txt", "--model", "./none"], 1, "--model must be a folder"),
        (["score", "--data", "d.txt", "--out", "no/file/s.json", "--rank", "0"], 1, "--rank must"),
        (["score", "--data", "d.txt", "--out", "d.txt/s.json"], 1, "d.txt: cannot write there"),
        (["tune", "--data", "d.txt", "--out", "d.txt"], 1, "d.txt: cannot write there"),
        (["bench", "--top-k", "9"], 2, "--top-k must be in 1..E = 1..4 (--experts), got 9"),
        (["bench", "--dtype", "int8"], 2, "--dtype must be one of bfloat16, float32"),
        (["bench", "--tokens", "0"], 2, "--tokens must be >= 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_mistakes_get_one_sentence(floe, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("words " * 100)
    (tmp_path / "bad.json").write_text('{"format": "other"}')
    (tmp_path / "half.json").write_text('{"format"')
    got, out, error = floe(*arguments)
    assert got == code
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in out + error


def test_bad_data_are_found_before_the_model_is_loaded(floe, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    start = time.monotonic()
    code, _, error = floe(
        "tune", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "run", "--model", "no/such"
    )
    assert code == 1
    assert "line 2: must have the key 'output', got [\"instruction\"]" in error
    assert time.monotonic() - start < 20


def test_an_adapter_of_another_model_is_refused(floe, small, tmp_path):
    from tiny_model import make_model

    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    floe("score", *small, "--rank", 2, "--score-samples", 4, "--out", scores)
    floe("plan", scores, "--rank", 2, "--out", plan)
    other = make_model(tmp_path / "other", layers=2)
    arguments = [*small]
    arguments[1] = other
    code, _, error = floe("train", *arguments, "--plan", plan, "--out", tmp_path / "run")
    assert code == 1
    assert "warning: the plan was made on" in error
    assert "error: a plan must be for this model, got module 'model.layers.2" in error


def test_debug_shows_the_traceback(floe):
    code, _, error = floe("show", "none", "--debug")
    assert code == 1
    assert "Traceback" in error
    assert error.rstrip().endswith("there is no config.json")


def test_something_unexpected_is_called_that(floe, monkeypatch):
    from floe_kernels.cli import show

    monkeypatch.setattr(show, "load_run", lambda _folder: {}["gone"])
    code, _, error = floe("show", "x")
    assert code == 1
    assert error == "error: unexpected KeyError: 'gone' (--debug shows where)\n"


def started(tmp_path, small, *more):
    command = [sys.executable, "-m", "floe_kernels", "tune", *small, *more, "--out", tmp_path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(c) for c in command], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_ctrl_c_says_how_to_go_on_and_a_second_process_is_refused(floe, small, tmp_path):
    many = ("--rank", 2, "--steps", 100_000, "--keep", 1.0, "--variant", "init")  # no warm-up
    process = started(tmp_path, small, *many)
    try:
        history = tmp_path / "history.jsonl"
        limit = time.monotonic() + 60
        while not (history.exists() and '"event": "step"' in history.read_text()):
            assert time.monotonic() < limit
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        code, _, error = floe("tune", "--out", tmp_path, "--resume")
        assert code == 1
        assert f"process {process.pid} does: wait for it" in error
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert f"To go on: floe tune --out {tmp_path} --resume" in error
    assert "Traceback" not in error
    done = [line["step"] for line in load_run(tmp_path).history.of("step")]
    assert done == list(range(1, len(done) + 1))
    assert (tmp_path / "checkpoints" / "floe.safetensors").exists()


def test_without_typer_the_extra_is_named(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no', name='typer')")
    done = subprocess.run(
        [sys.executable, "-m", "floe_kernels", "info"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == ("error: the command line needs typer: pip install floe-kernels[cli]\n")
