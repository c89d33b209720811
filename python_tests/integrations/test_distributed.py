"""Two processes over gloo end where one process does: DDP, FSDP2, Fisher scores, figures."""

import os

import pytest
import torch
import torch.distributed as dist
from adapting import adapted, randomise, tokens
from torch.distributed.fsdp import fully_shard

from floe_kernels import FisherCollector
from floe_kernels.integrations.trainer import AuxLossScale
from floe_kernels.integrations.transformers import (
    adapted_modules,
    find_modules,
    fingerprint,
    load_adapter,
    save_adapter,
)
from floe_kernels.testing.models import tiny_model

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

WORLD, STEPS = 2, 3
COEFS = {"load_balance_coef": 0.1, "z_loss_coef": 0.01}


def make():
    return adapted(overrides={"num_hidden_layers": 2}).double()


def batches(step, rank):
    """Every process's own rows, of uneven numbers of loss tokens, one of them padded."""
    ids = tokens(2, 6, seed=10 * step + rank)
    mask = torch.ones_like(ids)
    mask[0, : 1 + rank] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model, run, ranks, steps=1):
    """Three updates; ``ranks`` are the processes whose batches this one sees."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
    scale = AuxLossScale(model, **COEFS)
    scale.set(steps=steps)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in ranks:
            (run(**batches(step, rank)).loss / steps).backward()
        optimizer.step()
    return scale


def trained(model):
    full = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = parameter.detach()
            full[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def score(model, run, ranks):
    with FisherCollector(model, granularity="element") as collector:
        for step in range(STEPS):
            for rank in ranks:
                run(**batches(step, rank)).loss.backward()
                collector.step()
    return collector.record()


def shard(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def ddp(rank):
    model = make()
    run = torch.nn.parallel.DistributedDataParallel(model)
    scale = train(model, run, [rank])
    return {"weights": trained(model), "figures": scale.figures(reduce=True)}


def fsdp(rank):
    model = shard(make())
    train(model, model, [rank])
    assert any(hasattr(p, "full_tensor") for p in model.parameters()), "nothing was sharded"
    return {"weights": trained(model)}


def fsdp_on_a_rounded_base(rank):
    """Frozen bfloat16 weights beside float32 experts."""
    model = adapted(overrides={"num_hidden_layers": 2})
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model = shard(model)
    train(model, model, [rank])
    assert all(p.isfinite().all() for p in trained(model).values())
    return {"dtypes": sorted({str(p.dtype) for p in model.parameters()})}


def fisher(rank):
    model = make()
    run = torch.nn.parallel.DistributedDataParallel(model)
    record = score(model, run, [rank])
    return {"sums": record.sums, "counts": record.counts, "hits": record.hits}


def fisher_of_shards(rank):
    model = shard(make())
    record = score(model, model, [rank])
    return {"sums": record.sums, "counts": record.counts, "hits": record.hits}


def saved_by_shards(rank):
    """Every process gathers and one writes; loaded onto shards, the values are those saved."""
    plain, model = make(), shard(make())
    assert fingerprint(model) == fingerprint(plain)
    assert list(find_modules(model)) == list(find_modules(plain))
    train(model, model, [rank])
    save_adapter(model, "adapter")
    again = shard(randomise(make(), seed=9))
    load_adapter(again, "adapter")
    ours, theirs = trained(model), trained(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return {"weights": ours}


def refused_for_shards(rank):
    messages = []
    bare = shard(tiny_model("llama", num_hidden_layers=2))
    for refused in (
        lambda: load_adapter(bare, "adapter", check_base=False),
        lambda: load_adapter(shard(make().float()), "adapter", check_base=False),
        lambda: save_adapter(shard(make()), "adapter/adapter.json"),
    ):
        try:
            refused()
        except (ValueError, OSError) as error:
            messages.append(str(error))
    return messages


WORK = (ddp, fsdp, fsdp_on_a_rounded_base, fisher, fisher_of_shards, saved_by_shards,
        refused_for_shards)  # fmt: skip


def work(rank, folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    for job in WORK:
        try:
            results[job.__name__] = job(rank)
        except Exception as error:
            results[job.__name__] = repr(error)
        dist.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def results(folder):
    """What both processes return; starting them is the slow part, so it is done once."""
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone():
    model = make()
    scale = train(model, model, range(WORLD), steps=WORLD)
    return trained(model), scale


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(results, alone, how):
    weights, _scale = alone
    start = trained(make())
    for result in results:
        assert isinstance(result[how], dict), result[how]
        assert set(result[how]["weights"]) == set(weights)
        for name, got in result[how]["weights"].items():
            torch.testing.assert_close(got, weights[name])
    assert any(not torch.allclose(weights[name], start[name]) for name in weights)


def test_figures_are_averaged_over_processes(results):
    figures = []
    for rank in range(WORLD):
        model = make()
        weights = results[0]["ddp"]["weights"]
        # the figures are of the forward pass before the last update; compare both processes'
        model.load_state_dict(weights, strict=False)
        scale = AuxLossScale(model, **COEFS)
        model(**batches(STEPS - 1, rank))
        figures.append(scale.figures())
    one, two = (result["ddp"]["figures"] for result in results)
    assert one == two
    assert figures[0] != figures[1]
    mean = sum(f["router_entropy"] for f in figures) / WORLD
    assert abs(one["router_entropy"] - mean) < abs(figures[0]["router_entropy"] - mean)


@pytest.mark.parametrize("how", ["fisher", "fisher_of_shards"])
def test_fisher_scores_are_summed_once(results, how):
    expected = score(model := make(), model, range(WORLD))
    for result in results:
        got = result[how]
        assert isinstance(got, dict), got
        assert got["counts"] == expected.counts
        assert got["counts"]["samples"] == 2 * WORLD * STEPS
        assert set(got["sums"]) == set(expected.sums)
        for name, value in got["sums"].items():
            torch.testing.assert_close(value, expected.sums[name])
        for name, hits in got["hits"].items():
            assert torch.equal(hits, expected.hits[name])


def test_sharding_takes_a_base_of_another_dtype(results):
    for result in results:
        assert result["fsdp_on_a_rounded_base"] == {"dtypes": ["torch.bfloat16", "torch.float32"]}


def test_an_adapter_saved_by_shards_is_like_any_other(results, alone, folder):
    weights, _scale = alone
    for result in results:
        assert isinstance(result["saved_by_shards"], dict), result["saved_by_shards"]
    model = load_adapter(tiny_model("llama", num_hidden_layers=2).double(), folder / "adapter")
    saved = trained(model)
    assert saved.keys() == weights.keys()
    for name, value in results[0]["saved_by_shards"]["weights"].items():
        assert torch.equal(saved[name], value)
        torch.testing.assert_close(value, weights[name])


def test_what_shards_cannot_do_every_process_is_told(results):
    for result in results:
        unplanned, rounded, no_folder = result["refused_for_shards"]
        assert "must be applied before the model is sharded" in unplanned
        assert "must have its adapter's dtype to load it, got torch.float32" in rounded
        assert "adapter.json" in no_folder


def test_adapters_are_found_below_a_wrapper():
    model = torch.nn.Sequential(make())
    assert len(AuxLossScale(model).layers) == len(
        [layer for layer in adapted_modules(model).values() if layer.ranks]
    )
