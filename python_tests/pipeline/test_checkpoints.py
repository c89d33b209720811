"""Checkpoints: everything comes back, and a bad one is never taken for a good one."""

import errno

import pytest
import torch
from torch import nn

from floe_kernels.pipeline import checkpoints
from floe_kernels.pipeline.checkpoints import load_checkpoint, save_checkpoint


def trained(steps):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        hidden = model[0](torch.randn(5, 3)).double()
        model[1](hidden).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), optimizer


@pytest.mark.parametrize("steps", [0, 3])
def test_everything_comes_back(tmp_path, steps):
    parameters, optimizer = trained(steps)
    save_checkpoint(tmp_path / "c", parameters, optimizer, {"step": steps, "rate": 0.1})
    expected = torch.randn(4)
    fresh, empty = trained(0)
    with torch.no_grad():
        for parameter in fresh.values():
            parameter.zero_()
    facts = load_checkpoint(tmp_path / "c", fresh, empty, {"rate": 0.1})
    assert facts == {"step": steps, "rate": 0.1}
    assert torch.equal(torch.randn(4), expected)
    for name, parameter in parameters.items():
        assert torch.equal(fresh[name], parameter)
        state, again = optimizer.state[parameter], empty.state[fresh[name]]
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)
        assert all(state[key].dtype == again[key].dtype for key in state)


def test_a_truncated_file_is_called_damaged(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, *trained(1), {})
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"c is a damaged checkpoint .* delete it to train"):
            load_checkpoint(path, *trained(0), {})


def test_other_facts_names_or_shapes_are_refused(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, *trained(1), {"seed": 1})
    parameters, optimizer = trained(0)
    with pytest.raises(ValueError, match=r"must be a checkpoint with seed 2, got 1"):
        load_checkpoint(path, parameters, optimizer, {"seed": 2})
    fewer = {name: p for name, p in parameters.items() if name != "1.bias"}
    with pytest.raises(ValueError, match=r"'1\.bias' differs"):
        load_checkpoint(path, fewer, optimizer, {})
    other = {**parameters, "1.bias": nn.Parameter(torch.zeros(7))}
    with pytest.raises(ValueError, match=r"must hold '1.bias' as \(7,\), got \(2,\)"):
        load_checkpoint(path, other, optimizer, {})


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    path = tmp_path / "c"
    save_checkpoint(path, *trained(1), {"step": 1})
    before = path.read_bytes()

    def full(_tensors, partial, **_):
        with open(partial, "wb") as file:
            file.write(b"half")
        raise SafetensorError('I/O error: Os { code: 28, kind: StorageFull, message: "No space" }')

    monkeypatch.setattr(checkpoints, "_safetensors", lambda: (full, SafetensorError))
    with pytest.raises(OSError, match="no space left on the disk") as caught:
        save_checkpoint(path, *trained(2), {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_real_library_reports_a_file_that_cannot_grow(tmp_path):
    import resource

    path = tmp_path / "c"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="cannot write a checkpoint"):
            save_checkpoint(path, *trained(1), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
