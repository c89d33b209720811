"""The rank search on a real, tiny model."""

import time

import pytest
import torch

from floe_kernels.integrations.transformers import adapted_modules, find_modules
from floe_kernels.pipeline import search
from floe_kernels.pipeline.encoding import Samples
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.search import search_rank


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny_model import make_model
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path_factory.mktemp("model"), layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def samples():
    draw = torch.Generator().manual_seed(0)
    return Samples.of([(torch.randint(0, 50, (8,), generator=draw).tolist(), 1) for _ in range(24)])


OPTIONS = Options(ranks="2,4,8", trials=2, search_steps=4, search_samples=12, experts=2)


def test_the_best_trial_wins_and_the_model_is_left_as_it_was(model, samples, tmp_path):
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []
    result = search_rank(
        model, find_modules(model), samples, OPTIONS,
        storage=tmp_path / "s.journal", on_trial=seen.append,
    )  # fmt: skip
    assert result.completed == 2 == len(seen)
    losses = {t["params"]["rank"]: t["value"] for t in result.trials}
    assert result.best_params["rank"] == min(losses, key=losses.get)
    assert all(len(t["reports"]) == 1 and t["reports"][0][0] == 2 for t in result.trials)
    assert not adapted_modules(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_interrupted_search_ends_as_an_undisturbed_one(model, samples, tmp_path, monkeypatch):
    modules = find_modules(model)
    whole = search_rank(model, modules, samples, OPTIONS, storage=tmp_path / "a.journal")
    trained, calls = search.train, []

    def once(*args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(*args, **keywords)

    monkeypatch.setattr(search, "train", once)
    with pytest.raises(KeyboardInterrupt):
        search_rank(model, modules, samples, OPTIONS, storage=tmp_path / "b.journal")
    assert not adapted_modules(model)
    resumed = search_rank(model, modules, samples, OPTIONS, storage=tmp_path / "b.journal")
    assert resumed.completed == whole.completed
    assert resumed.best_params == whole.best_params
    assert resumed.best_value == whole.best_value


def test_a_price_on_parameters_prefers_small_ranks(model, samples):
    options = Options(**{**OPTIONS.to_json(), "mu": 1e6, "sampler": "grid", "trials": 3})
    assert search_rank(model, find_modules(model), samples, options).best_params["rank"] == 2


def test_no_trial_starts_when_the_time_is_up(model, samples, monkeypatch):
    clock = iter(range(0, 10**6, 120))
    monkeypatch.setattr(search, "time", type("T", (), {"monotonic": lambda: next(clock)}))
    options = Options(**{**OPTIONS.to_json(), "search_minutes": 3.0, "trials": 3})
    result = search_rank(model, find_modules(model), samples, options)
    assert result.completed == 1
    assert result.best is not None
    assert time.monotonic() > 0


def test_ranks_that_blow_up_are_out(model, samples, monkeypatch):
    def explode(*_args, **_keywords):
        raise FloatingPointError

    monkeypatch.setattr(search, "train", explode)
    with pytest.raises(ValueError, match="must end in a finite loss, and none did: try a lower"):
        search_rank(model, find_modules(model), samples, OPTIONS)
    assert not adapted_modules(model)


def test_one_sample_is_too_few(model):
    with pytest.raises(ValueError, match="at least 2 training samples, got 1"):
        search_rank(model, find_modules(model), Samples.of([([1, 2], 1)]), OPTIONS)


def test_judges_do_not_train(samples):
    small, judges = search._splits(samples, OPTIONS)
    assert len(small) == 12
    assert len(judges) == 8
    rows = {tuple(s.tokens.view(-1, 8)[i].tolist()) for s in (small,) for i in range(len(s))}
    assert not rows & {tuple(row.tolist()) for row in judges.tokens.view(-1, 8)}
