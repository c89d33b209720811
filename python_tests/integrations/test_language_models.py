"""Adapted language models generate, train, recompute and compile as bare ones do."""

import pytest
import torch
import torch._dynamo.testing
from adapting import adapted, recompute, store, tokens

from floe_kernels.integrations.transformers import adapted_modules
from floe_kernels.testing.models import ARCHITECTURES

# at the usual initializer_range, 0.02, every greedy continuation is one repeated token
VARIED = {"initializer_range": 0.3, "tie_word_embeddings": False}


def padded(ids, pad):
    """(ids, mask) with ``pad`` columns of padding on the left."""
    rows = len(ids)
    mask = torch.cat([torch.zeros(rows, pad), torch.ones_like(ids)], 1).long()
    return torch.cat([torch.full((rows, pad), 7), ids], 1), mask


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_left_changes_no_output(architecture):
    model, ids = adapted(architecture), tokens(1, 6)
    # Gemma 2's eager attention turns fully masked rows to NaN in float64, adapted or not
    model = model if architecture == "gemma2" else model.double()
    long, mask = padded(ids, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # what generate() passes
    with torch.no_grad():
        alone = model(ids).logits
        out = model(long, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(out, alone)
    for layer in adapted_modules(model).values():
        _logits, experts, token_mask = layer.routing
        assert torch.equal(token_mask, mask.bool().flatten())
        picks = torch.bincount(experts[3:].reshape(-1), minlength=len(layer.ranks))
        torch.testing.assert_close(layer.expert_load(), picks / picks.sum(), check_dtype=False)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation(architecture, how):
    model = adapted(architecture, overrides=VARIED).double()
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6, "pad_token_id": 0}
    one, two = tokens(1, 6, seed=1), tokens(1, 4, seed=2)
    alone = [
        model.generate(x, attention_mask=torch.ones_like(x), **options, **how)[0, x.shape[1] :]
        for x in (one, two)
    ]
    long, mask = padded(two, 2)
    both = model.generate(
        torch.cat([one, long]),
        attention_mask=torch.cat([torch.ones_like(one), mask]),
        **options,
        **how,
    )[:, 6:]
    assert torch.equal(both, torch.stack(alone))
    assert not torch.equal(both[0], both[1])
    assert len(both.unique()) > 3, "a constant continuation would prove nothing"


def test_the_mask_follows_the_cache():
    model = adapted().double()
    long, mask = padded(tokens(2, 4), 2)
    mask[1] = 1
    shapes = []
    first = next(iter(adapted_modules(model).values()))
    first.register_forward_pre_hook(
        lambda layer, args: shapes.append((layer.batch.token_mask.tolist(), args[0].shape[1]))
    )
    model.generate(long, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert shapes == [(mask.bool().tolist(), 6), ([[True], [True]], 1), ([[True], [True]], 1)]


def gradients(model, *batches, seed=3, run=None):
    run = model if run is None else run
    model.zero_grad()
    torch.manual_seed(seed)
    losses = [
        run(ids, attention_mask=mask, labels=ids, use_cache=False).loss for ids, mask in batches
    ]
    sum(losses).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(float(g.abs().sum()) for g in found.values()) > 0
    return found


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_recomputed_layers_route_and_drop_as_they_did(architecture, reentrant):
    ids, mask = padded(tokens(2, 5), 2)
    other = mask.clone()
    other[0], other[1, :4] = 1, 0
    batches = [(ids, mask), (ids, other)]  # one backward pass for both
    model = adapted(architecture, lora_dropout=0.5).train()
    stored = gradients(model, *batches)
    recompute(model, reentrant=reentrant)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    recomputed = gradients(model, *batches)
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)
    store(model)
    unlike = gradients(model, *batches, seed=4)
    assert any(not torch.equal(stored[name], unlike[name]) for name in stored), "nothing dropped"


def test_compiled_whole_and_without_a_break():
    model = adapted().train()
    ids, mask = padded(tokens(2, 5), 2)
    eager = gradients(model, (ids, mask))
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for _ in range(2):
        got = gradients(model, (ids, mask), run=compiled)
        for name, gradient in eager.items():
            torch.testing.assert_close(got[name], gradient)
    # the hook's two nodes are a graph of their own, for dynamo never traces Module.__call__
    assert sorted(len(graph.graph.nodes) > 10 for graph in graphs.graphs) == [False, True]
    assert next(iter(adapted_modules(model).values())).batch.token_mask is None
    torch._dynamo.reset()


def test_compiled_inside_a_larger_function():
    model = adapted()
    ids, mask = padded(tokens(2, 5), 2)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def logits(ids, mask):
        return model(ids, attention_mask=mask).logits

    with torch.no_grad():
        torch.testing.assert_close(logits(ids, mask), model(ids, attention_mask=mask).logits)
    assert graphs.frame_count == 1
    assert next(iter(adapted_modules(model).values())).batch.token_mask is None
    torch._dynamo.reset()
