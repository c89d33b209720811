"""The counting sort and its lists of tiles."""

import pytest
import torch

from floe_kernels.triton import grouping

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what each case is for: (tokens, experts, kept, share of masked tokens)
CASES = {
    "one": (1, 1, 1, 0.0),
    "ragged": (70, 5, 2, 0.3),
    "most experts empty": (40, 33, 1, 0.0),
    "all kept": (35, 3, 3, 0.0),
    "all masked": (20, 4, 2, 1.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(grouping, "CHUNK", 32)


@pytest.fixture(params=[*CASES, "one hot"])
def drawn(request):
    n, e, k, masked = CASES.get(request.param, (90, 6, 2, 0.2))
    generator = torch.Generator().manual_seed(n)
    logits = torch.rand(n, e, generator=generator)
    if request.param == "one hot":  # every token's first pick
        logits[:, 4] += 1
    experts = logits.topk(k).indices
    mask = torch.rand(n, generator=generator) >= masked
    return experts.to(DEVICE), e, mask.to(DEVICE)


def expected(experts, num_experts, mask):
    """Sort by (expert, chunk, slot, token) the plain way."""
    n, k = experts.shape
    pairs = [
        (int(experts[t, j]), t // grouping.CHUNK, j, t)
        for t in range(n) for j in range(k) if mask[t]
    ]  # fmt: skip
    return sorted(pairs)


def test_order(drawn):
    experts, num_experts, mask = drawn
    k, want = experts.shape[1], expected(*drawn)
    pairs = grouping.sort_pairs(experts, num_experts, mask.view(torch.uint8))
    assert pairs.pair[: len(want)].tolist() == [t * k + j for _, _, j, t in want]
    assert int(pairs.start[-1]) == len(want)


@pytest.mark.parametrize("by", [grouping.BY_EXPERT, grouping.BY_CHUNK, grouping.BY_SLOT])
@pytest.mark.parametrize("rows", [4, 16])
def test_tiles_cover_every_pair_once(drawn, by, rows):
    experts, num_experts, mask = drawn
    want = expected(*drawn)
    pairs = grouping.sort_pairs(experts, num_experts, mask.view(torch.uint8))
    tiles = grouping.list_tiles(pairs, by, rows)
    seen, order, split = [0] * len(want), [], []
    for first, count, expert, place in tiles.tile.tolist():
        members = want[first : first + count]
        seen[first : first + count] = [s + 1 for s in seen[first : first + count]]
        assert all(member[0] == expert for member in members)
        if by == grouping.BY_SLOT:  # two pairs of a tile never share a token
            assert len({member[3] for member in members}) == len(members) <= rows
        if by != grouping.BY_EXPERT and members:
            order.append(members[0][1])
        split += [place] if place >= 0 and members else []
    assert seen == [1] * len(want)
    assert order == sorted(order), "tiles of a chunk follow one another"
    assert split == list(range(len(split))), "pieces of split groups are numbered without a gap"
    assert len(split) <= 2 * -(-len(want) // rows)
