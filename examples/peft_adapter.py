"""PEFT: LoRA checkpoints become experts, train on, are switched, saved, loaded and exported."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from floe_kernels.integrations.peft import set_merge_gates  # importing it teaches PEFT the type
from floe_kernels.integrations.peft_lora import (
    config_from_lora,
    export_lora,
    load_lora_experts,
    mean_gates,
)
from floe_kernels.testing.models import tiny_model

for seed in range(2):  # two LoRAs that somebody trained
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama"), config).save_pretrained(f"lora{seed}")

folders = ["lora0", "lora1"]
model = get_peft_model(tiny_model("llama"), config_from_lora(folders, task_type="CAUSAL_LM"))
load_lora_experts(model, folders)
ids = torch.randint(3, 64, (4, 16))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.save_pretrained("mixture")
again = PeftModel.from_pretrained(tiny_model("llama"), "mixture")
with again.disable_adapter():
    print(again.generate(input_ids=ids[:1], max_new_tokens=4))
gates = mean_gates(again, [{"input_ids": ids}])
export_lora(again, "averaged", gates=gates)  # a plain LoRA, to be measured before it is used
set_merge_gates(again, gates)
print(type(again.merge_and_unload()).__name__)
