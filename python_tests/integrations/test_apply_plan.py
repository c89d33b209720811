"""apply_plan changes what the plan says and nothing else; remove_adapters gives it all back."""

import copy

import pytest
import torch
from adapting import RANKS, adapted, randomise, snapshot, tokens, uneven_plan
from closeness import assert_no_worse
from torch import nn

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation.plan import Placement, Plan
from floe_kernels.integrations import apply
from floe_kernels.integrations.transformers import (
    adapted_modules,
    apply_plan,
    find_modules,
    fingerprint,
    remove_adapters,
)
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.testing.models import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrapping_changes_no_output(architecture):
    model, ids = tiny_model(architecture), tokens()
    truth = copy.deepcopy(model).double()(ids).logits
    before = model(ids).logits
    apply_plan(model, uneven_plan(model))
    assert len(adapted_modules(model)) > 6
    assert_no_worse(model(ids).logits, before, truth)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_step_changes_the_adapters_alone(architecture):
    model = tiny_model(architecture)
    apply_plan(model, uneven_plan(model)).train()
    own = {
        f"{name}.{part}"
        for name in adapted_modules(model)
        for part in ("lora_A", "lora_B", "router.weight")
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # the router of a single expert has no choice to learn, but decays
    assert changed == own


def test_the_plan_reaches_the_layers():
    model = tiny_model("llama")
    plan = uneven_plan(model, lora_alpha=8, lora_dropout=0.25, use_rslora=True)
    model.model.layers[1].train()
    apply_plan(model, plan)
    layers = adapted_modules(model)
    placed = {name: p for name, p in plan.placements.items() if p.experts}
    assert list(layers) == list(placed)
    assert {layer.ranks for layer in layers.values()} == set(RANKS) - {()}
    for name, layer in layers.items():
        assert layer.ranks == placed[name].ranks
        assert (layer.lora_alpha, layer.lora_dropout, layer.use_rslora) == (8, 0.25, True)
        assert layer.training == name.startswith("model.layers.1.")
    assert len({id(layer.batch) for layer in layers.values()}) == 1
    untouched = set(plan.modules) - set(placed)
    assert untouched
    assert all(type(model.get_submodule(name)) is nn.Linear for name in untouched)


def test_aux_losses_are_arguments():
    model = tiny_model("llama")
    apply_plan(model, uneven_plan(model), load_balance_coef=0.5, z_loss_coef=0.25)
    assert {tuple(m.aux_coefs.tolist()) for m in adapted_modules(model).values()} == {(0.5, 0.25)}
    bare = tiny_model("llama")
    before = snapshot(bare)
    with pytest.raises(ValueError, match="z_loss_coef must be finite and not negative, got -1"):
        apply_plan(bare, uneven_plan(bare), z_loss_coef=-1)
    assert snapshot(bare) == before


def test_one_shared_A():
    model = tiny_model("llama")
    modules = find_modules(model, "v_proj")
    plan = Plan({name: Placement((3, 3)) for name in modules}, "x", shared_A=True, modules=modules)
    layers = adapted_modules(apply_plan(model, plan)).values()
    assert {tuple(layer.lora_A.shape) for layer in layers} == {(3, 32)}
    assert {layer.top_k for layer in layers} == {2}


def test_twice_is_refused():
    model = adapted()
    plan = uneven_plan(model)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"must carry no adapters .* got 15 adapted modules: call re"
    ):
        apply_plan(model, plan)
    assert snapshot(model) == before
    empty = apply_plan(tiny_model("llama"), Plan({}, "none"))
    with pytest.raises(ValueError, match="must carry no adapters"):
        apply_plan(empty, plan)


MISFITS = [
    (
        {"model.layers.2.mlp.down_proj": ModuleSpec(48, 33, "model.layers.2")},
        "got 'model.layers.2.mlp.down_proj' with 48 inputs and 33 outputs where the model has 48 a",
    ),
    (
        {"model.layers.3.mlp.up_proj": ModuleSpec(32, 48, "model.layers.3")},
        r"'model.layers.3.mlp.up_proj' that it lacks \(nearest: model.layers.2.mlp.up_proj, ",
    ),
    (
        {"model.norm": ModuleSpec(32, 32, "model.norm")},
        "a plan must be for this model, got module 'model.norm' that it lacks",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), MISFITS)
@pytest.mark.parametrize("placed", [True, False])
def test_a_plan_for_another_model_changes_nothing(wrong, message, placed):
    model = tiny_model("llama")
    before = snapshot(model)
    modules = {**find_modules(model), **wrong}
    first = next(iter(modules))
    plan = Plan({next(iter(wrong)) if placed else first: Placement((2,))}, "x", modules=modules)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    assert snapshot(model) == before


def test_a_failure_half_way_changes_nothing(monkeypatch):
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    before = snapshot(model)
    made, wrap = [], apply._wrap

    def scarce(*args):
        if len(made) == 3:
            raise MemoryError("no room for a fourth layer")
        made.append(wrap(*args))
        return made[-1]

    monkeypatch.setattr(apply, "_wrap", scarce)
    with pytest.raises(MemoryError):
        apply_plan(model, uneven_plan(model))
    assert len(made) == 3
    assert snapshot(model) == before


def test_other_weights_are_a_warning():
    model = tiny_model("llama")
    plan = uneven_plan(
        model, fingerprint=fingerprint(tiny_model("llama", seed=1)), base_model="b/c"
    )
    with pytest.warns(
        UserWarning, match=r"made on b/c with other weights \(fingerprint \w{12}\.\.\."
    ):
        apply_plan(model, plan)
    own = tiny_model("llama")
    apply_plan(own, uneven_plan(own, fingerprint=fingerprint(own)))  # no warning, or it would raise


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_remove_gives_everything_back(architecture, tmp_path):
    model = tiny_model(architecture)
    next(model.parameters()).requires_grad_(False)  # somebody had frozen the embedding
    model.save_pretrained(tmp_path / "before")
    before, logits = snapshot(model), model(tokens()).logits
    apply_plan(model, uneven_plan(model))
    randomise(model)
    assert not torch.equal(model(tokens()).logits, logits)
    assert remove_adapters(model) is model
    assert snapshot(model) == before
    assert torch.equal(model(tokens()).logits, logits)
    model.save_pretrained(tmp_path / "after")
    files = [(tmp_path / when / "model.safetensors").read_bytes() for when in ("before", "after")]
    assert files[0] == files[1]
    remove_adapters(model)  # nothing left to remove
    assert snapshot(model) == before


def test_a_model_that_was_moved_is_given_back_too():
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_plan(model, uneven_plan(model))
    model.bfloat16()
    remove_adapters(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_layers_put_in_by_hand_come_out():
    linear = nn.Linear(3, 3)
    model = nn.Sequential(FusedMoELoRA(linear, [2]))
    assert remove_adapters(model)[0] is linear


def test_a_module_with_two_names_is_wrapped_under_both():
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[0]
    layer = model.model.layers[1].mlp
    layer.gate_proj = layer.up_proj
    gate = layer.up_proj
    apply_plan(model, uneven_plan(model))
    assert isinstance(layer.gate_proj, FusedMoELoRA)
    assert layer.gate_proj is layer.up_proj
    assert "model.layers.1.mlp.up_proj" not in adapted_modules(model)
    model(tokens(), labels=tokens()).loss.backward()
    remove_adapters(model)
    assert layer.gate_proj is gate
    assert layer.up_proj is gate


def test_tied_embeddings_stay_tied():
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    apply_plan(model, uneven_plan(model))
    model.tie_weights()
    remove_adapters(model).tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_output_head_is_refused():
    model = tiny_model("llama", tie_word_embeddings=True)
    before = snapshot(model)
    modules = find_modules(model, "lm_head")
    with pytest.raises(
        ValueError, match=r"'lm_head', whose weight transformers ties to 'model\.embed"
    ):
        apply_plan(model, Plan({"lm_head": Placement((2,))}, "test", modules=modules))
    assert snapshot(model) == before
    free = tiny_model("llama", tie_word_embeddings=False)
    modules = find_modules(free, "lm_head")
    apply_plan(free, Plan({"lm_head": Placement((2,))}, "test", modules=modules))
    assert free(tokens()).logits.shape == (2, 7, 64)


def test_a_copy_lives_its_own_life():
    model = adapted()
    twin = copy.deepcopy(model)
    one, two = (next(iter(adapted_modules(m).values())) for m in (model, twin))
    assert one.batch is not two.batch
    seen = []
    two.register_forward_pre_hook(lambda layer, args: seen.append(layer.batch.token_mask))
    twin(tokens(), attention_mask=torch.ones(2, 7))
    assert seen[0].shape == (2, 7), "the copy's hook writes to the copy's context"
    remove_adapters(twin)
    assert not twin._forward_pre_hooks
    assert len(adapted_modules(model)) == 15
    assert len(model._forward_pre_hooks) == 1


def test_a_plain_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(5, 8)
    before = model(x)
    apply_plan(model, uneven_plan(model))
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert model[0].lora_B.grad.abs().sum() > 0
    remove_adapters(model)


def test_through_the_wrapper_of_torch_compile():
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    assert apply_plan(compiled, uneven_plan(model)) is compiled
    assert list(adapted_modules(compiled)) == list(adapted_modules(model))
    assert find_modules(compiled) == find_modules(model)
    assert fingerprint(compiled) == fingerprint(model)
    remove_adapters(compiled)
    assert not adapted_modules(model)


def test_through_the_wrapper_of_data_parallel():
    model = tiny_model("llama")
    wrapped = nn.DataParallel(model, device_ids=None)
    apply_plan(wrapped, uneven_plan(model))
    assert list(adapted_modules(torch.compile(wrapped, backend="eager"))) == list(
        adapted_modules(model)
    )
    assert find_modules(wrapped) == find_modules(tiny_model("llama"))
    remove_adapters(wrapped)
    assert not adapted_modules(model)
