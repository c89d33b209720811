"""The padding mask reaches the layers, belongs to its batch, and is gone afterwards."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from floe_kernels.integrations.batch_hook import BatchHook
from floe_kernels.nn import BatchContext


class Model(nn.Module):
    """Multiplies by the mask that its layers would see."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.ones(()))
        self.batch = BatchContext()
        self.seen = []
        self.handles = BatchHook(self, self.batch).install(self)

    def layer(self, x):
        mask = self.batch.mask_for(x)
        self.seen.append(mask)
        return x * self.scale * (1 if mask is None else mask[..., None])

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None):
        x = input_ids[..., None].double() if inputs_embeds is None else inputs_embeds
        if not torch.is_grad_enabled():
            return self.layer(x)
        return {"hidden": [(checkpoint(self.layer, x, use_reentrant=False),)]}


IDS = torch.ones(2, 3)
MASK = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
LAST = MASK[:, 1:].bool()


@pytest.mark.parametrize(
    ("args", "kwargs", "seen"),
    [
        ((IDS,), {"attention_mask": MASK[:, 1:]}, LAST),
        ((IDS, MASK[:, 1:]), {}, LAST),
        ((IDS,), {"attention_mask": MASK}, LAST),  # one column of the KV cache
        ((IDS,), {"attention_mask": MASK.double()}, LAST),
        ((), {"inputs_embeds": torch.ones(2, 3, 5), "attention_mask": MASK}, LAST),
        ((IDS,), {}, None),
        ((IDS,), {"attention_mask": None}, None),
        ((IDS,), {"attention_mask": MASK[:, :2]}, None),
        ((IDS,), {"attention_mask": torch.ones(2, 1, 3, 3)}, None),
        ((IDS,), {"attention_mask": {"full": MASK}}, None),
        ((IDS[:1],), {"attention_mask": MASK}, None),  # broadcast: not this layer's tokens
    ],
    ids=range(11),
)
def test_which_columns_are_published(args, kwargs, seen):
    model = Model()
    with torch.no_grad():
        model(*args, **kwargs)
    (mask,) = model.seen
    assert (mask is None) == (seen is None)
    if seen is not None:
        assert mask.dtype == torch.bool
        assert torch.equal(mask, seen)
    assert model.batch.token_mask is None, "withdrawn after the forward pass"


def test_an_encoders_mask_is_not_published():
    model = Model(type("Config", (), {"is_encoder_decoder": True})())
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    assert model.seen == [None]


def test_flattened_tokens_find_their_mask():
    batch = BatchContext()
    batch.token_mask = LAST
    assert torch.equal(batch.mask_for(torch.zeros(6, 8)), LAST.reshape(-1))
    assert batch.mask_for(torch.zeros(2, 4, 8)) is None


@pytest.mark.parametrize("order", ["together", "first last", "last first"])
def test_recomputation_sees_the_mask_of_its_own_batch(order):
    model = Model()
    masks = [LAST, ~LAST, None]
    losses = []
    for mask in masks:
        output = model(IDS, attention_mask=mask)
        losses.append(output["hidden"][0][0].sum())
    model.seen.clear()
    if order == "together":
        sum(losses).backward()
        recomputed = masks[::-1]
    else:
        picks = [0, 1, 2] if order == "first last" else [2, 1, 0]
        for i in picks:
            losses[i].backward()
        recomputed = [masks[i] for i in picks]
    assert len(model.seen) == 3
    for got, mask in zip(model.seen, recomputed, strict=True):
        assert (got is None) == (mask is None)
        assert mask is None or torch.equal(got, mask)
    assert model.batch.token_mask is None, "withdrawn after the backward pass"
    assert model.scale.grad == LAST.sum() + (~LAST).sum() + LAST.numel()


def test_a_forward_pass_that_fails_leaves_no_mask_behind():
    model = Model()
    model.scale.data = torch.ones(3, 5, 7)  # fits no batch
    with pytest.raises(RuntimeError):
        model(IDS, attention_mask=MASK)
    assert model.batch.token_mask is None


PACKED = torch.tensor([[0, 1, 0], [0, 0, 0]])
PADDING = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("kwargs", "seen"),
    [
        ({"position_ids": PACKED, "labels": IDS}, PADDING),
        ({"position_ids": PACKED}, None),  # a last prompt of one token is a prompt
        ({"position_ids": PACKED, "labels": IDS, "attention_mask": MASK}, LAST),
        ({"labels": IDS}, None),
    ],
    ids=["to train on", "to read", "with a mask", "no positions"],
)
def test_padding_of_packed_rows(kwargs, seen):
    class Labelled(Model):
        def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None):
            return super().forward(input_ids)

    model = Labelled()
    model.handles[0].remove()
    model.handles = BatchHook(model, model.batch).install(model)
    with torch.no_grad():
        model(IDS, **kwargs)
    (mask,) = model.seen
    assert (mask is None) == (seen is None)
    assert seen is None or torch.equal(mask, seen)


def test_a_leaf_in_the_output_collects_no_hooks():
    class Leaf(Model):
        def forward(self, input_ids):
            return self.scale

    model = Leaf()
    for _ in range(3):
        model(IDS)
    assert not model.scale._backward_hooks


def test_handles_unhook():
    model = Model()
    for handle in model.handles:
        handle.remove()
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    assert model.seen == [None]
