"""Loops that are not Trainer's: accelerate and Lightning resume exactly, clip and accumulate."""

import pytest
import torch
from adapting import adapted, tokens
from test_trainer import states_equal

from floe_kernels.integrations.trainer import AuxLossScale

DATA = torch.cat([tokens(2, 7, seed=seed) for seed in range(8)])


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TestAccelerate:
    """Two batches an update; stopped after the second of four updates."""

    def run(self, folder, *, save_after=None, resume=False):
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        model = adapted(lora_dropout=0.3).train()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        # with its own generator: otherwise beginning to read draws a number that dropout would get
        own = torch.Generator()
        loader = torch.utils.data.DataLoader(DATA, batch_size=2, generator=own)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        aux = AuxLossScale(accelerator.unwrap_model(model), load_balance_coef=0.1)
        torch.manual_seed(5)
        done = 0
        if resume:
            accelerator.load_state(folder)
            done = save_after
        for ids in accelerator.skip_first_batches(loader, 2 * done):
            with accelerator.accumulate(model):
                aux.set(steps=accelerator.gradient_accumulation_steps, scaler=accelerator.scaler)
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trainable(model), 0.1)
                    done += 1
                optimizer.step()
                optimizer.zero_grad()
            if done == save_after and accelerator.sync_gradients and not resume:
                accelerator.save_state(folder)
        return accelerator.unwrap_model(model)

    def test_resumes_exactly(self, tmp_path):
        whole = self.run(tmp_path, save_after=2)
        assert states_equal(self.run(tmp_path, save_after=2, resume=True), whole)
        assert not states_equal(whole, adapted())


class TestLightning:
    """Two batches an update; stopped after the first of two epochs, as Lightning resumes data."""

    def module(self):
        lightning = pytest.importorskip("lightning")

        class Finetuning(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = adapted()
                self.aux = AuxLossScale(self.model, load_balance_coef=0.1)

            def training_step(self, ids):
                self.aux.set(steps=self.trainer.accumulate_grad_batches)
                return self.model(input_ids=ids, labels=ids).loss

            def configure_optimizers(self):
                return torch.optim.AdamW(trainable(self), lr=1e-2)

        return Finetuning().train()

    def fit(self, folder, epochs, checkpoint=None):
        import lightning

        module = self.module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=0.1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(DATA, batch_size=2)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / f"{epochs}.ckpt")
        return module.model

    @pytest.mark.filterwarnings("ignore")
    def test_resumes_exactly(self, tmp_path):
        whole = self.fit(tmp_path, 2)
        self.fit(tmp_path, 1)
        resumed = self.fit(tmp_path, 2, tmp_path / "1.ckpt")
        assert states_equal(resumed, whole)
        assert not states_equal(whole, adapted())


def test_clipping_counts_the_aux_losses_too():
    model = adapted(overrides={"num_hidden_layers": 1}).train()
    aux = AuxLossScale(model, load_balance_coef=100.0)
    ids = tokens()

    def norm():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return torch.nn.utils.clip_grad_norm_(trainable(model), 0.5)

    large = norm()
    clipped = torch.stack([p.grad.square().sum() for p in trainable(model)]).sum().sqrt()
    torch.testing.assert_close(clipped, torch.tensor(0.5))
    for layer in aux.layers.values():
        layer.set_aux_loss(0)
    assert norm() < large
