"""FSDP2: `torchrun --nproc-per-node 2 fully_sharded.py`, NCCL on GPUs or gloo on CPUs."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import floe_kernels as fk
from floe_kernels.integrations.trainer import AuxLossScale
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)  # the same initial experts everywhere
model = tiny_model("llama")
plan = fk.allocation.uniform(find_modules(model), experts=4, rank=4)
model = fk.apply_plan(model, plan).to(device).train()  # before it is sharded
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)

aux = AuxLossScale(model, load_balance_coef=0.01)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
torch.manual_seed(dist.get_rank())  # other data everywhere
batches = [{"input_ids": i, "labels": i} for i in torch.randint(3, 64, (4, 4, 16), device=device)]
with fk.FisherCollector(model) as collector:  # scores the gradients that training computes
    for batch in batches:
        model(**batch).loss.backward()
        collector.step()
        optimizer.step()
        optimizer.zero_grad()

fk.save_adapter(model, "adapter")  # every process calls it: they gather, the first one writes
record, figures = collector.record(), aux.figures(reduce=True)  # and these, which add and average
if dist.get_rank() == 0:
    print(f"{record.counts['samples']} samples", figures)
dist.destroy_process_group()
