"""Two processes under torchrun take a training step as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from floe_kernels.pipeline import distributed

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

ROWS = [5, 0, 3, 6, 1]


def step(folder):
    """One step on the mean over five rows, of which a process takes its share."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 3).double(), nn.Linear(4, 3)])
    data = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    total = torch.zeros((), dtype=torch.float64)
    with distributed.processes() as number:
        chosen = distributed.share(ROWS)
        for row in chosen:
            loss = (model[0](data[row].double()).square().sum()) / len(ROWS)
            loss.backward()
            total += loss.detach()
        few = distributed.share(ROWS[:1])  # not enough for everybody
        for row in few:
            model[1](data[row]).sum().backward()
        distributed.add_gradients(model.parameters(), total)
        first = distributed.is_first()
        rank = dist.get_rank() if number > 1 else 0
        said = distributed.any_of(rank == 1, torch.device("cpu"))
    gradients = [p.grad for p in model.parameters()]
    result = {"number": number, "first": first, "rows": list(chosen), "said": said}
    torch.save({**result, "total": total, "gradients": gradients}, Path(folder, f"{rank}.pt"))


def test_two_processes_take_a_step_as_one(tmp_path):
    step(tmp_path)
    alone = torch.load(tmp_path / "0.pt")
    assert (alone["number"], alone["first"], alone["rows"]) == (1, True, ROWS)
    assert not alone["said"]
    folders = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(__file__, str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
        timeout=300,
    )
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [one["first"] for one in together] == [True, False]
    assert sorted(together[0]["rows"] + together[1]["rows"]) == sorted(ROWS)
    for one in together:
        assert one["number"] == 2
        assert one["said"]
        torch.testing.assert_close(one["total"], alone["total"])
        for got, want in zip(one["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(got, want)
            assert got.any()
    pairs = zip(together[0]["gradients"], together[1]["gradients"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    step(sys.argv[1])
