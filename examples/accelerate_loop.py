"""accelerate, with gradient accumulation: the auxiliary losses follow the loss's scale."""

import torch
from accelerate import Accelerator

import floe_kernels as fk
from floe_kernels.integrations.trainer import AuxLossScale
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model

accelerator = Accelerator(gradient_accumulation_steps=2)
model = tiny_model("qwen3")
fk.apply_plan(model, fk.allocation.uniform(find_modules(model), experts=4, rank=4))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
data = torch.utils.data.DataLoader(torch.randint(3, 64, (32, 16)), batch_size=4, shuffle=True)
model, optimizer, data = accelerator.prepare(model.train(), optimizer, data)

aux = AuxLossScale(accelerator.unwrap_model(model), load_balance_coef=0.01)
for ids in data:
    with accelerator.accumulate(model):
        aux.set(steps=accelerator.gradient_accumulation_steps, scaler=accelerator.scaler)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.print(f"loss {loss.item():.3f}", aux.figures(reduce=True))
if accelerator.is_main_process:
    fk.save_adapter(accelerator.unwrap_model(model), "adapter")
