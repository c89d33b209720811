"""Trainer's loop: auxiliary losses in step with the loss, figures logged, exact resuming."""

import logging
import math

import pytest
import torch
from adapting import adapted, tokens, uneven_plan

from floe_kernels.integrations.transformers import adapted_modules, apply_plan, load_adapter
from floe_kernels.testing.models import tiny_model

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
trainer_module = pytest.importorskip("floe_kernels.integrations.trainer")
AuxLossScale, MoELoRACallback = trainer_module.AuxLossScale, trainer_module.MoELoRACallback

COEFS = (0.1, 0.01)


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 14

    def __getitem__(self, index):
        ids = tokens(1, 7, seed=index)[0]
        mask = torch.ones_like(ids)
        mask[: index % 3] = 0
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def trainer(folder, model, callback=None, **options):
    """7 batches an epoch, in updates of 3, 3 and 1."""
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "seed": 3,
            **options,
        },
    )
    callback = callback or MoELoRACallback(*COEFS)
    return transformers.Trainer(
        model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=[callback]
    )


def states_equal(one, other):
    return all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("step", [2, 3], ids=["mid-epoch", "end of epoch"])
def test_resuming_equals_an_undisturbed_run(tmp_path, architecture, step, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = adapted(architecture, lora_dropout=0.3)
    trainer(tmp_path, whole, **options).train()
    resumed = adapted(architecture, lora_dropout=0.3)
    start = adapted(architecture, lora_dropout=0.3)
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, resumed, **options)
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert run.state.global_step == 6
    assert states_equal(resumed, whole)
    assert not states_equal(resumed, start), "nothing was trained"
    assert "missing keys" not in caplog.text


def test_another_dropout_seed_would_be_noticed(tmp_path):
    one, other = (adapted(lora_dropout=0.3) for _ in range(2))
    trainer(tmp_path, one, max_steps=1).train()
    trainer(tmp_path, other, max_steps=1, seed=4, data_seed=3).train()
    assert not states_equal(one, other)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path):
    model = adapted()
    run = trainer(tmp_path, model, save_strategy="steps", save_steps=6)
    run.train()
    folder = tmp_path / "checkpoint-6"
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    assert saved
    assert all(name.endswith(trainer_module._ADAPTER) for name in saved)
    fresh = load_adapter(tiny_model("llama"), folder)
    assert states_equal(fresh, model)
    run.save_model(str(tmp_path / "final"))  # after training, Trainer saves all again
    assert set(load_file(tmp_path / "final/model.safetensors")) >= {"model.norm.weight"}


def test_the_base_stays_in_if_wanted(tmp_path):
    callback = MoELoRACallback(leave_base_out=False)
    trainer(tmp_path, adapted(), callback, save_strategy="steps", save_steps=3, max_steps=3).train()
    from safetensors.torch import load_file

    assert "model.norm.weight" in load_file(tmp_path / "checkpoint-3/model.safetensors")


def test_aux_losses_follow_gradient_accumulation(tmp_path):
    model = adapted()
    layer = next(iter(adapted_modules(model).values()))
    seen = []
    layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.aux_coefs.tolist()))
    trainer(tmp_path, model, num_train_epochs=2).train()
    expected = [torch.tensor(COEFS) / steps for steps in [3] * 6 + [1]] * 2
    torch.testing.assert_close(torch.tensor(seen), torch.stack(expected))
    torch.testing.assert_close(layer.aux_coefs, torch.tensor(COEFS))


def test_a_training_that_broke_off_scales_nothing_twice(tmp_path):
    model = adapted()
    layer = next(iter(adapted_modules(model).values()))
    layer.aux_coefs.copy_(torch.tensor(COEFS))
    callback = MoELoRACallback()
    run = trainer(tmp_path, model, callback)
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    handle.remove()
    run.train()
    torch.testing.assert_close(layer.aux_coefs, torch.tensor(COEFS))


def test_the_aux_gradient_is_that_of_the_mean_over_micro_batches():
    def gradients(coefs, steps, batches):
        model = adapted().double()
        scale = AuxLossScale(model, load_balance_coef=coefs[0], z_loss_coef=coefs[1])
        scale.set(steps=steps)
        for ids in batches:
            (model(ids, labels=ids).loss / steps).backward()
        return [layer.router.weight.grad for layer in adapted_modules(model).values()]

    batches = [tokens(2, 5, seed=seed) for seed in range(2)]
    together = gradients(COEFS, 2, batches)
    apart = [gradients(COEFS, 1, [ids]) for ids in batches]
    for got, one, two in zip(together, *apart, strict=True):
        torch.testing.assert_close(got, (one + two) / 2)
    without = gradients((0.0, 0.0), 2, batches)
    assert any(not torch.allclose(a, b) for a, b in zip(together, without, strict=True))


def test_grad_scaler_scales_the_aux_losses_too():
    ids = tokens(2, 5)

    def gradients(scaler):
        model = adapted()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        scale = AuxLossScale(model, load_balance_coef=0.1, z_loss_coef=0.01)
        for _ in range(2):
            scale.set(steps=2, scaler=scaler)
            scaler.scale(model(ids, labels=ids).loss / 2).backward()
        scaler.unscale_(optimizer)
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(torch.amp.GradScaler("cpu", enabled=False))
    scaled = gradients(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    # powers of two scale exactly, so long as nothing under- or overflows
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_the_callback_finds_the_grad_scaler_of_accelerate(tmp_path):
    model = adapted()
    callback = MoELoRACallback(*COEFS)
    run = trainer(tmp_path, model, callback)
    callback.on_train_begin(run.args, run.state, run.control, model=model)

    class Optimizer:  # accelerate's, as far as it matters; its fp16 refuses a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    event = {"optimizer": Optimizer(), "train_dataloader": run.get_train_dataloader()}
    callback.on_step_begin(run.args, run.state, run.control, **event)
    layer = next(iter(adapted_modules(model).values()))
    torch.testing.assert_close(layer.aux_coefs, torch.tensor(COEFS) * 1024 / 3)


def test_figures_reach_the_records(tmp_path):
    model = adapted()
    run = trainer(tmp_path, model, MoELoRACallback(*COEFS, per_layer=True), eval_strategy="epoch")
    run.train()
    records = [r for r in run.state.log_history if "loss" in r]
    assert len(records) == 6
    name, layer = next(iter(adapted_modules(model).items()))
    for record in records:
        assert record["aux_loss"] > 0
        assert 0 < record["router_entropy"] < 1
        assert 1 <= record["expert_load_max"] <= 4
        load = [record[f"expert_load/{name}/{e}"] for e in range(len(layer.ranks))]
        assert math.isclose(sum(load), 1, rel_tol=1e-6)
    evaluations = [r for r in run.state.log_history if "eval_loss" in r]
    assert len(evaluations) == 2
    assert not any("aux_loss" in r for r in evaluations)


def test_the_reported_aux_loss_is_not_scaled():
    model, ids = adapted(), tokens(2, 5)
    scale = AuxLossScale(model, load_balance_coef=0.1, z_loss_coef=0.01)
    scale.set(steps=4)
    model(ids, labels=ids)
    layers = [layer for layer in adapted_modules(model).values() if layer.ranks]
    expected = sum(float(layer.aux_loss()) for layer in layers) * 4
    assert math.isclose(scale.figures()["aux_loss"], expected, rel_tol=1e-5)


def test_padding_has_no_entropy():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    assert float(trainer_module._entropy(logits, torch.tensor([True, False]))) == pytest.approx(1)
    assert float(trainer_module._entropy(logits, torch.tensor([False, True]))) == pytest.approx(0)
    assert float(trainer_module._entropy(logits, torch.tensor([False, False]))) == 0


def test_ahead_of_the_loggers(tmp_path):
    seen = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    run = trainer(tmp_path, adapted(), max_steps=1)
    run.callback_handler.callbacks = [
        c for c in run.callback_handler.callbacks if not isinstance(c, MoELoRACallback)
    ]
    run.add_callback(Logger)
    MoELoRACallback(*COEFS).add_to(run)
    run.train()
    assert "router_entropy" in seen[0]


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must carry adapted layers"):
        trainer(tmp_path, tiny_model("llama")).train()


def test_the_callback_works_on_a_fresh_plan(tmp_path):
    model = tiny_model("llama")
    run = trainer(tmp_path, apply_plan(model, uneven_plan(model)), max_steps=2)
    run.train()
    assert all(math.isfinite(r["loss"]) for r in run.state.log_history if "loss" in r)


def test_accumulation_of_a_dataset_without_a_length():
    class Arguments:
        gradient_accumulation_steps = 3

    assert [trainer_module.accumulation(Arguments, s, range(7)) for s in range(4)] == [3, 3, 1, 3]
    assert trainer_module.accumulation(Arguments, 2, iter(())) == 3
    assert trainer_module.accumulation(Arguments, 0, range(2)) == 2
