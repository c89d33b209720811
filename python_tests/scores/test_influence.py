"""scores.influence against dense float64 algebra, and per-sample gradients taken apart."""

import types

import pytest
import torch
from torch import nn

from floe_kernels import FusedMoELoRA
from floe_kernels.scores import influence
from floe_kernels.scores.influence import DAMPING, datainf

WIDTH = 6


class Model(nn.Module):
    def __init__(self, adapted=True):
        super().__init__()
        linears = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(
            FusedMoELoRA(linear, [2, 2]) if adapted else linear for linear in linears
        )
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, inputs_embeds, labels, note=None):
        x = inputs_embeds
        for layer in self.layers:
            x = torch.tanh(layer(x))
        error = self.head(x).squeeze(-1) - labels
        return types.SimpleNamespace(loss=error.square().mean())


def data(count, seed, size=2):
    draw = torch.Generator().manual_seed(seed)

    def one():
        x = torch.randn(size, 5, WIDTH, generator=draw, dtype=torch.float64)
        labels = torch.randn(size, 5, generator=draw, dtype=torch.float64)
        return {"inputs_embeds": x, "labels": labels, "note": "kept"}

    return [one() for _ in range(count)]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Model().double()


def gradients(model, batches, keys):
    """Per-sample gradients of each layer, by backward() on one sample at a time."""
    rows = {i: [] for i in range(3)}
    for batch in batches:
        for x, y in zip(batch["inputs_embeds"], batch["labels"], strict=True):
            model.zero_grad()
            model(x[None], y[None]).loss.backward()
            for i, layer in enumerate(model.layers):
                found = [p.grad.flatten() for n, p in layer.named_parameters() if n in keys]
                rows[i].append(torch.cat(found))
    model.zero_grad()
    return {i: torch.stack(row) for i, row in rows.items()}


def dense(g, v, c):
    """b_k = v^T mean_i (g_i g_i^T + lambda I)^-1 g_k, every inverse a dense one."""
    n, d = g.shape
    damp = c * g.square().sum() / (n * d)
    eye = torch.eye(d, dtype=g.dtype)
    inverse = torch.stack([torch.linalg.inv(torch.outer(row, row) + damp * eye) for row in g])
    return g @ (inverse.mean(0) @ v)


@pytest.mark.parametrize("damping", [0.01, 0.1, 3.0])
def test_the_closed_form_is_the_mean_of_dense_inverses(damping):
    g, v = torch.randn(7, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    want = dense(g, v, damping)
    torch.testing.assert_close(datainf(g, v, damping=damping), want, rtol=1e-10, atol=0)


def test_of_one_sample_it_is_the_exact_inverse():
    g, v = torch.randn(1, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    damp = DAMPING * g.square().mean()
    exact = torch.linalg.solve(g.T @ g + damp * torch.eye(9, dtype=g.dtype), v)
    torch.testing.assert_close(datainf(g, v), g @ exact, rtol=1e-10, atol=0)


def test_a_factor_on_the_training_gradients_divides_the_influence():
    g, v = torch.randn(5, 4), torch.randn(4)
    torch.testing.assert_close(datainf(8 * g, v), datainf(g, v) / 8)
    assert datainf(torch.zeros(3, 4), v).tolist() == [0, 0, 0]


@pytest.mark.parametrize("part", ["positive", "all"])
@pytest.mark.parametrize("keys", [("lora_B",), ("lora_A", "lora_B", "router.weight")])
def test_agrees_with_dense_algebra_on_a_model(model, part, keys):
    for layer in model.layers:  # so that lora_A has a gradient too
        nn.init.normal_(layer.lora_B, std=0.5)
    train, validation = data(3, seed=1), data(2, seed=2)
    g, v = gradients(model, train, keys), gradients(model, validation, keys)
    got = influence(
        model, train, validation, part=part, parameters=[key.split(".")[-1] for key in keys]
    )
    assert list(got) == ["layers.0", "layers.1", "layers.2"]
    for i in range(3):
        helps = dense(g[i], v[i].mean(0), DAMPING)
        assert len(helps) == 6
        want = helps.clamp(min=0).sum() if part == "positive" else helps.sum()
        assert got[f"layers.{i}"] == pytest.approx(want.item(), rel=1e-9)
    if part == "positive" and len(keys) > 1:
        assert got == influence(model, train, validation)  # all that trains, by default


def test_positive_means_that_a_step_on_the_sample_helps(model):
    # a sample validated on itself lowers its own loss
    (batch,) = data(1, seed=4, size=1)
    assert min(influence(model, [batch], [batch]).values()) > 0
    turned = {**batch, "labels": 2 * prediction(model, batch) - batch["labels"]}
    assert influence(model, [turned], [batch]) == dict.fromkeys(
        ["layers.0", "layers.1", "layers.2"], 0.0
    )
    assert max(influence(model, [turned], [batch], part="all").values()) < 0


def prediction(model, batch):
    x = batch["inputs_embeds"]
    for layer in model.layers:
        x = torch.tanh(layer(x))
    return model.head(x).squeeze(-1).detach()


def test_a_fresh_lora_B_sees_the_frozen_matrices_through_a_random_projection():
    # inner products of lora_B's gradients are those of W's, with A^T A for the identity
    torch.manual_seed(0)
    wide = nn.Linear(64, 8).double()
    layer = FusedMoELoRA(wide, [48], lora_alpha=48)
    x, g = torch.randn(2, 9, 64).double(), torch.randn(2, 9, 8).double()
    full, seen = [], []
    for i in range(2):
        (grad,) = torch.autograd.grad(layer(x[i]), layer.lora_B, g[i])
        full.append((g[i].T @ x[i]) @ layer.lora_A.T)
        seen.append(grad)
    torch.testing.assert_close(seen[0].T, full[0])
    torch.testing.assert_close((seen[0] * seen[1]).sum(), (full[0] * full[1]).sum())


def test_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []
    influence(model, data(2, seed=1), data(1, seed=2), progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_says_what_is_wrong(model):
    train = data(1, seed=1)
    with pytest.raises(ValueError, match="part must be one of positive, all, got 'best'"):
        influence(model, train, train, part="best")
    with pytest.raises(ValueError, match="needs at least one validation sample, got none"):
        influence(model, train, [])
    with pytest.raises(ValueError, match="needs at least one training sample, got none"):
        influence(model, [], train)
    with pytest.raises(ValueError, match=r"damping must be above 0, got 0\.0"):
        influence(model, train, train, damping=0.0)
    with pytest.raises(ValueError, match="trainable parameters inside numbered blocks, got none"):
        influence(Model(adapted=False).requires_grad_(False), train, train)
    with pytest.raises(ValueError, match="a batch must hold a tensor of samples, got"):
        influence(model, [{"note": "x"}], train)
    bad = data(2, seed=1)
    bad[1]["labels"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite gradient, training sample 2 has not"):
        influence(model, bad, train)
    with pytest.raises(ValueError, match=r"and the direction \(d,\), got \(2, 3\) and \(2,\)"):
        datainf(torch.ones(2, 3), torch.ones(2))
