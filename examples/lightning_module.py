"""Lightning: an ordinary module, whose checkpoints hold the adapter alone."""

from typing import Any

import lightning
import torch

import floe_kernels as fk
from floe_kernels.integrations.trainer import AuxLossScale
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import tiny_model


class Finetuning(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("llama")
        plan = fk.allocation.uniform(find_modules(self.model), experts=4, rank=4)
        fk.apply_plan(self.model, plan)
        self.aux = AuxLossScale(self.model, load_balance_coef=0.01)

    def training_step(self, ids: torch.Tensor) -> Any:
        self.aux.set(steps=self.trainer.accumulate_grad_batches)
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in self.state_dict().items() if n in names}


data = torch.utils.data.DataLoader(torch.randint(3, 64, (32, 16)), batch_size=4)
module = Finetuning()
trainer = lightning.Trainer(max_epochs=2, accumulate_grad_batches=2, logger=False)
trainer.fit(module.train(), data)
print({name: round(value, 3) for name, value in module.aux.figures().items()})
fk.save_adapter(module.model, "adapter")
