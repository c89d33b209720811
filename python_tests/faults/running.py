"""``floe tune`` in processes that start at once and may be killed, and what they must leave."""

import json
import multiprocessing
import os
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

STEPS = 8
SMALL = (
    "--dtype", "float32", "--length", "32", "--ranks", "2,4", "--trials", "2",
    "--search-steps", "4", "--search-samples", "8", "--score-samples", "8", "--steps", str(STEPS),
    "--experts", "2", "--keep", "0.5", "--dropout", "0.1", "--warm-up-steps", "3",
    "--checkpoint-seconds", "0", "--eval-every", "3", "--threads", "1",
    "--targets", "q_proj,down_proj",
)  # fmt: skip
PRELOAD = [
    "floe_kernels.cli.app", "floe_kernels.pipeline.tune", "matplotlib.backends.backend_svg",
    "optuna.samplers._gp.sampler", "scipy.optimize", "torch._dynamo",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


@dataclass
class Started:
    process: multiprocessing.Process
    said: Path

    def kill(self):
        """Return whether it was still at work."""
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return alive and self.process.exitcode != 0


def start(folder, arguments, clock=None):
    """Start a run, or go on with the one in the folder."""
    said = Path(tempfile.mkdtemp()) / "said.txt"
    process = CONTEXT.Process(target=work, args=(folder, arguments, said, clock))
    process.start()
    return Started(process, said)


def work(folder, arguments, said, clock):
    import sys

    import torch

    from floe_kernels.cli.app import run

    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if clock is not None:
        disturb_clock(clock)
    resume = (folder / "config.json").exists()
    code = run(["tune", "--out", str(folder), *(["--resume"] if resume else arguments)])
    sys.stdout.flush()
    os._exit(code)


def disturb_clock(seed):
    """Let the time of day jump by up to ten days, to and fro, whenever it is asked for."""
    import time

    draw, real = random.Random(seed), time.time
    time.time = lambda: real() + draw.uniform(-864_000, 864_000)


def finished(started, seconds=280):
    started.process.join(seconds)
    assert started.process.exitcode is not None, "it hangs"
    return started.process.exitcode, started.said.read_text()


def sentence(said):
    """Return the error's one sentence; everything else may be progress, but no traceback."""
    assert "Traceback" not in said
    errors = re.findall(r"^error: .*$", said, re.MULTILINE)
    assert len(errors) == 1, said
    return errors[0]


def lines(folder, event):
    path = folder / "history.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(row) for row in rows if row.endswith("}")]
    return [row for row in whole if row["event"] == event]


def state_of(folder):
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_trained(state):
    """Whether all is done but the report, whose pictures take a second to draw."""
    return "loss" in state.get("trained", {}).get("floe", {})


def phase(folder):
    """Say what a run was doing when it stopped."""
    state = state_of(folder)
    if is_trained(state):
        return "report"
    if (folder / "adapter").exists():
        return "save"
    if "plan" in state:
        return "training"
    if "score" in state or any(row["run"] == "warm_up" for row in lines(folder, "step")):
        return "score"
    return "search" if (folder / "search.journal").exists() else "start"


def assert_whole(folder):
    """No file that goes by its own name is half a file."""
    from safetensors.torch import load_file

    from floe_kernels.allocation import Plan

    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.name == "plan.json":
            assert Plan.load(path).placements
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "report.html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.name == "history.jsonl":
            for line in path.read_bytes().split(b"\n")[:-1]:
                json.loads(line)


def numbers(folder):
    """Return everything that must come out the same; times and memory may differ."""
    from floe_kernels.pipeline.runs import load_run

    run = load_run(folder)
    trials = [t for t in run.history.of("trial") if t["state"] == "complete"]
    return {
        "trials": sorted((t["rank"], t["loss"], str(t["reports"])) for t in trials),
        "scores": run.state["score"]["scores"],
        "plan": run.state["plan"],
        "steps": [(x["run"], x["step"], x["loss"]) for x in run.history.of("step")],
        "evaluations": [(x["run"], x["step"], x["loss"]) for x in run.history.of("evaluation")],
        "loss": run.state["trained"]["floe"]["loss"],
    }


def assert_same(folder, undisturbed):
    """Every trial and step once, and the same numbers and weights to the last bit."""
    import torch
    from safetensors.torch import load_file

    expected, found = numbers(undisturbed), numbers(folder)
    assert [step for run, step, _ in found["steps"] if run == "floe"] == [*range(1, STEPS + 1)]
    for key, value in expected.items():
        assert found[key] == value, key
    ours, theirs = (load_file(f / "adapter" / "adapter.safetensors") for f in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (folder / "report.html").exists()
    assert not [*folder.rglob("*.partial")]
