"""Training in bfloat16 stays as near to float32 as the reference does."""

import functools

import pytest
import torch
from backends import SETS
from lengths import HELD, LONG
from training_curves import losses

STEPS = 1000 if LONG else 60
SEEDS = range(10)
#: of all 2**10 ways to tell kernel from reference, the share that a verdict may rest on
RARE = 1e-3


@functools.cache
def of_reference(dtype):
    return torch.stack([losses(seed, STEPS, dtype, "reference") for seed in SEEDS])


def chance(worse):
    """How often at least so much comes out where a coin decides each seed's sign.

    Two roundings of one computation differ by chance: which of the two is the worse one for a seed
    is a toss, whatever their distribution. All tosses are tried.
    """
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * len(worse))
    sums = (signs * worse).sum(1)
    return (sums >= sums[0]).double().mean().item()


def test_chance():
    assert chance(torch.arange(1.0, 11.0)) == 2.0**-10
    assert chance(torch.tensor([1.0, -1.0]).repeat(5)) > 0.5


@pytest.mark.skipif(not SETS, reason="needs the C++ kernels")
@pytest.mark.parametrize("backend", SETS if LONG else SETS[-1:])
def test_bfloat16_stays_within_the_references_own_spread(backend):
    truth = of_reference(torch.float32)
    peer = of_reference(torch.bfloat16) - truth
    ours = torch.stack([losses(s, STEPS, torch.bfloat16, backend) for s in SEEDS]) - truth
    assert truth[:, -5:].mean() < 0.8 * truth[:, :5].mean(), "nothing is learnt"
    assert not torch.equal(ours, peer), "the kernel was not run"
    spread = {
        "distance of the curves": [d.square().mean(1).sqrt() for d in (ours, peer)],
        "loss of the second half": [d[:, STEPS // 2 :].mean(1) for d in (ours, peer)],
    }
    for name, (own, others) in spread.items():
        p = chance(own - others)
        assert p > RARE, f"{name}: {own.mean():.2e}, the reference's {others.mean():.2e}, p {p:.4f}"
    HELD["training steps in bfloat16 within the reference's own spread"] += STEPS * len(SEEDS)
