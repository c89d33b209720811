"""A small causal model of known size, and the slow way to score it."""

import types

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from floe_kernels import FisherCollector, FusedMoELoRA

VOCABULARY, WIDTH = 13, 8


class Block(nn.Module):
    """Two linears around a causal mean, so that a sample's tokens depend on each other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        past = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return x + self.down(torch.tanh(self.up(x).cumsum(1) / past))


class Model(nn.Module):
    """The smallest thing that takes transformers' arguments and returns a ``.loss``."""

    def __init__(self, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.reduction, self.checkpointing = "mean_tokens", None

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        for block in self.layers:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)
        loss = nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        if self.reduction == "mean_tokens":
            loss = loss / (labels[:, 1:] != -100).sum()
        elif self.reduction == "mean_samples":
            loss = loss / len(labels)
        return types.SimpleNamespace(loss=loss)


def adapted(*, warm=True, shared=False, **options):
    torch.manual_seed(0)
    model = Model().double().requires_grad_(False)
    for i, block in enumerate(model.layers):
        for name in ("up", "down"):
            ranks = [2, 2, 2] if shared else [1 + i, 2, 3]
            layer = FusedMoELoRA(block.get_submodule(name), ranks, shared_A=shared, **options)
            if warm:
                nn.init.normal_(layer.lora_B)
            setattr(block, name, layer)
    return model


def batches(sizes=(4, 2), length=6):
    gen = torch.Generator().manual_seed(1)
    out = []
    for size in sizes:
        ids = torch.randint(VOCABULARY, (size, length), generator=gen)
        labels = ids.clone()
        for i in range(size):
            labels[i, : i % length] = -100  # samples of unequal length
        out.append({"input_ids": ids, "labels": labels})
    return out


def parameters(model):
    names = {"lora_A": "lora_A", "lora_B": "lora_B", "router.weight": "router"}
    for name, p in model.named_parameters():
        for suffix, short in names.items():
            if name.endswith("." + suffix):
                yield name[: -len(suffix)] + short, p


def one_by_one(model, data, per_sample="sum"):
    """The oracle: batch size 1, summed loss, square, add."""
    reduction, model.reduction = model.reduction, "sum"
    total = {name: torch.zeros_like(p) for name, p in parameters(model)}
    gates = []
    for batch in data:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            loss = model(ids[None], labels[None]).loss
            if per_sample == "mean":
                loss = loss / (labels[1:] != -100).sum().clamp(min=1)
            pairs = dict(parameters(model))
            grads = torch.autograd.grad(loss, list(pairs.values()))
            for (name, p), grad in zip(pairs.items(), grads, strict=True):
                total[name] += grad.square()
                if name.endswith("lora_B"):
                    gates.append((p * grad).sum())
    model.reduction = reduction
    count = len({n.rpartition(".")[0] for n in total})
    return total, torch.stack(gates).detach().view(-1, count)


def collect(model, data, run=None, **options):
    with FisherCollector(model, **options) as collector:
        for batch in data:
            (model if run is None else run)(**batch).loss.backward()
            collector.step()
    return collector.record()
