"""transformers' Trainer, with auxiliary losses under gradient accumulation, stopped and resumed."""

import torch
from transformers import Trainer, TrainingArguments

import floe_kernels as fk
from floe_kernels.integrations.trainer import MoELoRACallback
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model

data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (32, 16))]


def make() -> Trainer:
    model = tiny_model("llama")
    plan = fk.allocation.uniform(find_modules(model), experts=4, rank=4)
    arguments = TrainingArguments(
        "checkpoints",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        save_steps=4,
        logging_steps=4,
        learning_rate=1e-2,
        report_to=[],
    )
    trainer = Trainer(fk.apply_plan(model, plan), arguments, train_dataset=data)
    MoELoRACallback(load_balance_coef=0.01, z_loss_coef=0.001).add_to(trainer)
    return trainer


make().train()
trainer = make()
trainer.train(resume_from_checkpoint="checkpoints/checkpoint-4")
print(trainer.state.log_history[-2])
fk.save_adapter(trainer.model, "adapter")
