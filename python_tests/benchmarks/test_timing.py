"""The clock: turns are taken, buffers rotate, a disturbed sample is taken again."""

import time

import pytest

from benchmarks import timing
from benchmarks.registry import Step


class Fake(Step):
    def __init__(self, log, name, seconds=0.0):
        self.log, self.name, self.seconds = log, name, seconds

    def forward(self):
        time.sleep(self.seconds)
        self.log.append(self.name)
        return self.name

    def backward(self, out):
        self.log.append(f"back {out}")


@pytest.fixture
def undisturbed(monkeypatch):
    monkeypatch.setattr(timing, "waited", lambda: 0.0)


def names(log):
    return [entry.split("-")[0] for entry in log]


@pytest.mark.usefixtures("undisturbed")
def test_every_provider_has_its_turn_in_every_round(monkeypatch):
    monkeypatch.setitem(timing.SAMPLE, "cpu", 0.0)  # one call a sample
    log = []
    steps = {n: [Fake(log, f"{n}-{i}") for i in range(3)] for n in "abc"}
    samples = timing.interleave(steps, "fwd", "cpu", 0.0, (4, 9))
    assert {len(row) for row in samples.values()} == {4}
    rounds = names(log)[-12:]
    orders = {tuple(rounds[i : i + 3]) for i in range(0, 12, 3)}
    assert all(set(order) == set("abc") for order in orders)
    assert len(orders) > 1, "the order within rounds is random"


@pytest.mark.usefixtures("undisturbed")
def test_inputs_rotate(monkeypatch):
    monkeypatch.setitem(timing.SAMPLE, "cpu", 0.0)
    log = []
    timing.interleave({"a": [Fake(log, f"a-{i}") for i in range(3)]}, "fwd", "cpu", 0.0, (6, 6))
    assert log[-6:] == ["a-0", "a-1", "a-2", "a-0", "a-1", "a-2"]


@pytest.mark.usefixtures("undisturbed")
def test_a_sample_is_the_mean_of_calls():
    samples = timing.interleave({"a": [Fake([], "a", 0.001)]}, "fwd", "cpu", 0.0, (9, 9))
    assert 0.001 <= min(s.seconds for s in samples["a"]) < timing.SAMPLE["cpu"]


def test_the_backward_alone_does_not_time_the_forward():
    clock = timing.Clock("cpu")
    assert clock.time([Fake([], "a", 0.1)], "bwd") < 0.05
    assert clock.time([Fake([], "a", 0.1)], "fwdbwd") >= 0.1


def test_a_disturbed_sample_is_taken_again(monkeypatch):
    monkeypatch.setitem(timing.SAMPLE, "cpu", 0.0)  # one call a sample
    clock = iter(range(10**6))
    calls = {}
    for quiet, waited in ((False, lambda: float(next(clock))), (True, lambda: 0.0)):
        monkeypatch.setattr(timing, "waited", waited)
        log = []
        samples = timing.interleave({"a": [Fake(log, "a")]}, "fwd", "cpu", 1000.0, (2, 2))
        assert [s.quiet for s in samples["a"]] == [quiet, quiet]
        calls[quiet] = len(log)
    assert calls[False] - calls[True] == 2 * timing.RETAKES


def test_waiting_is_read_from_the_kernel():
    before = timing.waited()
    assert timing.waited() >= before >= 0.0


def test_rounds_are_enough_even_when_patience_is_gone(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing, "waited", lambda: float(next(clock)))
    samples = timing.interleave({"a": [Fake([], "a")]}, "fwd", "cpu", 0.0, (5, 50))
    assert len(samples["a"]) == 5
