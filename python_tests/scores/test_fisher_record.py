"""What a Fisher run measured survives a file, and adds up."""

import pytest
import torch
from scored_model import adapted, batches, collect

from floe_kernels.scores import FisherRecord


def test_save_load_merge(tmp_path):
    model = adapted()
    first, second = (collect(model, [b]) for b in batches())
    first.save(tmp_path / "a.safetensors")
    merged = FisherRecord.load(tmp_path / "a.safetensors").merge(second)
    both = collect(model, batches())
    assert merged.counts == both.counts
    for name, total in both.sums.items():
        torch.testing.assert_close(merged.sums[name], total)
    assert merged.read(aggregate="layer", how="mean") == pytest.approx(
        both.read(aggregate="layer", how="mean")
    )
    other = collect(model, batches(), granularity="matrix")
    with pytest.raises(ValueError, match="granularity is 'rank' here and 'matrix' there"):
        merged.merge(other)
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="must be a Fisher record"):
        FisherRecord.load(tmp_path / "b.safetensors")
