"""``floe score``, ``floe plan`` and ``floe show plan.json``: every method, every budget."""

import re

import pytest

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation import Plan
from floe_kernels.pipeline.measurements import Measurement

LAYERS = 8
MODULES = {
    f"h.{i}.{name}": ModuleSpec(8, size, f"h.{i}")
    for i in range(LAYERS)
    for name, size in (("q_proj", 8), ("up_proj", 24))
}
BY_LAYER = {f"h.{i}": float(i + 1) for i in range(LAYERS)}
BY_MODULE = {name: float(i % 5 + 1) for i, name in enumerate(MODULES)}
FILES = {
    "floe": ("fisher", BY_LAYER),
    "lora_smoe": ("sensitivity", BY_MODULE),
    "alphalora": ("spectral", BY_MODULE),
    "layerif": ("influence", BY_LAYER),
}
METHODS = (*FILES, "mola-2468", "uniform", "random", "random_layers", "by_position")


def measured(folder, method, *, task="a", scores=None, name="s.json", fingerprint="f"):
    measure, found = FILES.get(method.removeprefix("inverted-"), ("fisher", BY_LAYER))
    found = scores or found
    tasks = {task: found} if measure == "sensitivity" else None
    Measurement(
        "m", fingerprint, "", found, MODULES, None, measure, tasks, None
    ).save(folder / name)  # fmt: skip
    return folder / name


def experts(plan, layer):
    return [plan.placements[n].experts if n in plan.placements else 0
            for n, spec in plan.modules.items() if spec.layer == layer]  # fmt: skip


@pytest.mark.parametrize("method", [*METHODS, *(f"inverted-{name}" for name in METHODS[:5])])
@pytest.mark.parametrize("unit", ["experts", "parameters", "bytes"])
def test_every_method_meets_every_budget(floe, tmp_path, method, unit):
    scores, out = measured(tmp_path, method), tmp_path / "p.json"
    an_expert = 4 * (8 + 8) + 4 * (8 + 24) + 2 * 8  # of a layer, rank 4, with its routers
    cost = {"experts": 1, "parameters": an_expert, "bytes": 8 * an_expert}[unit]
    per_layer = ("--per", "layer") if "lora_smoe" in method else ()
    code, text, error = floe(
        "plan", scores, "--method", method, "--budget", 40 * cost, "--unit", unit, "--rank", 4,
        "--out", out, *per_layer,
    )  # fmt: skip
    assert (code, error) == (0, "")
    plan = Plan.load(out)
    assert plan.parameters() == 40 * an_expert
    assert "40 with a layer's counted once" in text
    assert (plan.base_model, plan.fingerprint) == ("m", "f")
    assert all(p.top_k == min(2, p.experts) for p in plan.placements.values())
    assert plan.method.startswith("inverted ") == method.startswith("inverted-")


def test_scores_decide_and_inverted_turns_them(floe, tmp_path):
    def plan(method, *more):
        scores, out = measured(tmp_path, method), tmp_path / "p.json"
        assert floe("plan", scores, "--method", method, "--out", out, *more)[0] == 0
        return Plan.load(out)

    assert plan("floe", "--keep", 0.25).layers() == ["h.6", "h.7"]
    assert plan("inverted-floe", "--keep", 0.25).layers() == ["h.0", "h.1"]
    rising = [experts(plan("layerif", "--budget", 40), f"h.{i}")[0] for i in range(LAYERS)]
    falling = [experts(plan("inverted-layerif", "--budget", 40), f"h.{i}")[0] for i in range(8)]
    assert rising == sorted(rising) == falling[::-1]
    assert sum(rising) == 40
    assert rising[0] == 2  # one by right, one by remainder
    shape = plan("inverted-mola-10-2-0-2")
    assert [experts(shape, f"h.{i}")[0] for i in range(8)] == [2, 2, 0, 0, 2, 2, 10, 10]
    bounded = plan("layerif", "--budget", 40, "--lo", 3, "--hi", 7)
    counts = [experts(bounded, f"h.{i}")[0] for i in range(8)]
    assert (min(counts), max(counts), sum(counts)) == (3, 7, 40)
    sharp = plan("alphalora", "--budget", 40, "--beta", 0)
    assert {experts(sharp, f"h.{i}")[0] for i in range(8)} == {5}


def test_floe_by_linear_spends_a_fraction_of_the_parameters(floe, tmp_path):
    whole = measured(tmp_path, "floe")
    by_linear = {n: i * n.endswith("up_proj") * 1.0 for i, n in enumerate(MODULES)}
    scores = measured(tmp_path, "floe", scores=by_linear, name="by_linear.json")
    out = tmp_path / "p.json"
    query, up = 4 * 4 * (8 + 8) + 4 * 8, 4 * 4 * (8 + 24) + 4 * 8
    for more in (("--per", "module"), ()):  # the scores say it, too
        assert floe("plan", scores, "--rank", 4, "--out", out, *more)[0] == 0
        plan = Plan.load(out)
        assert list(plan.placements) == ["h.5.up_proj", "h.6.up_proj", "h.7.up_proj"]
        assert plan.parameters() == 3 * up <= 0.25 * LAYERS * (query + up) < 3 * up + query
    assert floe("plan", scores, "--rank", 4, "--per", "layer", "--out", out)[0] == 0
    assert Plan.load(out).layers() == ["h.6", "h.7"]
    code, _, error = floe("plan", whole, "--per", "module", "--out", out)
    assert code == 1
    assert "scores must be per module to decide per module, got scores per layer" in error


def test_several_files_are_several_tasks(floe, tmp_path):
    one = measured(tmp_path, "lora_smoe", task="arc", name="a.json")
    other = measured(
        tmp_path, "lora_smoe", task="obqa", name="b.json",
        scores={name: 1.0 / (i + 1) for i, name in enumerate(MODULES)},
    )  # fmt: skip
    out = tmp_path / "p.json"
    code, _, _ = floe("plan", one, other, "--method", "lora_smoe", "--percent", 50, "--out", out)
    assert code == 0
    plan = Plan.load(out)
    assert plan.provenance["tasks"] == ["arc", "obqa"]
    # a task of 16 distinct scores gives 8 votes; one with ties at the threshold gives fewer
    assert 8 < sum(p.experts for p in plan.placements.values()) <= 16
    code, _, error = floe("plan", one, one, "--method", "lora_smoe", "--out", out)
    assert (code, error) == (1, "error: every task must be given once, got 'arc' twice\n")
    strange = measured(tmp_path, "lora_smoe", task="c", name="c.json", fingerprint="g")
    code, _, error = floe("plan", one, strange, "--method", "lora_smoe", "--out", out)
    assert (code, error) == (1, "error: all scores must be of one model, got two\n")
    code, _, error = floe("plan", one, "--method", "floe", "--out", out)
    assert code == 1
    assert (
        "floe needs the scores of floe score --method fisher, got those of --method sens" in error
    )
    fisher = measured(tmp_path, "floe", name="d.json")
    code, _, error = floe("plan", fisher, fisher, "--out", out)
    assert (code, error) == (
        1, "error: only scores of --method sensitivity can be several, got fisher\n",
    )  # fmt: skip
    code, _, error = floe("plan", measured(tmp_path, "layerif"), "--method", "layerif")
    assert (code, error) == (
        1, "error: --budget must be given for layerif, such as --budget 160\n",
    )  # fmt: skip


def test_mean_and_sum_rank_matrices_of_unlike_sizes_differently(floe, tmp_path):
    scores = {name: float(spec.out_features) for name, spec in MODULES.items()}
    file, out = measured(tmp_path, "lora_smoe", scores=scores), tmp_path / "p.json"
    for how, want in (("sum", [2, 6]), ("mean", [4, 4])):
        assert floe("plan", file, "--method", "lora_smoe", "--budget", 64, "--how", how,
                    "--out", out)[0] == 0  # fmt: skip
        assert experts(Plan.load(out), "h.3") == want


def test_show_draws_a_plan(floe, tmp_path):
    scores, out = measured(tmp_path, "layerif"), tmp_path / "p.json"
    floe("plan", scores, "--method", "mola-0-2-4-8", "--out", out)
    code, text, error = floe("show", out)
    assert (code, error) == (0, "")
    assert re.search(r"layer +q +up +rank +experts, mean", text)
    assert re.search(r"^h\.0 +· +· *$", text, re.M)
    assert re.search(r"^h\.2 +2 +2 +8 +████ *$", text, re.M)
    assert re.search(r"^h\.7 +8 +8 +8 +█{16} *$", text, re.M)
    assert "mola 0-2-4-8 for m: 56 experts, 28 with a layer's counted once, in 12 of 16" in text
    (tmp_path / "half.json").write_text('{"format": "floe_kernels.plan"')
    code, _, error = floe("show", tmp_path / "half.json")
    assert code == 1
    assert "a plan must be whole JSON" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["floe", "--where", "last"], "--where has no effect on floe, only on by_position"),
        (["mola-2468", "--beta", "2"], "--beta has no effect on mola, only on lora_smoe, alphal"),
        (["uniform", "--hi", "2"], "--hi has no effect on uniform, only on lora_smoe"),
        (
            ["inverted-random"],
            "only a method with a ranking can be inverted, got 'inverted-random'",
        ),
        (["alphalora", "--lo", "-5"], "--lo must be >= -1, got -5"),
    ],
)
def test_options_without_effect_are_refused(floe, tmp_path, arguments, message):
    code, _, error = floe("plan", measured(tmp_path, arguments[0]), "--method", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("method", ["sensitivity", "spectral", "influence"])
def test_scores_of_a_model_become_a_plan(floe, small, tmp_path, method):
    scores, out = tmp_path / "s.json", tmp_path / "p.json"
    given = small if method != "spectral" else small[:2]  # weights alone are enough
    code, text, error = floe(
        "score", "--method", method, *given, "--rank", 2, "--score-samples", 6,
        "--cache", tmp_path / "spectra", "--out", scores,
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert "model.layers.3" in text
    found = Measurement.load(scores)
    assert len(found.scores) == (4 if method == "influence" else 28)
    if method == "sensitivity":
        assert re.search(r"sums: would 6 other samples rank the 28 linears alike\? Kendall", text)
    policy = {"sensitivity": "lora_smoe", "spectral": "alphalora", "influence": "layerif"}[method]
    assert f"--method {policy}" in text
    code, _, error = floe(
        "plan", scores, "--method", policy, "--budget", 20, "--rank", 2, "--out", out
    )
    assert (code, error) == (0, "")
    total = sum(p.experts for p in Plan.load(out).placements.values())
    assert total == (20 if policy == "lora_smoe" else 20 * 7)


def test_a_plan_needs_no_scores_where_the_method_needs_none(floe, small, tmp_path):
    out = tmp_path / "p.json"
    code, _, error = floe("plan", "--method", "mola-1-2-3-4", *small[:2], "--rank", 2, "--out", out)
    assert (code, error) == (0, "")
    plan = Plan.load(out)
    assert [experts(plan, f"model.layers.{i}")[0] for i in range(4)] == [1, 2, 3, 4]
    assert plan.fingerprint


def test_several_data_files_are_tasks_of_one_command(floe, small, data_file, tmp_path):
    other = tmp_path / "twice.json"
    other.write_text(data_file.read_text())
    arguments = [*small]
    arguments[3] = f"{data_file},{other}"
    code, _, error = floe("score", "--method", "sensitivity", *arguments, "--score-samples", 3,
                          "--out", tmp_path / "s.json")  # fmt: skip
    assert (code, error) == (0, "")
    assert list(Measurement.load(tmp_path / "s.json").tasks) == ["sums", "twice"]
    arguments[3] = f"{data_file},{data_file}"
    code, _, error = floe("score", *arguments, "--out", tmp_path / "s.json")
    assert code == 1
    assert "every file must be named once" in error
