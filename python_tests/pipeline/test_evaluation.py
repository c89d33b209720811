"""Held-out loss against a loop over single tokens."""

import pytest
import torch

from floe_kernels.pipeline.encoding import Samples
from floe_kernels.pipeline.evaluation import evaluate, negative_log_likelihood


@pytest.fixture(scope="module")
def model(model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder).double().eval()


@pytest.fixture(scope="module")
def samples():
    draw = torch.Generator().manual_seed(0)
    lengths = [3, 17, 9, 2, 12, 12, 30]
    rows = [torch.randint(0, 50, (n,), generator=draw).tolist() for n in lengths]
    return Samples.of([(row, max(1, len(row) // 3)) for row in rows])


def by_hand(model, samples, indices):
    """Sum over samples and tokens, one forward pass for each, no padding, float64."""
    total = 0.0
    for n in indices:
        ids = samples.tokens[samples.starts[n] : samples.starts[n + 1]].long()
        logits = model(input_ids=ids[None]).logits[0]
        for t in range(int(samples.answers[n]), len(ids)):
            total -= logits[t - 1].log_softmax(-1)[ids[t]].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_weighs_the_same_in_any_batch(model, samples, batch_size):
    expected = by_hand(model, samples, range(len(samples))) / samples.loss_tokens()
    found = evaluate(model, samples, batch_size=batch_size)
    # the log-likelihoods are float32
    assert found.loss == pytest.approx(expected, rel=2e-6)
    assert found.tokens == samples.loss_tokens()


def test_the_head_runs_only_where_there_are_labels(model, samples, monkeypatch):
    seen = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape) or head(x))
    negative_log_likelihood(model, samples.batch([1]))
    answer = 17 - 17 // 3
    assert seen == [(1, answer, 16)]


def test_a_model_that_cannot_pick_columns_gives_the_same(model, samples):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    batch = samples.batch(range(len(samples)))
    assert torch.allclose(
        negative_log_likelihood(model, batch), negative_log_likelihood(Plain(), batch), rtol=1e-6
    )


def test_the_model_is_left_as_it_was(model, samples):
    model.train()
    evaluate(model, samples)
    assert model.training
    model.eval()


def test_no_token_is_an_error(model):
    with pytest.raises(ValueError, match="at least one token that counts, got none"):
        evaluate(model, Samples.of([([5], 1)]))


def test_perplexity_of_a_hopeless_model_is_infinite():
    from floe_kernels.pipeline.evaluation import Evaluation

    assert Evaluation(1e4, 1).perplexity == float("inf")
    assert Evaluation(0.0, 1).perplexity == 1.0
