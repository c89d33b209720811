"""``floe tune`` in two processes under torchrun does what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

QUICK = (
    "--experts", 2, "--steps", 3, "--batch-size", 3, "--ranks", "2,4", "--trials", 2,
    "--search-steps", 2, "--search-samples", 4, "--score-samples", 5,
)  # fmt: skip


def torchrun(*arguments):
    folders = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "floe_kernels", *map(str, arguments)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def found(folder):
    state = json.loads((folder / "state.json").read_text())
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    trials = {line["rank"]: line["loss"] for line in lines if line["event"] == "trial"}
    steps = [line["loss"] for line in lines if line["event"] == "step"]
    return state, trials, steps


def test_two_processes_tune_as_one(floe, small, tmp_path):
    code, _, error = floe("tune", *small, *QUICK, "--out", tmp_path / "one")
    assert (code, error) == (0, "")
    done = torchrun("tune", *small, *QUICK, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loading ") == 1  # one of them talks

    (state, trials, steps), (other, more_trials, more_steps) = map(
        found, (tmp_path / "one", tmp_path / "two")
    )
    assert trials == pytest.approx(more_trials, rel=1e-5)
    assert steps == pytest.approx(more_steps, rel=1e-5)
    assert state["score"]["scores"] == pytest.approx(other["score"]["scores"], rel=1e-4)
    assert state["plan"] == other["plan"]
    assert state["trained"]["floe"]["loss"] == pytest.approx(
        other["trained"]["floe"]["loss"], rel=1e-5
    )
    assert (tmp_path / "two" / "adapter").is_dir()

    again = torchrun("tune", "--out", tmp_path / "two", "--resume")
    assert again.returncode == 0, again.stderr
    assert found(tmp_path / "two")[2] == more_steps  # nothing was trained twice


def test_a_shared_storage_is_refused(small, tmp_path):
    done = torchrun(
        "tune", *small, *QUICK, "--out", tmp_path / "run", "--storage", tmp_path / "trials"
    )
    assert done.returncode
    assert "torchrun's share each trial: leave one of the two out" in done.stderr
