"""What frameworks do to a model: autocast, checkpointing, export, quantised bases, trainers."""

import warnings

import pytest
import torch
from adapting import adapted, recompute, tokens, uneven_plan
from torch import nn

from floe_kernels import FisherCollector, FusedMoELoRA
from floe_kernels.integrations.transformers import (
    adapted_modules,
    apply_plan,
    load_adapter,
    save_adapter,
)
from floe_kernels.testing.models import tiny_model

transformers = pytest.importorskip("transformers")
# PEFT 0.21 and TRL 1.16 read what transformers 5.23 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]


def gradients(model, **batch):
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


def by_peft(**options):
    peft = pytest.importorskip("peft")
    from floe_kernels.integrations.peft import FusedMoELoRAConfig

    config = FusedMoELoRAConfig(**{"num_experts": 3, "r": 2, "task_type": "CAUSAL_LM", **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_peft_recomputes_as_it_computed(reentrant):
    batch = {"input_ids": tokens(), "labels": tokens()}
    model = by_peft(lora_dropout=0.5, load_balance_coef=0.1).train()
    stored = gradients(model, **batch)
    model.enable_input_require_grads()
    recompute(model.base_model.model, reentrant=reentrant)
    recomputed = gradients(model, **batch, use_cache=False)
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)


def test_peft_trainings_resume_exactly_too(tmp_path):
    from test_trainer import states_equal, trainer

    options = {"save_strategy": "steps", "save_steps": 1}
    whole, resumed = (by_peft(lora_dropout=0.3) for _ in range(2))
    trainer(tmp_path, whole, **options).train()
    run = trainer(tmp_path, resumed, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert states_equal(resumed, whole)
    assert not (tmp_path / "checkpoint-2/model.safetensors").exists()
    assert "aux_loss" in run.state.log_history[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_layer_in_that_dtype(dtype):
    layer = FusedMoELoRA(nn.Linear(16, 8), ranks=[4, 2], top_k=1)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, 16)
    with torch.autocast("cpu", dtype):
        out = layer(x)
        plain = layer.base_layer(x)
    assert out.dtype == plain.dtype == dtype
    by_hand = FusedMoELoRA(nn.Linear(16, 8), ranks=[4, 2], top_k=1)
    by_hand.load_state_dict(layer.state_dict())
    by_hand.base_layer.to(dtype)
    assert torch.equal(out, by_hand(x.to(dtype)))
    out.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in (layer.lora_A, layer.lora_B))


def by_plan_like(model):
    """The same experts as a PEFT model's, put there by a plan."""
    from floe_kernels.allocation.plan import Placement, Plan
    from floe_kernels.integrations.peft import peft_layers
    from floe_kernels.integrations.transformers import find_modules

    plain = tiny_model("llama")
    modules = find_modules(plain)
    layers = peft_layers(model, "default")
    placements = {n: Placement(layers[n].experts("default").ranks) for n in modules}
    apply_plan(plain, Plan(placements, "same", modules=modules))
    with torch.no_grad():
        for name, layer in adapted_modules(plain).items():
            ours = layers[name].experts("default")
            layer.lora_A.copy_(ours.lora_A)
            layer.lora_B.copy_(ours.lora_B)
            layer.router.weight.copy_(ours.router.weight)
    return plain


def test_a_model_trains_under_autocast():
    model = by_peft().train()
    plain = by_plan_like(model).train()
    batch = {"input_ids": tokens(), "labels": tokens()}
    exact = list(gradients(plain, **batch).values())
    with torch.autocast("cpu", torch.bfloat16):
        one, two = (gradients(m, **batch) for m in (model, plain))
    assert {gradient.dtype for gradient in two.values()} == {torch.float32}
    assert len(one) == len(two)

    def ordered(found):
        return {
            name.removeprefix("base_model.model.")
            .replace(".floe_experts.default", "")
            .replace(".floe_router.default", ".router"): gradient
            for name, gradient in found.items()
        }

    one, two = ordered(one), ordered(two)
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert any(not torch.equal(a, b) for a, b in zip(exact, two.values(), strict=True))


@pytest.mark.parametrize("shared_A", [False, True], ids=["", "shared_A"])
def test_an_adapted_layer_exports(shared_A):
    ranks = [3, 3] if shared_A else [4, 2]
    layer = FusedMoELoRA(nn.Linear(16, 8), ranks=ranks, shared_A=shared_A).eval()
    nn.init.normal_(layer.lora_B)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, 5, 16),), dynamic_shapes={"x": {0: batch}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert [t for t in targets if t.startswith("floe.moe_lora")], "traced through the operator"
    x = torch.randn(7, 5, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.fixture(scope="module")
def quantised():
    """Linear -> the same linear in 4 or 8 bits, by bitsandbytes on this CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")

    def four(linear):
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=torch.float32, quant_type="nf4",
        )  # fmt: skip
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    def eight(linear):
        new = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    return {4: four, 8: eight}


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(quantised, bits):
    base = quantised[bits](nn.Linear(64, 32))
    layer = FusedMoELoRA(base, ranks=[4, 2], top_k=2)
    x = torch.randn(2, 5, 64, requires_grad=True)
    assert torch.equal(layer(x), base(x))
    assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.router.weight)} == {torch.float32}
    nn.init.normal_(layer.lora_B)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    reference = FusedMoELoRA(nn.Linear(64, 32), ranks=[4, 2], top_k=2)
    with torch.no_grad():
        reference.base_layer.weight.zero_()
        reference.base_layer.bias.zero_()
        for part in ("lora_A", "lora_B"):
            getattr(reference, part).copy_(getattr(layer, part))
        reference.router.weight.copy_(layer.router.weight)
    torch.testing.assert_close(layer(x) - base(x), reference(x), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_plan_on_a_quantised_model(quantised, bits, tmp_path):
    def make():
        model = tiny_model("llama", hidden_size=64, head_dim=16)
        for block in model.model.layers:
            for name in ("q_proj", "v_proj"):
                setattr(block.self_attn, name, quantised[bits](getattr(block.self_attn, name)))
        return model

    model = make()
    plan = uneven_plan(model)
    apply_plan(model, plan)
    found = gradients(model.train(), input_ids=tokens(), labels=tokens())
    assert all(g.isfinite().all() for g in found.values())
    save_adapter(model, tmp_path)
    again = load_adapter(make(), tmp_path)
    for (name, ours), theirs in zip(
        adapted_modules(model).items(), adapted_modules(again).values(), strict=True
    ):
        assert torch.equal(ours.lora_A, theirs.lora_A), name
        assert torch.equal(ours.router.weight, theirs.router.weight), name


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_merging_into_a_quantised_base_is_refused(quantised):
    pytest.importorskip("peft")
    from floe_kernels.integrations.peft_layer import FusedMoELoRALayer

    layer = FusedMoELoRALayer(quantised[4](nn.Linear(64, 32)))
    layer.update_layer("a", {"ranks": [2], "top_k": 1})
    with pytest.raises(ValueError, match="plain frozen linear, got Linear4bit"):
        layer.merge()


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_an_eight_bit_optimizer(quantised):
    bnb = pytest.importorskip("bitsandbytes")
    model = adapted().train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimizer = bnb.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(p, before[n]) for n, p in model.named_parameters() if not p.requires_grad
    )


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="<pad>", eos_token="</s>"
    )


def test_trl_trains_the_peft_config(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("peft")
    from floe_kernels.integrations.peft import FusedMoELoRAConfig
    from floe_kernels.integrations.trainer import MoELoRACallback

    rows = [{"input_ids": tokens(1, 5 + i % 3, seed=i)[0].tolist()} for i in range(8)]
    run = trl.SFTTrainer(
        tiny_model("llama"),
        trl.SFTConfig(
            str(tmp_path), max_steps=2, bf16=False, use_cpu=True, logging_steps=1, report_to=[],
            per_device_train_batch_size=4, disable_tqdm=True, learning_rate=1e-2,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=FusedMoELoRAConfig(num_experts=2, r=2, task_type="CAUSAL_LM"),
        callbacks=[MoELoRACallback(load_balance_coef=0.1)],
    )  # fmt: skip
    run.train()
    records = [r for r in run.state.log_history if "loss" in r]
    assert len(records) == 2
    assert all(r["aux_loss"] > 0 for r in records)
    layers = [m for m in run.model.modules() if isinstance(m, FusedMoELoRA)]
    assert len(layers) == 21
    assert all(layer.lora_B.abs().sum() > 0 for layer in layers)
    # uneven rows were padded: their padding reached the layers through TRL and PEFT
    assert any(not layer.routing.token_mask.all() for layer in layers)


def test_fisher_scores_under_peft_are_those_under_a_plan():
    model = by_peft()
    scores = []
    for one in (model, by_plan_like(model)):
        with FisherCollector(one) as collector:
            one(input_ids=tokens(), labels=tokens()).loss.backward()
            collector.step()
        scores.append(list(collector.read(how="mean", aggregate="module").values()))
    assert len(scores[0]) == 21
    torch.testing.assert_close(*map(torch.tensor, scores))
