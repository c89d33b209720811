"""Ratios, their spreads, and when two runs agree."""

import random

import pytest

from benchmarks import compare
from benchmarks.spread import PROCESS, Spread, overhead_ratio, quantile, ratio, seconds
from benchmarks.timing import Sample


def row(values, quiet=True, epoch=0):
    return [Sample(v, 0.0 if quiet else 0.5, epoch) for v in values]


def moved(median, low, high):
    """Return a ratio's spread as it is stated: beyond what the rounds show."""
    return pytest.approx((median, low * (1 - PROCESS), high * (1 + PROCESS)))


def test_quantiles_interpolate():
    assert quantile([1.0], 0.2) == 1.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_common_noise_cancels_in_a_ratio():
    noise = [1.0, 7.0, 2.0, 30.0, 1.5]
    found = ratio(row([2 * n for n in noise]), row(noise))
    assert found == moved(2.0, 2.0, 2.0)
    assert seconds(row(noise)).high > 2 * seconds(row(noise)).low


def test_disturbed_rounds_do_not_count():
    base = row([1.0] * 8)
    mine = row([2.0] * 6) + row([50.0] * 2, quiet=False)
    assert ratio(mine, base) == moved(2.0, 2.0, 2.0)


def test_where_few_rounds_were_quiet_the_calmest_half_counts():
    mine = [Sample(float(i), 0.1 * i) for i in range(1, 13)]
    assert ratio(mine, row([1.0] * 12)).high <= 6.0 * (1 + PROCESS)
    few = [Sample(1.0, 0.0), *row([50.0] * 3, quiet=False)]
    assert ratio(few, row([1.0] * 4)).high >= 50.0  # too few to leave any out


def test_the_spread_holds_the_median_of_every_epoch():
    mine = row([1.0] * 30) + row([2.0] * 3, epoch=1)
    assert ratio(mine, row([1.0] * 33)) == moved(1.0, 1.0, 2.0)


def test_overheads():
    base = row([1.0] * 10)
    found = overhead_ratio(row([1.3] * 10), row([1.6] * 10), base)
    # ours is 1.3 of the base and may move by 2 % of that; the peer's overhead is 0.6 of it
    assert found == pytest.approx((0.5, 0.5 - PROCESS * 1.3 / 0.6, 0.5 + PROCESS * 1.3 / 0.6))
    assert overhead_ratio(row([1.3] * 10), row([1.001] * 10), base) is None  # lost in noise
    assert overhead_ratio(row([0.9] * 10), row([1.6] * 10), base).median < 0  # faster than the base


def lines(generator, ours, status="ok", why=""):
    """Return records of one simulated run: 36 rounds with 10 % noise that is all our own."""
    base = row([generator.gauss(1.0, 0.02) for _ in range(36)])
    mine = row([generator.gauss(ours, 0.1 * ours) for _ in range(36)])
    shared = {"machine": "m", "op": "o", "mode": "fwd", "case": {"name": "c"}}
    record = {"provider": "ours", "role": "ours", "status": status, "why": why}
    return [{**shared, **record, "over_base": list(ratio(mine, base))}]


def test_two_runs_of_the_same_thing_agree():
    generator = random.Random(0)
    for _ in range(300):
        found = list(compare.changes(lines(generator, 1.5), lines(generator, 1.5)))
        assert [c.verdict for c in found] == ["same"]


def test_a_change_beyond_the_spread_is_told_with_its_direction():
    generator = random.Random(1)
    for factor, verdict in ((1.4, "slower"), (0.7, "faster")):
        found = list(compare.changes(lines(generator, 1.5), lines(generator, 1.5 * factor)))
        assert [c.verdict for c in found] == [verdict]


def test_what_was_right_and_is_not_is_a_change():
    generator = random.Random(2)
    (found,) = compare.changes(lines(generator, 1.5), lines(generator, 1.5, "wrong", "y is off"))
    assert found.verdict == "now wrong: y is off"


def test_command_line(tmp_path, capsys):
    from benchmarks import records

    generator = random.Random(3)
    before, after, slow = (tmp_path / n for n in ("a.jsonl", "b.jsonl", "c.jsonl"))
    for path, ours in ((before, 1.5), (after, 1.5), (slow, 3.0)):
        records.append(path, lines(generator, ours))
    assert compare.main([str(before), str(after)]) == 0
    assert "1 of 1 ratios agree" in capsys.readouterr().out
    assert compare.main([str(before), str(slow)]) == 1
    assert "slower" in capsys.readouterr().out


def test_intervals():
    assert Spread(2, 1, 3).overlaps(Spread(4, 3, 5))
    assert not Spread(2, 1, 2.9).overlaps(Spread(4, 3, 5))
