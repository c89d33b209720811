"""TRL's SFTTrainer: the same callback, and a plan for the layers of the model."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import floe_kernels as fk
from floe_kernels.integrations.trainer import MoELoRACallback
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model

words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(vocabulary), pad_token="<pad>", eos_token="</s>"
)
samples = [{"input_ids": ids.tolist()} for ids in torch.randint(3, 64, (16, 12))]

model = tiny_model("llama")
fk.apply_plan(model, fk.allocation.uniform(find_modules(model), experts=4, rank=4))
trainer = SFTTrainer(
    model,
    SFTConfig("sft", max_steps=3, bf16=torch.cuda.is_available(), logging_steps=1, report_to=[]),
    train_dataset=Dataset.from_list(samples),
    processing_class=tokenizer,
    callbacks=[MoELoRACallback(load_balance_coef=0.01)],
)
trainer.train()
print([round(record["router_entropy"], 3) for record in trainer.state.log_history[:-1]])
fk.save_adapter(trainer.model, "adapter")
