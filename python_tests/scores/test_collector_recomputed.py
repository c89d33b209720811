"""FisherCollector: what runs twice counts once, and what is compiled counts too."""

import pytest
import torch
from scored_model import adapted, batches, collect


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    model = adapted()
    want = collect(model, batches())
    model.embedding.requires_grad_()  # a reentrant checkpoint needs an input that trains
    model.checkpointing = reentrant
    got = collect(model, batches())
    for name, total in want.sums.items():
        torch.testing.assert_close(got.sums[name], total)


def test_compiled_model_collects():
    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batches()[0]).loss.backward()  # compiled before there was a collector
    got = collect(model, batches(), compiled)
    for name, total in collect(model, batches()).sums.items():
        torch.testing.assert_close(got.sums[name], total)
    assert got.counts["samples"] == 6
