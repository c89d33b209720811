"""scores.sensitivity against per-sample gradients of the whole matrices, in float64."""

import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation import lora_smoe, stability
from floe_kernels.scores import sample_sensitivity, sensitivity

WIDTH = 8
NAMES = [f"layers.{i}.{part}" for i in range(4) for part in ("up", "down")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return types.SimpleNamespace(loss=loss)


@pytest.fixture
def model():
    torch.manual_seed(5)
    return Model().double().requires_grad_(False)


def batches(count=3, seed=0, size=2):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(16, (size, 7), generator=draw)
        labels = ids.clone()
        labels[0, :3] = -100  # samples differ in their tokens
        found.append({"input_ids": ids, "labels": labels})
    return found


def truth(model, data):
    """One row a sample: squared norms of d(summed loss) / dW, by autograd on whole matrices."""
    rows = []
    for batch in data:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            weights = [model.get_submodule(n).weight.requires_grad_() for n in NAMES]
            tokens = (labels[1:] != -100).sum()
            loss = model(ids[None], labels[None]).loss * tokens
            grads = torch.autograd.grad(loss, weights)
            rows.append({n: g.square().sum().item() for n, g in zip(NAMES, grads, strict=True)})
            model.requires_grad_(False)
    return rows


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_is_the_mean_of_squared_whole_gradients(model, how):
    rows = truth(model, batches())
    size = WIDTH * 2 * WIDTH if how == "mean" else 1
    got = sensitivity(model, batches(), how=how)
    assert list(got) == NAMES
    for name in NAMES:
        want = sum(row[name] for row in rows) / len(rows) / size
        assert got[name] == pytest.approx(want, rel=1e-10)


def test_rows_are_the_samples(model):
    rows = sample_sensitivity(model, batches())
    for got, want in zip(rows, truth(model, batches()), strict=True):
        assert got == pytest.approx(want, rel=1e-10)
    whole = sensitivity(model, batches())
    assert {n: sum(r[n] for r in rows) / len(rows) for n in NAMES} == pytest.approx(whole)
    report = stability(rows, keep=0.5, draws=20)
    assert (report.samples, report.units, report.kept) == (6, 8, 4)
    assert -1 <= report.kendall_tau.low <= report.kendall_tau.high <= 1


@pytest.mark.parametrize("layers", [1, 3, 4, 9])
def test_windows_change_nothing(model, layers):
    seen = []
    whole = sensitivity(model, batches())
    got = sensitivity(model, iter(batches()), layers_at_once=layers, progress=seen.append)
    assert list(got) == NAMES
    assert got == pytest.approx(whole, rel=1e-12)
    assert seen == list(range(1, 3 * -(-4 // layers) + 1))


def test_no_gradient_of_a_matrix_is_ever_made(model):
    # what "memory of LoRA" means: nothing of a weight's size, however many samples
    torch.manual_seed(0)
    wide = Model().requires_grad_(False)
    for layer in wide.layers:
        layer.up, layer.down = nn.Linear(WIDTH, 512, bias=False), nn.Linear(512, WIDTH, bias=False)
    wide.requires_grad_(False)
    largest = Largest(wide)
    with largest:
        sensitivity(wide, batches(size=1))
    assert 7 * 512 <= largest.numbers < WIDTH * 512


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that was made, views of the weights left out."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            made = isinstance(tensor, torch.Tensor)
            if made and tensor.untyped_storage().data_ptr() not in self.weights:
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_several_tasks_vote(model):
    tasks = {f"task {seed}": sensitivity(model, batches(seed=seed)) for seed in (1, 2, 3)}
    modules = {n: ModuleSpec(*reversed(model.get_submodule(n).weight.shape), n[:8]) for n in NAMES}
    plan = lora_smoe(tasks, modules, p=60)
    kept = 8 - 1 - int(0.4 * 7)
    assert sum(p.experts for p in plan.placements.values()) == 3 * kept


def test_says_what_is_wrong(model):
    with pytest.raises(ValueError, match="layers_at_once must be at least 1, got 0"):
        sensitivity(model, batches(), layers_at_once=0)
    with pytest.raises(ValueError, match="linears inside numbered blocks, got none"):
        sensitivity(model.head, batches())
    with pytest.raises(ValueError, match="at least one sample, got none"):
        sample_sensitivity(model, [])
    model.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite loss gradient, got 1 batches, 1 of them not"):
        sample_sensitivity(model, batches())
