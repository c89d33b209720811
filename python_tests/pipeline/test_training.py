"""The training loop: order, accumulation, and the same numbers after any stop."""

import math
import os
import signal

import pytest
import torch

from floe_kernels.allocation import uniform
from floe_kernels.integrations.transformers import apply_plan, find_modules
from floe_kernels.pipeline.encoding import Samples
from floe_kernels.pipeline.training import DataOrder, Recipe, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tiny_model import make_model

    return make_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def adapted(folder):
    """Return a function that loads the model afresh, adapts it, and returns it."""
    from transformers import AutoModelForCausalLM

    def load(dropout=0.0):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.manual_seed(3)
        plan = uniform(find_modules(model), experts=2, rank=2, lora_dropout=dropout)
        return apply_plan(model, plan)

    return load


@pytest.fixture(scope="module")
def samples():
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 50, (4 + n % 5,), generator=draw).tolist() for n in range(13)]
    return Samples.of([(row, 1 + len(row) // 2) for row in rows])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Stopped(Exception):
    pass


def test_every_epoch_sees_every_sample_once():
    order = DataOrder(13, 4, seed=1)
    seen = [i for batch in range(13) for i in order.at(batch)]
    epochs = [seen[i : i + 13] for i in range(0, 52, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    fresh = DataOrder(13, 4, seed=1)
    assert [fresh.at(b) for b in (12, 3, 0, 7)] == [order.at(b) for b in (12, 3, 0, 7)]
    assert fresh.at(0) != DataOrder(13, 4, seed=2).at(0)


def test_learning_rates_warm_up_and_stay_or_fall():
    constant = Recipe(steps=10, learning_rate=2.0, schedule="constant", lr_warm_up=0.3)
    assert [constant.learning_rate_at(i) for i in (0, 1, 2, 9)] == pytest.approx(
        [2 / 3, 4 / 3, 2, 2]
    )
    cosine = Recipe(steps=10, learning_rate=2.0, lr_warm_up=0.0)
    rates = [cosine.learning_rate_at(i) for i in range(10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 2
    assert 0 < rates[-1] < 0.1  # no step is wasted
    assert Recipe(steps=1).learning_rate_at(0) == Recipe(steps=1).learning_rate


def test_accumulation_equals_one_large_batch(adapted, samples):
    def first_step(batch_size, accumulation):
        model = adapted()
        recipe = Recipe(1, batch_size, accumulation, learning_rate=0.01, lr_warm_up=0.0)
        # SGD-like: after one AdamW step only signs are left, so look at the loss and the norm
        figures = []
        train(model, samples, recipe, on_step=lambda *step: figures.append(step))
        return figures[0][1], figures[0][2]["grad_norm"], figures[0][2]["tokens"]

    whole, parts = first_step(12, 1), first_step(3, 4)
    assert parts[2] == whole[2]
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-5)


def test_training_lowers_the_loss_and_touches_the_adapter_alone(adapted, samples):
    model = adapted()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = train(model, samples, Recipe(30, 4, learning_rate=0.1))
    assert result.steps == 30 == len(result.losses)
    assert sum(result.losses[-5:]) < sum(result.losses[:5]) - 1
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert not model.training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_a_stopped_training_ends_in_the_same_bits(adapted, samples, tmp_path, dropout, stop_after):
    recipe = Recipe(8, 3, learning_rate=0.02, weight_decay=0.1)
    torch.manual_seed(5)
    undisturbed = adapted(dropout)
    losses = train(undisturbed, samples, recipe).losses

    def stop(step, *_):
        if step == stop_after + 1:
            raise Stopped  # as good as a kill: this step is not saved

    keywords = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_seconds": 0}
    torch.manual_seed(5)
    stopped = adapted(dropout)
    if stop_after < recipe.steps:
        with pytest.raises(Stopped):
            train(stopped, samples, recipe, on_step=stop, **keywords)
    else:
        train(stopped, samples, recipe, **keywords)
    torch.manual_seed(99)
    resumed, at = adapted(dropout), []
    rest = train(resumed, samples, recipe, on_resume=at.append, **keywords)
    # saving may take no more than its share of the time, so the last steps may be done again
    assert at[0] <= stop_after
    assert at[0] >= 1
    assert rest.losses == losses[at[0] :]
    expected = weights(undisturbed)
    assert all(torch.equal(p, expected[name]) for name, p in weights(resumed).items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_step_and_saves_it(adapted, samples, tmp_path, number):
    path, done = tmp_path / "c.safetensors", []

    def interrupt(step, *_):
        done.append(step)
        if step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(adapted(), samples, Recipe(9, 3), checkpoint=path, on_step=interrupt)
    assert signal.getsignal(number) is before
    assert done == [1, 2, 3]
    train(adapted(), samples, Recipe(9, 3), checkpoint=path, on_resume=done.append)
    assert done[-1] == 3


def test_a_checkpoint_of_another_recipe_is_refused(adapted, samples, tmp_path):
    path = tmp_path / "c.safetensors"
    train(adapted(), samples, Recipe(2, 3), checkpoint=path)
    with pytest.raises(ValueError, match=r"must be a checkpoint with recipe .*'steps': 3"):
        train(adapted(), samples, Recipe(3, 3), checkpoint=path)


def test_a_loss_that_is_not_finite_ends_the_training(adapted, samples):
    model = adapted()
    with torch.no_grad():
        model.lm_head.weight[7] = math.inf
    with pytest.raises(
        FloatingPointError, match=r"must stay finite, got .* in step 1: try a lower"
    ):
        train(model, samples, Recipe(2, 3))


def test_a_model_without_adapters_is_refused(folder, samples):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    with pytest.raises(ValueError, match="something that requires a gradient, got none"):
        train(model, samples, Recipe(2, 3))


def test_a_limit_on_the_gradient_scales_it(adapted, samples):
    steps = []
    for clip in (0.0, 1e-3):
        model = adapted()
        train(model, samples, Recipe(1, 4, clip=clip), on_step=lambda *s: steps.append(s))
    assert steps[0][2]["grad_norm"] == steps[1][2]["grad_norm"] > 1e-3
