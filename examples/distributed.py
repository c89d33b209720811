"""DistributedDataParallel: `torchrun --nproc-per-node 2 distributed.py`, on GPUs or on CPUs."""

import torch
import torch.distributed as dist

import floe_kernels as fk
from floe_kernels.integrations.trainer import AuxLossScale
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)  # the same initial experts everywhere
model = tiny_model("llama")
plan = fk.allocation.uniform(find_modules(model), experts=4, rank=4)
model = fk.apply_plan(model, plan).to(device).train()
run = torch.nn.parallel.DistributedDataParallel(model)

aux = AuxLossScale(model, load_balance_coef=0.01)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
torch.manual_seed(dist.get_rank())  # other data everywhere
batches = [{"input_ids": i, "labels": i} for i in torch.randint(3, 64, (4, 4, 16), device=device)]
for batch in batches:
    run(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

figures = aux.figures(reduce=True)  # every process calls it
with fk.FisherCollector(model) as collector:
    run(**batches[0]).loss.backward()
    collector.step()
samples = collector.record().counts["samples"]  # summed over processes once, when read
if dist.get_rank() == 0:
    print(f"{samples} samples", figures)
    fk.save_adapter(model, "adapter")
dist.destroy_process_group()
