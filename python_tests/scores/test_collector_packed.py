"""FisherCollector: samples that share a row are kept apart, by whatever tells them apart."""

import types

import pytest
import torch
from torch import nn

from floe_kernels import FisherCollector, FusedMoELoRA
from floe_kernels.nn.packing import packed_padding, sample_starts

LENGTHS = (3, 4, 2, 5)


class Tokens(nn.Module):
    """Predicts the next token from this one alone, so that packing changes no gradient."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = FusedMoELoRA(nn.Linear(6, 11), [2, 3, 1])
        nn.init.normal_(self.layer.lora_B)
        self.double()

    def forward(self, input_ids, labels, attention_mask=None, position_ids=None, **_bounds):
        logits = self.layer(self.embedding(input_ids))[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return types.SimpleNamespace(loss=loss / (labels[:, 1:] != -100).sum())


def samples():
    gen = torch.Generator().manual_seed(1)
    return [torch.randint(11, (length,), generator=gen) for length in LENGTHS]


def labels_of(ids):
    """A packed sample's first token is nobody's next."""
    labels = ids.clone()
    labels[0] = -100
    return labels


def packed(parts, *, padding=0):
    """One row of samples as TRL's and transformers' collators without padding make it."""
    row = {
        "input_ids": torch.cat([*parts, torch.zeros(padding, dtype=torch.long)]),
        "labels": torch.cat([*map(labels_of, parts), torch.full((padding,), -100)]),
        "position_ids": torch.cat([torch.arange(len(p)) for p in parts] + [torch.zeros(padding)]),
    }
    return {name: values[None].long() for name, values in row.items()}


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def record(model, *batches, **options):
    with FisherCollector(model, granularity="element", **options) as collector:
        for batch in batches:
            model(**batch).loss.backward()
            collector.step()
    return collector.record()


def apart(model, **options):
    rows = [{"input_ids": ids[None], "labels": labels_of(ids)[None]} for ids in samples()]
    return record(model, *rows, **options)


def assert_same(got, want):
    assert got.counts == want.counts
    for name, total in want.sums.items():
        torch.testing.assert_close(got.sums[name], total)
    for name, hits in want.hits.items():
        assert torch.equal(got.hits[name], hits)
    torch.testing.assert_close(got.gates, want.gates)


def two_rows():
    rows = [packed(samples()[:2], padding=0), packed(samples()[2:], padding=0)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def with_bounds(name, padding=0):
    batch = packed(samples(), padding=padding)
    del batch["position_ids"]
    return {**batch, name: bounds((*LENGTHS, *[1] * padding))}


@pytest.mark.parametrize("per_sample", ["sum", "mean"])
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(lambda: packed(samples()), id="positions"),
        pytest.param(lambda: packed(samples(), padding=3), id="positions, padding"),
        pytest.param(lambda: two_rows(), id="two rows of 7"),
        pytest.param(lambda: with_bounds("cu_seq_lens_q"), id="transformers' bounds"),
        pytest.param(lambda: with_bounds("cu_seq_lens_q", 3), id="bounds, padding"),
        pytest.param(lambda: with_bounds("cu_seqlens_q"), id="flash-attn's bounds"),
        pytest.param(lambda: with_bounds("cu_seqlens"), id="Megatron's bounds"),
    ],
)
def test_packed_samples_score_as_they_do_apart(batch, per_sample):
    model = Tokens()
    assert_same(record(model, batch(), per_sample=per_sample), apart(model, per_sample=per_sample))


def test_a_label_across_a_seam_is_the_earlier_samples():
    # position_ids alone, labels as they are: the last token of one sample predicts the next's first
    model, batch = Tokens(), packed(samples())
    batch["labels"] = batch["input_ids"]
    got = record(model, batch, per_sample="mean")
    ends = torch.tensor(LENGTHS).cumsum(0)
    longer = [batch["input_ids"][0, e - n : e + 1] for n, e in zip(LENGTHS, ends, strict=True)]
    rows = [{"input_ids": ids[None], "labels": ids[None]} for ids in longer]
    want = record(model, *rows, per_sample="mean")
    assert got.counts["tokens"] == sum(LENGTHS) - 1
    for name, total in want.sums.items():
        torch.testing.assert_close(got.sums[name], total)


@pytest.mark.parametrize(
    "further",
    [
        {"attention_mask": torch.ones(1, sum(LENGTHS))},
        {"past_key_values": object()},
        {"position_ids": torch.arange(sum(LENGTHS))[None]},
        {"position_ids": torch.zeros(3, 1, sum(LENGTHS))},
        {"position_ids": None},
    ],
    ids=["mask", "cache", "no restart", "three axes", "none"],
)
def test_what_is_not_packed_is_one_sample_a_row(further):
    batch = {**packed(samples()), **further}
    assert record(Tokens(), batch).counts["samples"] == 1


def test_positions_that_every_row_shares():
    starts = sample_starts(
        {"inputs_embeds": torch.zeros(2, 4, 3), "position_ids": torch.tensor([[5, 6, 2, 3]])}
    )
    assert torch.equal(starts, torch.tensor([[True, False, True, False]]).expand(2, 4))
    assert not packed_padding(starts).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"input_ids": torch.zeros(5), "position_ids": torch.zeros(1, 5)},
        {"input_ids": torch.zeros(1, 5), "position_ids": torch.zeros(1, 4)},
        {"input_ids": torch.zeros(2, 0), "position_ids": torch.zeros(2, 0)},
    ],
    ids=["nothing", "one axis", "other length", "no tokens"],
)
def test_arguments_that_do_not_tell(arguments):
    assert sample_starts(arguments) is None


def test_one_token_a_row_is_no_padding():
    starts = sample_starts({"input_ids": torch.zeros(3, 1), "position_ids": torch.zeros(3, 1)})
    assert starts.tolist() == [[True]] * 3
    assert not packed_padding(starts).any()


def test_a_layer_that_sees_other_tokens_is_told():
    model = Tokens()
    cut = types.MethodType(lambda self, x: nn.Embedding.forward(self, x)[:, 1:], model.embedding)
    model.embedding.forward = cut
    with (
        FisherCollector(model),
        pytest.raises(ValueError, match=r"must have the batch's 14 tokens.*got \(1, 13, 6\)"),
    ):
        model(**packed(samples()))


def test_offsets_given_by_hand():
    # three samples in one row of a batch, told by offsets
    layer = FusedMoELoRA(nn.Linear(4, 4), [2, 2])
    nn.init.normal_(layer.lora_B)
    x, offsets = torch.randn(1, 9, 4), torch.tensor([0, 2, 3, 9])
    with FisherCollector(layer, loss_reduction="sum", granularity="element") as collector:
        collector.batch(3, offsets=offsets)
        layer(x).square().sum().backward()
        collector.step()
        for a, b in ((0, 2), (2, 3), (3, 9)):
            layer(x[:, a:b]).square().sum().backward()
            collector.step()
    got = collector.record()
    assert got.counts["samples"] == 6
    with FisherCollector(layer, loss_reduction="sum", granularity="element") as alone:
        for a, b in ((0, 2), (2, 3), (3, 9)):
            layer(x[:, a:b]).square().sum().backward()
            alone.step()
    torch.testing.assert_close(got.sums["lora_B"], 2 * alone.record().sums["lora_B"])


def test_hits_count_samples_that_reached_an_expert():
    layer = FusedMoELoRA(nn.Linear(4, 4), [2, 2, 2], top_k=1)
    x = torch.randn(5, 7, 4)
    with FisherCollector(layer, loss_reduction="sum") as collector:
        layer(x).sum().backward()
        collector.step()
    chosen = (x @ layer.router.weight.T).argmax(-1)
    want = [(chosen == e).any(1).sum().item() for e in range(3)]
    assert collector.record().hits[""].tolist() == want
