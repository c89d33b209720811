"""Plans with uneven layers, and adapters that have left their initial values."""

import pytest
import torch

from floe_kernels.allocation.plan import Placement, Plan
from floe_kernels.integrations.transformers import adapted_modules, apply_plan, find_modules
from floe_kernels.testing.models import tiny_model

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

RANKS = ((2, 3), (4,), (), (0, 2, 1), (1, 1, 1, 1))  # of the modules, in turn


def uneven_plan(model, **options):
    """Every kind of placement, and some modules that have none."""
    modules = find_modules(model)
    placements = {
        name: Placement(RANKS[i % len(RANKS)]) for i, name in enumerate(modules) if i % 7 != 5
    }
    return Plan(placements, "test", modules=modules, **options)


def randomise(model, seed=0, scale=0.3):
    """Move the adapters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_modules(model).values():
            for weight in (layer.lora_A, layer.lora_B, layer.router.weight):
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def adapted(architecture="llama", *, overrides=None, **options):
    """A tiny model with an uneven plan and random adapters."""
    model = tiny_model(architecture, **(overrides or {}))
    return randomise(apply_plan(model, uneven_plan(model, **options)))


def tokens(rows=2, columns=7, seed=0):
    return torch.randint(3, 64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    """What a failed call must leave alone: the modules, the gradient flags, the hooks, the mode."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        (len(model._forward_pre_hooks), len(model._forward_hooks), sorted(vars(model))),
    )


def recompute(model, *, reentrant):
    """Switch activation checkpointing on, under the name that this transformers has for it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def store(model):
    """Switch it off."""
    name = "activation_checkpointing_disable"
    (getattr(model, name, None) or model.gradient_checkpointing_disable)()
