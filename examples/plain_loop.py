"""A plain PyTorch loop: measure, decide, apply, train, save.

The model is tiny and random so that this runs in seconds; any causal model of transformers will do.
"""

import torch

import floe_kernels as fk
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model

torch.manual_seed(0)
model = tiny_model("llama")
batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (8, 4, 16))]

modules = find_modules(model)
fk.apply_plan(model, fk.allocation.uniform(modules, experts=4, rank=4))
scores = fk.scores.fisher(model, batches[:4])
plan = fk.allocation.floe(scores, modules, keep=0.34, experts=4, rank=4)
model = fk.apply_plan(fk.remove_adapters(model), plan).train()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for epoch in range(3):
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
fk.save_adapter(model, "adapter")
