"""The demonstration's arithmetic of time; the command itself is tested with the others."""

import pytest

from floe_kernels.pipeline import demo as module
from floe_kernels.pipeline.demo import (
    AIM_S,
    DEFAULTS,
    FORWARD,
    MOST_STEPS,
    SCORED,
    SEARCHED,
    SPARSE,
    demo,
    share_out,
)
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.progress import Progress
from floe_kernels.pipeline.results import remarks
from floe_kernels.pipeline.runs import open_run

OPTIONS = Options(**DEFAULTS)


def cost(chosen, seconds):
    """Seconds that a demonstration takes, counted independently."""
    size = chosen["batch_size"]
    forward = FORWARD * seconds * size / OPTIONS.batch_size
    search = OPTIONS.trials * chosen["search_steps"] * SEARCHED * seconds * size / 8
    judging = OPTIONS.trials * 2 * -(-8 // size) * forward
    score = chosen["score_samples"] / size * SCORED * seconds * size / 8
    training = chosen["steps"] * (1 + 2 * SPARSE) * seconds * size / 8
    return search + judging + score + training


@pytest.mark.parametrize("left", [100.0, 300.0, 450.0])
@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.3, 2.7, 4.4, 9.0, 20.0])
def test_the_time_that_is_left_is_used_and_not_exceeded(left, seconds):
    chosen = share_out(OPTIONS, left, seconds)["options"]
    assert cost(chosen, seconds) <= left
    if chosen["steps"] < MOST_STEPS:
        assert cost(chosen, seconds) > 0.5 * left
    Options(**{**OPTIONS.to_json(), **chosen})


def test_a_slow_machine_does_less_and_says_so():
    fast, slow = share_out(OPTIONS, AIM_S, 2.7), share_out(OPTIONS, AIM_S, 60.0)
    assert fast["options"]["batch_size"] == 8
    assert slow["options"]["batch_size"] < 8
    assert "this machine is slow" in slow["words"]
    assert "slow" not in fast["words"]
    assert slow["seconds"] == 60.0 * slow["options"]["batch_size"] / 8


def test_what_was_asked_for_bounds_what_is_done():
    options = Options(**{**OPTIONS.to_json(), "steps": 5, "score_samples": 16, "rank": 4})
    chosen = share_out(options, AIM_S, 0.1)["options"]
    assert chosen["steps"] == 5
    assert chosen["score_samples"] == 16


class Listening(Progress):
    def __init__(self):
        self.heard = []

    def say(self, text):
        self.heard.append(text)


@pytest.fixture
def options(model_folder, data_file):
    return Options(
        **{
            **OPTIONS.to_json(), "model": str(model_folder), "data": str(data_file), "length": 32,
            "dtype": "float32", "rank": 2, "experts": 2, "steps": 6, "score_samples": 16,
        }
    )  # fmt: skip


def test_when_the_time_is_up_all_trainings_end_after_as_many_steps(options, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LAST_S", -1e9)
    with open_run(tmp_path, "demo", options.to_json()) as run:
        demo(run, options)
    trained = run.state["trained"]
    assert {name: found["steps"] for name, found in trained.items()} == {
        "all": 1, "floe": 1, "random": 1,
    }  # fmt: skip
    assert "The time was up after 1 of 6 steps, the same for all." in remarks(run.state)
    assert [line["step"] for line in run.history.of("evaluation", run="floe")] == [1]


def test_steps_follow_the_time_that_trials_took(options, tmp_path, monkeypatch):
    # a machine that seemed fast, and took a second for every step of a trial
    monkeypatch.setattr(module, "measure_step", lambda _bench: 1e-9)
    monkeypatch.setattr(module, "AIM_S", 40.0)
    changes = {"rank": 0, "ranks": "2,4", "trials": 2, "search_steps": 2, "steps": 60}
    options = Options(**{**options.to_json(), **changes})
    progress = Listening()
    with open_run(tmp_path, "demo", options.to_json()) as run:
        add = run.history.add

        def slow(event, **facts):
            if event == "trial":
                facts["duration"] = 2.6  # 2 steps and twice 0.3 of one
            add(event, **facts)

        monkeypatch.setattr(run.history, "add", slow)
        demo(run, options, progress)
    steps = run.state["pace"]["options"]["steps"]
    assert 1 <= steps <= 12  # 30 s for three trainings at 1, 0.75 and 0.75 s a step
    assert f"{steps} steps a training" in progress.heard
    assert {found["steps"] for found in run.state["trained"].values()} == {steps}
