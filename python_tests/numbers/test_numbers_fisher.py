"""Sums of a million squares lose nothing, and a loss scaler's overflows count nowhere."""

import math

import pytest
import torch
from backends import SETS, running
from lengths import HELD

from floe_kernels import FisherCollector, FusedMoELoRA
from floe_kernels import functional as FK
from floe_kernels.scores import FisherRecord

SAMPLES, A_STEP = 1_000_000, 1_000
#: their squares: the second is less than half of the last digit of the first in float32
LARGE, SMALL = 2.0**12, 2.0**-13
EXACT = math.fsum([LARGE**2, *[SMALL**2] * SAMPLES])


def scalar_layer():
    """One number in, one out: what a sample's loss is multiplied by is each of its gradients."""
    layer = FusedMoELoRA(torch.nn.Linear(1, 1), [1], lora_alpha=1)
    with torch.no_grad():
        layer.lora_A.fill_(1)
        layer.lora_B.fill_(1)
    return torch.nn.Sequential(layer)


def collect(steps, **options):
    """Score batches of so many samples whose gradients are one number each."""
    model = scalar_layer()
    options = {"loss_reduction": "sum", "frozen": ("0",), **options}
    with FisherCollector(model, **options) as collector:
        for count, gradient in steps:
            (model(torch.ones(count, 1, 1)) * gradient).sum().backward()
            collector.step()
    return collector.record()


def of_record(record, how="sum"):
    return record.read(how=how, normalize="none", parameters=("lora_A", "lora_B", "weight"))


def test_a_million_samples_after_a_large_one():
    first, rest = (1, LARGE), [(A_STEP, SMALL)] * (SAMPLES // A_STEP)
    record = collect([first, *rest])
    assert record.counts["samples"] == SAMPLES + 1
    # every partial sum is a float64 number: nothing may be rounded, in no order
    assert of_record(record) == dict.fromkeys(("0.lora_A", "0.lora_B", "0.weight"), EXACT)
    _, gates = record.gate_gradients()
    assert math.fsum(gates.flatten().tolist()) == LARGE + SAMPLES * SMALL
    HELD["samples summed without a rounding"] += SAMPLES


def test_files_and_merges_round_nothing(tmp_path):
    large, small = collect([(1, LARGE)]), collect([(A_STEP, SMALL)])
    small.save(tmp_path / "small.safetensors")
    total = large
    for _ in range(SAMPLES // A_STEP):
        total = total.merge(FisherRecord.load(tmp_path / "small.safetensors"))
    assert of_record(total) == dict.fromkeys(("0.lora_A", "0.lora_B", "0.weight"), EXACT)


@pytest.mark.skipif(not SETS, reason="needs the C++ kernels")
@pytest.mark.parametrize("reduce", ["element", "rank", "matrix"])
@pytest.mark.parametrize("backend", SETS)
def test_one_call_is_within_its_roundings(backend, reduce):
    g = torch.full((SAMPLES + 1, 1), SMALL)
    g[0] = LARGE
    x, offsets = torch.ones(SAMPLES + 1, 1), torch.arange(SAMPLES + 2)
    with running(backend):
        out = FK.segment_grad_square(g, x, offsets, reduce=reduce)
    # a product, a square, and one addition a sample, each within half a digit of float32
    assert abs(out.fisher.double().item() - EXACT) <= EXACT * (len(g) + 2) * 2.0**-24
    assert torch.equal(out.norms, g.flatten().square())


def test_a_scalers_overflows_are_left_out_and_counted():
    """A scale is a power of two: what is kept is, bit for bit, what there is without a scaler."""
    scaled, plain = trained_layer(), trained_layer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
    scaler.scale(torch.zeros(()))  # it makes its scale when it is first asked
    overflowed = skipped = 0
    with (
        FisherCollector(scaled, loss_reduction="sum") as ours,
        FisherCollector(plain, loss_reduction="sum") as theirs,
    ):
        for x in torch.randn(60, 4, 6, 16).bfloat16():
            ours.loss_factor = scale = scaler.get_scale()
            optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (scaled, plain)]
            scaler.scale(loss_of(scaled, x)).backward()
            before = ours.record()
            ours.step()
            record = ours.record()
            scaler.step(optimizers[0])
            scaler.update()
            optimizers[0].zero_grad()
            if record.counts["skipped"] > skipped:
                skipped += 1
                assert all(torch.equal(record.sums[key], before.sums[key]) for key in record.sums)
                assert scaler.get_scale() < scale, "a sound step was left out"
                continue
            loss_of(plain, x).backward()
            theirs.step()
            if scaler.get_scale() < scale:  # the sum over samples overflowed, but no sample did
                overflowed += 1
            else:
                optimizers[1].step()
            optimizers[1].zero_grad()
    record, wanted = ours.record(), theirs.record()
    assert skipped >= 5
    assert record.counts == {**wanted.counts, "skipped": skipped}
    assert record.counts["samples"] == 4 * (60 - skipped) >= 100
    for key, value in wanted.sums.items():
        assert value.any()
        assert torch.equal(record.sums[key], value)
    assert torch.equal(record.gates, wanted.gates)
    assert all(map(torch.equal, scaled.parameters(), plain.parameters()))
    HELD["overflows of a loss scaler left out or right"] += skipped + overflowed


def trained_layer():
    torch.manual_seed(0)
    layer = FusedMoELoRA(torch.nn.Linear(16, 8).bfloat16(), [4, 4], 2)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def loss_of(layer, x):
    return layer(x).float().square().sum()
