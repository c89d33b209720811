"""RankSearch: what it finds, what it promises, what it refuses."""

import itertools
import logging
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import small

optuna = pytest.importorskip("optuna")
pytest.importorskip("scipy")

from floe_kernels.allocation import RankSearch, floe, pareto_front, ranks_by_depth, uniform  # noqa: E402
from floe_kernels.allocation.search_space import SearchSpace, grouped_space  # noqa: E402

WIDE = tuple(range(1, 65))
FILES = ("search.db", "search.log")


def valley(config, report):
    """Lowest at rank 20."""
    return abs(math.log2(config["rank"]) - math.log2(20))


def ranks(result):
    return [trial["params"]["rank"] for trial in result.trials]


@pytest.mark.parametrize(
    ("sampler", "file"),
    [("gp", None), ("gp", "search.db"), ("tpe", "search.log"), ("random", None), ("grid", None)],
)
def test_finds_the_best_of_a_small_space_everywhere(sampler, file, tmp_path):
    storage = file and tmp_path / "a {b}?#é" / file
    result = RankSearch(valley, sampler=sampler, storage=storage, n_trials=6).run()
    assert sorted(ranks(result)) == [2, 4, 8, 16, 32, 64]
    assert result.best_params == {"rank": 16}
    assert result.best_value == pytest.approx(math.log2(20) - 4)
    assert (result.completed, result.stopped) == (6, "n_trials")


def test_the_samplers_beat_chance_on_a_wide_space():
    def regret(sampler):
        return sum(
            RankSearch(
                lambda config, report, best=best: abs(math.log2(config["rank"] / best)),
                space=WIDE, sampler=sampler, seed=seed,
            ).run().best_value
            for best in (3, 8, 20, 50) for seed in range(2)
        )  # fmt: skip

    chance = regret("random")
    assert regret("gp") < chance / 4
    assert regret("tpe") < chance / 2


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_a_seed_decides_every_trial_in_every_storage(sampler, tmp_path):
    def tried(seed, file=None):
        storage = file and tmp_path / f"{sampler} {seed} {file}"
        search = RankSearch(
            valley, space=WIDE, sampler=sampler, seed=seed, n_trials=6, storage=storage
        )
        return ranks(search.run())

    first = tried(1)
    assert len(set(first)) == 6
    assert tried(1) == tried(1, "a.db") == tried(1, "a.log") == first
    assert tried(2) != first


@pytest.mark.parametrize(
    ("sampler", "file"),
    [("gp", "search.log"), ("tpe", "search.db"), ("random", "search.log"), ("grid", "search.log")],
)
def test_a_search_goes_on_where_it_stopped(sampler, file, tmp_path):
    whole_run = RankSearch(valley, space=WIDE, sampler=sampler, n_trials=7).run()

    def failing(config, report):
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        calls.append(config)
        return valley(config, report)

    calls = []
    keywords = {"space": WIDE, "sampler": sampler, "n_trials": 7, "storage": tmp_path / file}
    with pytest.raises(RuntimeError, match="out of memory"):
        RankSearch(failing, **keywords).run()
    result = RankSearch(valley, **keywords).run()
    states = [trial["state"] for trial in result.trials]
    assert states == ["complete"] * 4 + ["failed"] + ["complete"] * 3
    assert result.trials[4]["reason"] == "RuntimeError: out of memory"
    done = [trial["params"] for trial in result.trials if trial["state"] == "complete"]
    assert done == [trial["params"] for trial in whole_run.trials]
    more = RankSearch(valley, **{**keywords, "n_trials": 9}).run()
    assert more.completed == 9
    assert more.trials[:8] == result.trials
    idle = RankSearch(failing, **keywords).run()  # enough are there: the objective is not called
    assert idle.trials == more.trials == RankSearch(failing, **keywords).result().trials


def test_an_interrupt_fails_its_trial_only():
    def interrupted(config, report):
        raise KeyboardInterrupt

    search = RankSearch(interrupted, space=(2, 4))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert [trial["state"] for trial in search.result().trials] == ["failed"]
    search.objective = valley
    assert search.run().completed == 2


def test_the_result_is_plain():
    def objective(config, report):
        report(10, 3.0)
        report(20, 2.0)
        time.sleep(0.01)
        return 1.5

    seen = []
    result = RankSearch(objective, space=(8,)).run(progress=seen.append)
    [trial] = result.trials
    assert trial.pop("duration") >= 0.01
    assert trial == {
        "number": 0, "params": {"rank": 8}, "value": 1.5, "state": "complete",
        "reports": [[10, 3.0], [20, 2.0]], "reason": "",
    }  # fmt: skip
    assert len(seen) == 1
    assert (result.best_params, result.stopped) == ({"rank": 8}, "exhausted")
    assert all(type(v) in (int, float, str, dict, list) for v in trial.values())


def test_bad_trials_are_pruned_and_do_not_count():
    def objective(config, report):
        for step in range(3):
            report(step, config["rank"])
        return config["rank"]

    result = RankSearch(objective, sampler="grid", n_trials=4).run()
    states = {t["params"]["rank"]: t["state"] for t in result.trials}
    assert states == {2: "complete", 4: "complete", 8: "complete"} | dict.fromkeys(
        (16, 32, 64), "pruned"
    )
    assert (result.completed, result.stopped) == (3, "exhausted")
    assert result.trials[-1]["reports"] == [[0, 64.0]]
    assert result.trials[-1]["reason"] == "above the median at step 0"
    assert RankSearch(objective, sampler="grid", prune=False).run().completed == 6


def test_a_report_that_is_not_finite_prunes():
    def objective(config, report):
        report(0, math.nan if config["rank"] > 8 else 1.0)
        return 1.0

    result = RankSearch(objective, sampler="grid", prune=False).run()
    assert [t["state"] for t in result.trials] == ["complete"] * 3 + ["pruned"] * 3
    assert result.trials[3]["reason"] == "loss nan at step 0"


@pytest.mark.parametrize("sampler", ["gp", "tpe", "grid"])
def test_a_loss_that_is_not_finite_fails_and_is_not_tried_again(sampler):
    def objective(config, report):
        return {32: math.inf, 64: math.nan}.get(config["rank"], 1.0)

    result = RankSearch(objective, sampler=sampler).run()
    assert sorted(ranks(result)) == [2, 4, 8, 16, 32, 64]
    failed = {t["params"]["rank"]: t["reason"] for t in result.trials if t["state"] == "failed"}
    assert failed == {
        32: "the objective returned [inf]",
        64: "the objective returned [nan]",
    }
    assert (result.completed, result.stopped) == (4, "exhausted")


def test_patience_ends_a_search_without_progress():
    tried = RankSearch(valley, space=WIDE, sampler="grid", patience=5).run()
    assert ranks(tried) == list(range(1, 26))
    assert tried.stopped == "patience"
    coarse = RankSearch(valley, space=WIDE, sampler="grid", patience=3, min_delta=0.5).run()
    assert max(ranks(coarse)) < 20


def test_several_objectives_have_a_front():
    def objective(config, report):
        report(0, 1.0)  # is no error, and prunes nothing
        return 1 / config["rank"] + abs(config["keep"] - 0.4), config["rank"] * config["keep"]

    space = {"rank": (2, 4, 8), "keep": (0.25, 0.5, 1.0)}
    want = RankSearch(objective, space=space, sampler="grid", objectives=("loss", "cost")).run()
    params = [(trial["params"]["rank"], trial["params"]["keep"]) for trial in want.front]
    assert params == [(8, 0.5), (8, 0.25), (4, 0.25), (2, 0.25)]
    assert want.best_value == [pytest.approx(0.225), 4]
    assert want.best == want.front[0]
    for sampler in ("gp", "tpe"):
        search = RankSearch(
            objective, space=space, sampler=sampler, objectives=("loss", "cost"), n_trials=9
        )
        front = search.run().front
        assert [trial["params"] for trial in front] == [trial["params"] for trial in want.front]


POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    trials = [{"number": i, "value": list(p)} for i, p in enumerate(points)]
    front = [tuple(trial["value"]) for trial in pareto_front(trials)]
    beaten = {
        p for p in points for q in points
        if q != p and all(x <= y for x, y in zip(q, p, strict=True))
    }  # fmt: skip
    assert front == sorted(set(points) - beaten)


def test_ranks_by_depth_group():
    seen = []

    def objective(config, report):
        seen.append(config)
        return config["rank_0"] + config["rank_2"] - config["rank_1"]

    space = {"rank": (4, 16), "experts": (2, 3)}
    best = RankSearch(objective, space=space, groups=3, sampler="grid").run().best_params
    assert len(seen) == 16
    assert best == {"rank_0": 4, "rank_1": 16, "rank_2": 4, "experts": 2}
    plan = uniform(small(6), experts=best["experts"], rank=ranks_by_depth(best, small(6)))
    assert [p.ranks[0] for p in plan.placements.values()][::2] == [4, 4, 16, 16, 4, 4]
    assert ranks_by_depth({"rank": 8, "experts": 2}, small(6)) == 8
    scores = {f"model.layers.{i}": float(i) for i in range(6)}
    kept = floe(scores, small(6), keep=0.5, rank=ranks_by_depth(best, small(6)))
    assert {p.ranks for p in kept.placements.values()} == {(16,) * 4, (4,) * 4}


def test_a_space_of_anything():
    space = {
        "shared_A": (False, True),
        "where": ("first", "last"),
        "experts": (0, 1),
        "k": (None, 2),
    }
    seen = []

    def objective(config, report):
        seen.append(tuple(config.values()))
        return float(config["experts"])

    for sampler in ("gp", "tpe", "random"):
        seen.clear()
        result = RankSearch(objective, space=space, sampler=sampler, n_trials=16).run()
        assert len(set(seen)) == result.completed == 16


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(), st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
        min_size=1, max_size=3,
    ),
    st.integers(0, 99),
    st.data(),
)  # fmt: skip
def test_every_point_is_reached_once(choices, seed, data):
    space = SearchSpace(choices)
    taken = set()
    for n in range(space.size):
        point = space.nearest_new(space.spread(n, seed), taken)
        assert point not in taken
        assert space.point(space.config(point)) == point
        taken.add(point)
    assert taken == set(space.points())
    assert space.nearest_new(space.spread(0, seed), taken) is None


def test_the_nearest_new_point_is_the_nearest():
    space = SearchSpace({"rank": (2, 4, 8, 16), "experts": (1, 2)})
    taken = {(1, 0), (0, 0), (2, 0), (1, 1)}
    assert space.nearest_new((1, 0), taken) in {(0, 1), (2, 1), (3, 0)}
    assert space.nearest_new((3, 1), taken) == (3, 1)


def test_ranks_are_coded_by_their_log2():
    space = SearchSpace({"rank": (2, 4, 8), "keep": (2.0, 4.0, 8.0)})
    assert space.point({"rank": 5.8, "keep": 5.8}) == (2, 1)
    rank, keep = (d.distribution() for d in space.dimensions)
    assert (rank.low, rank.high, rank.log) == (2, 8, True)
    assert (keep.low, keep.high, keep.log) == (2.0, 8.0, False)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_trials_fill_the_space(seed):
    space = grouped_space(WIDE, groups=1)
    thirds = [space.spread(n, seed)[0] * 3 // 64 for n in range(3)]
    assert len(set(thirds)) >= 2
    gaps = sorted(space.spread(n, seed)[0] for n in range(4))
    assert max(b - a for a, b in itertools.pairwise(gaps)) <= 32


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"sampler": "bo"}, r"sampler must be one of gp, tpe, random, grid, got 'bo'"),
        ({"space": {}}, r"space must have at least one parameter, got none"),
        ({"space": ()}, r"space\['rank'\] must be a sequence of choices, got \(\)"),
        ({"space": (2, 2)}, r"the choices of space\['rank'\] must differ, got \[2, 2\]"),
        ({"space": (-2, 2)}, r"space\['rank'\] must be a whole number of at least 0, got -2"),
        ({"space": (2.0, math.inf)}, r"space\['rank'\] must be a finite number, got inf"),
        ({"space": {"rank": "248"}}, r"space\['rank'\] must be a sequence of choices, got '248'"),
        (
            {"space": {"keep": (0.5,)}, "groups": 2},
            r"groups = 2 need a parameter rank .*\['keep'\]",
        ),
        ({"n_trials": 0}, r"n_trials must be a whole number of at least 1, got 0"),
        ({"seed": -1}, r"seed must be a whole number of at least 0, got -1"),
        ({"patience": 0}, r"patience must be a whole number of at least 1, got 0"),
        ({"objectives": "loss"}, r"objectives must be a sequence of names, got 'loss'"),
        ({"storage": "search.txt"}, r"storage must end in one of \.db, .*got 'search.txt'"),
        ({"context": {"x": math.nan}}, r"context\['x'\] must be something JSON can hold"),
    ],
)
def test_says_what_is_wrong(keywords, says):
    with pytest.raises(ValueError, match=says):
        RankSearch(valley, **keywords)


@pytest.mark.parametrize(
    ("returned", "keywords", "says"),
    [
        ((1.0, 2.0), {}, r"the objective must return loss, got \(1.0, 2.0\)"),
        (1.0, {"objectives": ("loss", "cost")}, r"the objective must return loss, cost, got 1.0"),
        (None, {}, r"the objective must return numbers, got None"),
    ],
)
def test_says_what_is_wrong_with_the_objective(returned, keywords, says):
    with pytest.raises(ValueError, match=says):
        RankSearch(lambda config, report: returned, **keywords).run()


@pytest.mark.parametrize("file", FILES)
def test_refuses_a_file_of_another_search(file, tmp_path):
    path = tmp_path / file
    RankSearch(valley, storage=path, sampler="grid", context={"data": "a"}).run()
    for keywords, what in (
        ({"space": (2, 4)}, "space"),
        ({"objectives": ("loss", "cost")}, "objectives"),
        ({"context": {"data": "b"}}, "context"),
    ):
        with pytest.raises(
            ValueError, match=rf"'rank-search' must be resumed with its own {what}, "
        ):
            RankSearch(valley, storage=path, **{"context": {"data": "a"}, **keywords}).run()
    other = RankSearch(valley, storage=path, study_name="second", space=(2, 4), sampler="grid")
    assert other.run().completed == 2


@pytest.mark.parametrize("file", FILES)
def test_refuses_a_file_of_something_else(file, tmp_path):
    path = tmp_path / file
    path.write_text("never\na search\n" * 100)
    with pytest.raises(ValueError, match=rf"{file} must be a search's file, got ") as error:
        RankSearch(valley, storage=path).run()
    assert path.read_text() == "never\na search\n" * 100
    assert str(error.value).count("\n") <= 3  # SQLAlchemy adds an address of its own


def test_is_quiet_and_leaves_logging_as_it_was(monkeypatch):
    library, root = logging.getLogger("optuna"), logging.getLogger()
    records = []
    listener = logging.Handler()
    listener.emit = records.append
    monkeypatch.setattr(library, "handlers", [listener])
    monkeypatch.setattr(library, "level", logging.INFO)
    before = (root.level, list(root.handlers))
    RankSearch(valley, n_trials=5).run()
    assert not records
    assert optuna.logging.get_verbosity() == logging.INFO
    assert (root.level, list(root.handlers)) == before
    optuna.create_study()
    assert len(records) == 1  # the user's own studies still speak
