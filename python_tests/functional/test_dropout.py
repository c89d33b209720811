"""Philox dropout: the published test vector, and the properties the backward relies on."""

import pytest
import torch

from floe_kernels.reference import dropout
from floe_kernels.reference.dropout import philox


def test_known_answers():
    # Random123's kat_vectors, philox4x32 with 10 rounds: word 0 for counter 0, key 0
    zero = torch.tensor(0)
    assert philox(zero, zero).item() == 0x6627E8D5
    # an all-ones 64-bit counter and key differ from every truncation of them
    ones = torch.tensor(-1)
    words = {philox(k, c).item() for k in (zero, ones) for c in (zero, ones)}
    assert len(words) == 4


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    y = dropout(torch.ones(200, 500), p, torch.tensor(7))
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / y.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))


def test_mask_is_a_function_of_seed_and_place():
    x = torch.randn(8, 16)
    first = dropout(x, 0.5, torch.tensor(3)) == 0
    assert torch.equal(first, dropout(torch.ones_like(x), 0.5, torch.tensor(3)) == 0)
    assert not torch.equal(first, dropout(x, 0.5, torch.tensor(4)) == 0)
    assert not torch.equal(first, dropout(x, 0.5, torch.tensor(3 + 2**32)) == 0)


def test_zero_probability_is_the_identity():
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, None) is x
