"""What a Fisher run measured survives a file, and adds up."""

import json

import pytest
import torch
from scored_model import adapted, batches, collect

from floe_kernels.scores import FisherRecord
from floe_kernels.scores.record import FORMAT

save_file = pytest.importorskip("safetensors.torch").save_file


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


@pytest.mark.parametrize("header", [{}, {"sizes": 3}, {"sizes": {}, "modules": None}])
def test_a_record_without_its_parts_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    metadata = {"fisher": json.dumps({"format": FORMAT, **header})}
    save_file({"gates": torch.zeros(0, 0)}, path, metadata)
    with pytest.raises(ValueError, match="must be a whole Fisher record"):
        FisherRecord.load(path)


def test_gate_gradients_are_optional():
    model, (first, second) = adapted(), batches()
    with_gates, without = (collect(model, [first], keep_gates=k) for k in (True, False))
    assert with_gates.has_gates
    assert not without.has_gates
    for name, total in with_gates.sums.items():
        assert torch.equal(without.sums[name], total)
    assert without.hits.keys() == with_gates.hits.keys()
    with pytest.raises(ValueError, match=r"keep_gates=True\), got 0 rows for 4 samples"):
        without.gate_gradients()
    both = with_gates.merge(collect(model, [second]))
    torch.testing.assert_close(both.gates, collect(model, [first, second]).gates)
    assert len(both.gate_gradients()[1]) == 6
    for one, other in ((without, with_gates), (with_gates, without)):
        merged = one.merge(other)
        assert merged.counts["samples"] == 8
        assert not merged.has_gates


def test_gate_gradients_cross_blocks(monkeypatch):
    from floe_kernels.scores import gate_rows

    model, data = adapted(), batches((4, 2, 5, 1))
    want = collect(model, data).gates
    monkeypatch.setattr(gate_rows, "ROWS_PER_BLOCK", 3)
    assert torch.equal(collect(model, data).gates, want)
