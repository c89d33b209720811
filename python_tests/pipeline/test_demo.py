"""The demonstration's arithmetic of time; the command itself is tested with the others."""

import pytest

from floe_kernels.pipeline.demo import AIM_S, DEFAULTS, MOST_STEPS, SEARCHED, SPARSE, share_out
from floe_kernels.pipeline.options import Options

OPTIONS = Options(**DEFAULTS)


def cost(chosen, seconds, trials):
    """Seconds that a demonstration takes, by the figures that share_out counts with."""
    a_step = seconds * chosen["batch_size"] / OPTIONS.batch_size
    searching = trials * chosen["search_steps"] * SEARCHED
    scoring = chosen["score_samples"] / chosen["batch_size"]
    return a_step * (searching + scoring + chosen["steps"] * (1 + 2 * SPARSE))


@pytest.mark.parametrize("left", [100.0, 300.0, 450.0])
@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.3, 2.7, 4.4, 9.0, 20.0])
def test_the_time_that_is_left_is_used_and_not_exceeded(left, seconds):
    found = share_out(OPTIONS, left, seconds)
    chosen = found["options"]
    assert cost(chosen, seconds, OPTIONS.trials) <= left
    if chosen["steps"] < MOST_STEPS:
        assert cost(chosen, seconds, OPTIONS.trials) > 0.5 * left
    Options(**{**OPTIONS.to_json(), **chosen})


def test_a_slow_machine_does_less_and_says_so():
    fast, slow = share_out(OPTIONS, AIM_S, 2.7), share_out(OPTIONS, AIM_S, 60.0)
    assert fast["options"]["batch_size"] == 8
    assert slow["options"]["batch_size"] < 8
    assert "this machine is slow" in slow["words"]
    assert "slow" not in fast["words"]
    assert slow["slowest"] == 60.0 * slow["options"]["batch_size"] / 8


def test_what_was_asked_for_bounds_what_is_done():
    options = Options(**{**OPTIONS.to_json(), "steps": 5, "score_samples": 16, "rank": 4})
    chosen = share_out(options, AIM_S, 0.1)["options"]
    assert chosen["steps"] == 5
    assert chosen["score_samples"] == 16
