"""The workflows call make, for what is promised; hooks lint as make does."""

import itertools
import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = {
    p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/workflows").glob("*.yml")
}
JOBS = {(name, job): w["jobs"][job] for name, w in WORKFLOWS.items() for job in w["jobs"]}
MAKEFILE = (ROOT / "Makefile").read_text()


def commands(job):
    """What a job runs, for every cell of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for values in itertools.product(*matrix.values()):
        cell = dict(zip(matrix, values, strict=True))
        for step in job["steps"]:
            if "run" in step:
                run = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m, c=cell: c[m[1]], step["run"])
                yield from run.splitlines()


@pytest.mark.parametrize("key", JOBS, ids=" ".join)
def test_jobs_call_make_alone(key):
    job = JOBS[key]
    assert job["runs-on"] == "ubuntu-latest"
    lines = list(commands(job))
    assert lines
    for line in lines:
        assert re.fullmatch(r"make [a-z]+( [A-Z_]+=[\w.]+)*", line), line
        assert re.search(rf"^{line.split()[1]}:", MAKEFILE, re.M), line
        for variable in re.findall(r"([A-Z_]+)=", line):
            assert re.search(rf"^{variable} \?=", MAKEFILE, re.M), variable
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v5"))


def test_tests_run_on_every_python_torch_and_build_that_is_promised():
    job = JOBS["ci", "test"]
    assert set(job["strategy"]["matrix"]["python"]) == {"3.10", "3.13"}
    assert set(commands(job)) == {
        f"make test TORCH={torch} FLOE_BUILD={build}"
        for torch in ("2.10.0", "newest")
        for build in ("none", "cpu")
    }
    asked = [step["with"]["python-version"] for step in job["steps"] if "with" in step]
    assert asked == ["${{ matrix.python }}"]


def test_ci_makes_all_that_must_hold_before_a_merge():
    made = {
        line.split()[1] for (name, _), job in JOBS.items() if name == "ci" for line in commands(job)
    }
    assert made == {"lint", "test", "wheel", "smoke", "docs"}


def test_workflows_may_read_only():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow[True]  # `on`, which YAML 1.1 takes for a yes


def test_hooks_are_what_make_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}, (
        "nothing to download, or to pin twice"
    )
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]
    assert tools == set(re.findall(r"\$\(BIN\)/(\S+)", recipe)) == {"ruff", "mypy", "clang-format"}
    pinned = (ROOT / "requirements/packages.txt").read_text()
    assert all(re.search(rf"^{tool}==", pinned, re.M) for tool in tools)
