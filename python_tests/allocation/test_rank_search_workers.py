"""RankSearch among processes: killed ones, several on one file, half-written files."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

import floe_kernels  # noqa: E402
from floe_kernels.allocation import RankSearch  # noqa: E402

# allocation is plain Python: its package stands on its own, without torch, and starts quickly
WORKER = """
import json, sys, time, types
sys.modules["floe_kernels"] = package = types.ModuleType("floe_kernels")
package.__path__ = [sys.argv[3]]
sys.modules["torch"] = None
from floe_kernels.allocation import RankSearch

def objective(config, report):
    print("begin", json.dumps(config), flush=True)
    time.sleep(float(sys.argv[2]))
    return abs(config["rank"] - 23.0)

RankSearch(objective, space=range(1, 1 + int(sys.argv[4])), sampler="tpe", n_trials=8,
           storage=sys.argv[1]).run(
    lambda trial: print("end", json.dumps(trial["params"]), flush=True)
)
"""
FILES = ["search.db", "search.log"]
OURS = {"claims", "append"}  # locks that are not a worker's


def loss(config, report):
    return abs(config["rank"] - 23.0)


def search(path, n_trials=8, objective=loss, points=64):
    space = range(1, 1 + points)
    return RankSearch(objective, space=space, sampler="tpe", n_trials=n_trials, storage=path)


def worker(path, seconds, points=64):
    package = str(Path(floe_kernels.__file__).parent)
    arguments = [str(path), str(seconds), package, str(points)]
    command = [sys.executable, "-W", "error", "-c", WORKER, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_until(process, begun):
    """Read a worker's output until it began a number of trials; return those it finished."""
    finished = []
    for line in process.stdout:
        what, config = line.split(maxsplit=1)
        if what == "end":
            finished.append(json.loads(config))
        begun -= what == "begin"
        if not begun:
            break
    return finished


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("file", FILES)
def test_a_killed_search_resumes_with_nothing_lost(file, tmp_path):
    path = tmp_path / file
    process = worker(path, 0.05)
    finished = read_until(process, begun=4)
    kill(process)  # in the middle of the fourth trial

    locks = tmp_path / f"{file}.locks"
    assert len({p.name for p in locks.iterdir()} - OURS) == 1  # the file outlives the lock
    killed = search(path).result()
    assert [t["state"] for t in killed.trials] == ["complete"] * 3 + ["running"]
    assert [t["params"] for t in killed.trials[:3]] == finished

    result = search(path).run()
    assert [t["state"] for t in result.trials] == ["complete"] * 3 + ["failed"] + ["complete"] * 5
    assert result.trials[:3] == killed.trials[:3]
    assert result.trials[3]["reason"] == "its process died"
    assert (result.completed, result.stopped) == (8, "n_trials")
    # the very trials of a search that was never killed
    done = [t["params"] for t in result.trials if t["state"] == "complete"]
    assert done == [t["params"] for t in search(None).run().trials]
    assert {p.name for p in locks.iterdir()} <= OURS


@pytest.mark.parametrize("file", FILES)
def test_two_processes_share_one_search(file, tmp_path):
    path = tmp_path / file
    others = [worker(path, 0.2), worker(path, 0.2)]
    output = [process.communicate(timeout=300)[0].splitlines() for process in others]
    assert [process.returncode for process in others] == [0, 0]
    result = search(path).result()
    assert result.completed == len(result.trials) == 8
    assert len({t["params"]["rank"] for t in result.trials}) == 8
    ends = [line for lines in output for line in lines if line.startswith("end")]
    assert len(ends) == 8
    assert all(any(line.startswith("end") for line in lines) for lines in output)


@pytest.mark.parametrize(("points", "stopped"), [(64, "n_trials"), (6, "exhausted")])
def test_a_live_process_is_waited_for_and_replaced_when_it_dies(points, stopped, tmp_path):
    path = tmp_path / "search.log"
    wanted = min(points, 8)
    other = worker(path, 600, points)
    read_until(other, begun=1)

    def objective(config, report):
        if not finished:
            assert search(path, points=points).result().trials[0]["state"] == "running"
        finished.append(config)
        if len(finished) == wanted - 1:  # then only the other's trial is left, and it never ends
            threading.Timer(0.3, kill, [other]).start()
        return loss(config, report)

    finished = []
    result = search(path, objective=objective, points=points).run()
    assert [t["state"] for t in result.trials] == ["failed"] + ["complete"] * wanted
    assert result.trials[0]["reason"] == "its process died"
    assert (len(finished), result.stopped) == (wanted, stopped)


def test_a_half_written_journal_line_is_cut_off(tmp_path):
    path = tmp_path / "search.log"
    before = search(path, n_trials=4).run()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "study_id": 0, "tri')
    assert search(path).result().trials == before.trials
    result = search(path).run()
    assert result.trials[:4] == before.trials
    assert result.completed == 8
    for line in path.read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")
        json.loads(line)
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    ("step", "file"),
    [
        *(("enqueue", file) for file in (None, "search.log")),
        *(("ask", file) for file in (None, "search.db", "search.log")),
        *(("name", file) for file in (None, "search.log")),
    ],
)
def test_a_death_between_the_steps_of_a_claim_loses_nothing(file, step, tmp_path, monkeypatch):
    class Death(BaseException):
        pass

    def die(*args, **kwargs):
        raise Death

    one = search(file and tmp_path / file)
    with monkeypatch.context() as patch:
        if step == "enqueue":  # queued, not started
            patch.setattr(optuna.Study, "ask", die)
        elif step == "ask":  # started, without parameters
            patch.setattr(optuna.Trial, "_suggest", die)
        else:  # started, without its worker's name
            patch.setattr(optuna.Trial, "set_user_attr", die)
        with pytest.raises(Death):
            one.run()
    result = one.run()
    assert (result.completed, result.stopped) == (8, "n_trials")
    done = [t["params"] for t in result.trials if t["state"] == "complete"]
    assert done == [t["params"] for t in search(None).run().trials]
    assert not [t for t in result.trials if t["state"] == "running"]


def test_an_interrupted_claim_is_taken_up_by_the_same_search(tmp_path, monkeypatch):
    one = search(tmp_path / "search.log")
    name_worker = optuna.Trial.set_user_attr

    def name_and_stop(*args):
        name_worker(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "set_user_attr", name_and_stop)
        with pytest.raises(KeyboardInterrupt):
            one.run()
    result = one.run()
    assert [t["state"] for t in result.trials] == ["failed"] + ["complete"] * 8
