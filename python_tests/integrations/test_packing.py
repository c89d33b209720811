"""Packed sequences, as collators without padding make them, on real architectures."""

import math

import pytest
import torch
import torch._dynamo.testing
from adapting import adapted, tokens
from test_frameworks import pytestmark, tokenizer  # noqa: F401
from test_trainer import COEFS

from floe_kernels import FisherCollector
from floe_kernels.integrations.transformers import adapted_modules

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 8, 3)
ARCHITECTURES = ("llama", "mistral", "gemma3", "qwen2", "qwen3", "phi")


def assert_same(got, want, peer):
    """Hold a record to ``want`` as tightly as transformers itself keeps ``peer``, plus rounding.

    The norms of these models round to float32 in any dtype, 7 of them in three blocks, forward and
    backward, and a square doubles the error.
    """
    assert got.counts == want.counts == peer.counts
    assert all(torch.equal(got.hits[name], hits) for name, hits in want.hits.items())
    eps = 4 * 7 * torch.finfo(torch.float32).eps
    for name, total in {**want.sums, "gates": want.gates}.items():
        ours, theirs = ((r.gates if name == "gates" else r.sums[name]) for r in (got, peer))
        allowed = 2 * (theirs - total).abs().max() + eps * total.abs().max()
        assert (ours - total).abs().max() <= allowed, name


def samples():
    rows = [tokens(1, length, seed=i)[0].tolist() for i, length in enumerate(LENGTHS)]
    return [{"input_ids": row, "labels": row} for row in rows]


def flattened(**options):
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    return collate(samples())


def padded(batch, count):
    """The same row, ended with ``count`` tokens of padding as TRL's collator ends it."""
    fill = {"input_ids": 7, "labels": -100, "position_ids": 0}
    return {
        name: torch.nn.functional.pad(values, (0, count), value=fill[name])
        for name, values in batch.items()
    }


def one_at_a_time():
    for sample in samples():
        ids = torch.tensor([sample["input_ids"]])
        yield {"input_ids": ids, "labels": ids}


def rows():
    """An ordinary batch of the samples, padded on the right."""
    longest = max(LENGTHS)
    ids = torch.tensor([s["input_ids"] + [7] * (longest - len(s["input_ids"])) for s in samples()])
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


def score(model, batches):
    with FisherCollector(model, granularity="element") as collector:
        for batch in batches:
            model(**{**batch, "use_cache": False}).loss.backward()
            collector.step()
    return collector.record()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padding", [0, 4])
def test_packed_samples_score_as_they_do_apart(architecture, padding):
    model = adapted(architecture).double()
    packed = score(model, [padded(flattened(), padding)])
    assert packed.counts["samples"] == len(LENGTHS)
    assert_same(packed, score(model, one_at_a_time()), score(model, [rows()]))


def test_packed_samples_of_gemma_2():
    # its softmax is of float32, and what reaches the keys is a difference of what it returns
    model = adapted("gemma2").double()
    packed, apart = score(model, [flattened()]), score(model, one_at_a_time())
    assert packed.counts == apart.counts
    ours, theirs = (r.read(how="sum", aggregate="module") for r in (packed, apart))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_bounds_of_flash_attention_tell_them_apart_too():
    model = adapted().double()
    batch = flattened(return_flash_attn_kwargs=True)
    assert "cu_seq_lens_q" in batch
    assert_same(score(model, [batch]), score(model, one_at_a_time()), score(model, [rows()]))


def gradients(model, batch):
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_padding_of_a_packed_row_is_in_no_loss():
    model = adapted().double().train()
    for layer in adapted_modules(model).values():
        layer.set_aux_loss(*COEFS)
    bare = gradients(model, flattened())
    loads = [layer.expert_load() for layer in adapted_modules(model).values()]
    with_padding = gradients(model, padded(flattened(), 4))
    for name, gradient in bare.items():
        torch.testing.assert_close(with_padding[name], gradient)
    for layer, load in zip(adapted_modules(model).values(), loads, strict=True):
        assert layer.routing.token_mask.tolist() == [True] * sum(LENGTHS) + [False] * 4
        torch.testing.assert_close(layer.expert_load(), load)


def test_a_last_prompt_of_one_token_is_routed():
    model = adapted().double()
    batch = {"input_ids": tokens(1, 4), "position_ids": torch.tensor([[0, 1, 2, 0]])}
    with torch.no_grad():
        both = model(**batch, use_cache=False).logits
        alone = model(input_ids=batch["input_ids"][:, 3:]).logits
    torch.testing.assert_close(both[:, 3:], alone)


def test_packed_rows_compile_without_a_break():
    model = adapted().double().train()
    batch = padded(flattened(), 2)
    eager = gradients(model, batch)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for name, gradient in gradients(compiled, batch).items():
        torch.testing.assert_close(gradient, eager[name.removeprefix("_orig_mod.")])
    torch._dynamo.reset()


def test_scores_of_a_compiled_model():
    model = adapted().double()
    compiled = torch.compile(model, backend="aot_eager")
    with FisherCollector(model) as collector:
        compiled(**flattened(), use_cache=False).loss.backward()
        collector.step()
    assert collector.record().counts["samples"] == len(LENGTHS)
    for name, total in score(model, [flattened()]).sums.items():
        torch.testing.assert_close(collector.record().sums[name], total.sum(-1))
    torch._dynamo.reset()


def test_trl_packs(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from floe_kernels.integrations.trainer import MoELoRACallback

    rows = [{"input_ids": tokens(1, 4 + i % 3, seed=i)[0].tolist()} for i in range(12)]
    seen = []
    model = adapted()
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    run = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path), max_steps=2, bf16=False, use_cpu=True, logging_steps=1, report_to=[],
            per_device_train_batch_size=1, disable_tqdm=True, packing=True, max_length=16,
            pad_to_multiple_of=8,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[MoELoRACallback(*COEFS)],
    )  # fmt: skip
    run.train()
    (batch, *_) = seen
    assert batch.get("attention_mask") is None
    record = score(adapted(), [batch])
    assert record.counts["samples"] > 1
    assert all(math.isfinite(r["aux_loss"]) for r in run.state.log_history if "loss" in r)
