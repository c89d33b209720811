"""SIGKILL at random moments of scoring, search, training, saving and report: nothing is lost."""

import os
import random
import signal
import time

from counting import KILLS, SURVIVED
from running import (
    assert_same,
    assert_whole,
    finished,
    is_trained,
    lines,
    phase,
    sentence,
    start,
    state_of,
)

#: a moment to wait for, so that the short phases are met as often as the long ones
MOMENTS = {
    "start": lambda folder: True,
    "search": lambda folder: bool(lines(folder, "trial")),
    "warm up": lambda folder: any(row["run"] == "warm_up" for row in lines(folder, "step")),
    "score": lambda folder: "score" in state_of(folder),
    "training": lambda folder: any(row["run"] == "floe" for row in lines(folder, "step")),
    "save": lambda folder: any(folder.glob("adapter*")) or any(folder.glob(".adapter*")),
    "report": lambda folder: is_trained(state_of(folder)),
}


def kill_at(moment, folder, arguments, draw):
    """Start, wait for a moment and a little more, kill; say whether there was someone to kill."""
    late = draw.choice([0.0, 0.02, 0.1, 0.5])
    started, limit = start(folder, arguments), time.monotonic() + 250
    while not MOMENTS[moment](folder) and started.process.is_alive():
        assert time.monotonic() < limit, f"never came to {moment}"
        time.sleep(0.005)
    time.sleep(draw.uniform(0, late))
    return started.kill()


def test_kills_lose_nothing(arguments, undisturbed, tmp_path):
    seed = time.time_ns() if KILLS > 10 else 7
    print("seed", seed)
    draw, kills, runs = random.Random(seed), 0, 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / str(runs)
        # in the run's own order: once it is drawing its report, it does nothing else
        moments = draw.choices(range(len(MOMENTS)), k=min(KILLS - kills, draw.randint(3, 12)))
        for moment in sorted(moments):
            if not kill_at([*MOMENTS][moment], folder, arguments, draw):
                break  # it was over before
            kills += 1
            SURVIVED[f"killed in {phase(folder)}"] += 1
            assert_whole(folder)
        code, said = finished(start(folder, arguments))
        assert code == 0, said
        assert_same(folder, undisturbed)


def test_a_second_process_says_so_and_disturbs_nothing(arguments, undisturbed, tmp_path):
    first = start(tmp_path, arguments)
    limit = time.monotonic() + 250
    while not lines(tmp_path, "trial"):
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(first.process.pid, signal.SIGSTOP)  # it must not be over before the others came
    for _ in range(1 if KILLS < 50 else 5):
        code, said = finished(start(tmp_path, arguments))
        assert code == 1
        assert f"process {first.process.pid} does: wait for it" in sentence(said)
        SURVIVED["second process refused"] += 1
    os.kill(first.process.pid, signal.SIGCONT)
    assert finished(first)[0] == 0
    assert_same(tmp_path, undisturbed)


def test_the_clock_may_jump(arguments, undisturbed, tmp_path):
    for run in range(1 if KILLS < 50 else 5):
        folder = tmp_path / str(run)
        code, said = finished(start(folder, arguments, clock=run))
        assert code == 0, said
        assert_same(folder, undisturbed)
        SURVIVED["clock jumped"] += 1


def test_no_file_of_ours_is_executable_or_pickled(undisturbed):
    for path in undisturbed.rglob("*"):
        if path.is_file():
            assert not os.access(path, os.X_OK) or os.stat(path).st_mode & 0o111 == 0
            assert path.read_bytes()[:2] != b"\x80\x02", f"{path} is a pickle"
            assert path.suffix not in (".pt", ".bin", ".pkl"), path
