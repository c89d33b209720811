"""The PEFT tuner behaves as PEFT's own tests ask of a custom module's."""

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from adapting import tokens, uneven_plan

from floe_kernels import FusedMoELoRA
from floe_kernels.integrations.transformers import adapted_modules, apply_plan
from floe_kernels.testing.models import tiny_model

peft = pytest.importorskip("peft")
tuner = pytest.importorskip("floe_kernels.integrations.peft")
from floe_kernels.integrations.peft_layer import as_lora  # noqa: E402

pytestmark = [
    # PEFT 0.21 reads what transformers 5.23 deprecates; up to 0.20 it looks for a nameless model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

Config = tuner.FusedMoELoRAConfig
CASES = {
    "defaults": {"num_experts": 3, "r": 2},
    "one expert each": {"num_experts": 1, "r": 2, "top_k": 1},
    "top 1": {"num_experts": 3, "r": 2, "top_k": 1},
    "shared A": {"num_experts": 3, "r": 2, "shared_A": True},
    "names": {"target_modules": ["q_proj", "down_proj"], "num_experts": 2, "use_rslora": True},
    "expression": {"target_modules": r".*\.1\.self_attn\.[qk]_proj", "lora_alpha": 3},
    "ranks": {"num_experts": 2, "r": 2, "rank_pattern": {"q_proj": [1, 0, 3]}, "lora_dropout": 0.1},
    "saved": {"num_experts": 2, "r": 2, "modules_to_save": ["norm"]},
}


@pytest.fixture(params=CASES, ids=str)
def config(request):
    options = copy.deepcopy(CASES[request.param])
    if "target_modules" not in options:
        options["target_modules"] = ["q_proj", "up_proj"]
    return Config(**options)


def wrapped(config=None, architecture="llama", name="default"):
    config = config or Config(num_experts=3, r=2)
    model = tiny_model(architecture, tie_word_embeddings=False)
    return peft.get_peft_model(model, config, name).eval()


def shake(model, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def base_logits():
    return logits(tiny_model("llama", tie_word_embeddings=False))


def test_forward_is_the_bases_before_training(config):
    assert torch.equal(logits(wrapped(config)), base_logits())


def test_training_changes_the_adapter_and_nothing_else(config):
    model = wrapped(config).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    ours = {name for name in before if "floe_" in name or ".modules_to_save." in name}
    frozen_anyway = {name for name in ours if before[name].numel() == 0}
    silent = set() if len(config.rank_pattern) or config.num_experts > 1 else _routers(ours)
    assert moved == ours - frozen_anyway - silent
    assert not torch.equal(logits(model.eval()), base_logits())


def _routers(names):
    return {name for name in names if "floe_router" in name}  # of one expert: it has no choice


def test_saved_and_loaded(config, tmp_path):
    model = shake(wrapped(config))
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in saved if "base_layer" in name or "default" in name]
    layers = [m for m in model.modules() if isinstance(m, tuner.FusedMoELoRALayer)]
    for part in ("floe_experts.lora_A", "floe_experts.lora_B", "floe_router.weight"):
        assert sum(name.endswith(part) for name in saved) == len(layers)
    base = tiny_model("llama", tie_word_embeddings=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, adapter_name="another name").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = loaded.peft_config["another name"]
    assert again.options("model.layers.0.q_proj") == config.options("model.layers.0.q_proj")


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_loaded_onto_a_rounded_base_bit_for_bit(tmp_path, low):
    model = shake(wrapped())
    model.save_pretrained(tmp_path)
    base = tiny_model("llama", tie_word_embeddings=False).bfloat16()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
    ours = {name: p for name, p in model.named_parameters() if "floe_" in name}
    for name, parameter in loaded.named_parameters():
        if "floe_" in name:
            assert torch.equal(parameter, ours.pop(name)), name
    assert not ours
    assert logits(loaded).dtype == torch.bfloat16


def test_disabled_and_enabled_again(config):
    if config.modules_to_save:
        pytest.skip("PEFT disables modules_to_save by itself; this is about ours")
    model = shake(wrapped(config))
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    assert torch.equal(logits(model), changed)
    assert not torch.equal(changed, base_logits())


def test_unloaded():
    model = shake(wrapped())
    base = model.unload()
    assert torch.equal(logits(base), base_logits())
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert set(base.state_dict()) == set(tiny_model("llama").state_dict())


def test_several_adapters(tmp_path):
    model = shake(wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"])))
    one = logits(model)
    model.add_adapter("other", Config(num_experts=3, r=1, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(logits(model), one), "an inactive adapter must change nothing"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert torch.equal(logits(model), base_logits())
    other = logits(shake(model, seed=1))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".other." in name for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.save_pretrained(tmp_path)
    base = tiny_model("llama", tie_word_embeddings=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded), one)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), other)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), other)
    assert not [name for name in model.state_dict() if ".default." in name]


def test_active_adapters_add_up():
    linear = torch.nn.Linear(8, 4)
    layer = tuner.FusedMoELoRALayer(linear)
    layer.update_layer("a", {"ranks": [2, 2]})
    layer.update_layer("b", {"ranks": [1, 3, 1]})
    for experts in layer.floe_experts.values():
        torch.nn.init.normal_(experts.lora_B)
    x = torch.randn(5, 8)
    with torch.no_grad():
        base, alone = linear(x), {}
        for name in "ab":
            layer.set_adapter(name)
            alone[name] = layer(x) - base
        layer.set_adapter(["a", "b"])
        torch.testing.assert_close(layer(x), base + alone["a"] + alone["b"])
    layer(x).sum().backward()
    assert all(e.lora_B.grad.abs().sum() > 0 for e in layer.floe_experts.values())


def test_deleting_an_inactive_adapter_keeps_what_is_frozen():
    layer = tuner.FusedMoELoRALayer(torch.nn.Linear(8, 4))
    for name in "ab":
        layer.update_layer(name, {"ranks": [2]}, inference_mode=True)
    layer.delete_adapter("b")
    assert not any(p.requires_grad for p in layer.parameters())


def test_merging_is_refused_and_the_reason_given():
    model = shake(wrapped())
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"depends on the token.*set_merge_gates"):
            merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_with_stated_gates(architecture):
    model = shake(wrapped(architecture=architecture)).double()
    layers = tuner.peft_layers(model, "default")
    stated = {name: torch.tensor([0.5, 0.0, 0.25]) for name in layers}
    before = logits(model)
    deltas = {}
    for name, layer in layers.items():
        lora_A, lora_B = as_lora(layer.experts("default"), stated[name])
        deltas[name] = lora_B @ lora_A
    tuner.set_merge_gates(model, stated)
    model.merge_adapter()
    reference = tiny_model(architecture, tie_word_embeddings=False).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            linear = reference.get_submodule(name)
            linear.weight += delta if isinstance(linear, torch.nn.Linear) else delta.T
    torch.testing.assert_close(logits(model), logits(reference))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), logits(reference))


def test_one_expert_merges_exactly():
    model = shake(wrapped(Config(num_experts=1, r=3, top_k=1))).double()
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before)


def test_gates_must_fit():
    model = wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"]))
    names = list(tuner.peft_layers(model, "default"))
    with pytest.raises(ValueError, match=r"got none for 'model\.layers\.2"):
        tuner.set_merge_gates(model, {name: [0.5, 0.5] for name in names[:2]})
    with pytest.raises(ValueError, match="must be 2 finite numbers"):
        tuner.set_merge_gates(model, {name: [0.5] for name in names})
    assert not any(layer.merge_gates for layer in tuner.peft_layers(model, "default").values())


def test_a_merge_that_is_not_finite_is_refused():
    model = wrapped(Config(num_experts=1, r=2, top_k=1, target_modules=["q_proj"]))
    layer = next(iter(tuner.peft_layers(model, "default").values()))
    with torch.no_grad():
        layer.experts("default").lora_B.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight.isfinite().all()


def test_a_plan_becomes_a_config():
    model = tiny_model("llama")
    plan = uneven_plan(model, lora_alpha=4)
    by_peft = peft.get_peft_model(tiny_model("llama"), Config.from_plan(plan))
    placed = {name: p for name, p in plan.placements.items() if p.experts}
    layers = tuner.peft_layers(by_peft, "default")
    assert set(layers) == set(placed)
    by_plan = adapted_modules(apply_plan(model, plan))
    for name, layer in by_plan.items():
        ours = layers[name].experts("default")
        assert (ours.ranks, ours.top_k, ours.lora_alpha) == (layer.ranks, layer.top_k, 4)
        with torch.no_grad():
            for part in ("lora_A", "lora_B"):
                getattr(layer, part).copy_(getattr(ours, part).normal_())
            layer.router.weight.copy_(ours.router.weight)
    assert torch.equal(logits(by_peft.eval()), logits(model))


def test_padding_reaches_the_experts():
    model = shake(wrapped())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    model(input_ids=tokens(), attention_mask=mask)
    layer = next(iter(tuner.peft_layers(model, "default").values())).experts("default")
    assert torch.equal(layer.routing.token_mask, mask.bool().flatten())


def test_compiled_without_a_break():
    model = shake(wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"])))
    model.add_adapter("other", Config(num_experts=2, r=1, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model.base_model.model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        got = compiled(tokens()).logits
    torch.testing.assert_close(got, logits(model))
    torch._dynamo.reset()


def test_several_adapters_share_one_hook():
    model = wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"]))
    model.add_adapter("other", Config(num_experts=2, r=2, target_modules=["v_proj"]))
    contexts = {id(m.batch) for m in model.modules() if isinstance(m, FusedMoELoRA)}
    assert len(contexts) == 1
    base = model.unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_have_the_dtype_that_peft_promises(base, autocast):
    bare, config = tiny_model("llama").to(base), Config(num_experts=2, target_modules=["q_proj"])
    model = peft.get_peft_model(bare, config, autocast_adapter_dtype=autocast)
    want = torch.promote_types(base, torch.float32) if autocast else base
    assert {p.dtype for n, p in model.named_parameters() if "floe_" in n} == {want}
    scalings = [b for n, b in model.named_buffers() if n.endswith(".scaling")]
    assert {b.dtype for b in scalings} == {torch.float32}
    shake(model)(input_ids=tokens(), labels=tokens()).loss.backward()


def test_weights_that_start_at_random():
    model = wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"], init_weights=False))
    assert not torch.equal(logits(model), base_logits())


def test_a_module_that_is_no_linear_is_refused():
    with pytest.raises(ValueError, match=r"'model.embed_tokens' is not supported.*got Embedding"):
        wrapped(Config(target_modules=["embed_tokens"]))


def test_a_model_that_is_not_of_transformers(tmp_path):
    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(10, 20), torch.nn.Linear(20, 2)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    def make():
        torch.manual_seed(0)
        return Regression()

    x = torch.randn(9, 10)
    config = Config(target_modules=["first"], num_experts=3, r=4, modules_to_save=["second"])
    model = peft.get_peft_model(make(), config)
    assert torch.equal(model(x), make()(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model(x), make()(x))
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), make()(x))


def test_a_copy_stands_on_its_own_base():
    model = shake(wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"])))
    other = copy.deepcopy(model)
    for layer in tuner.peft_layers(other, "default").values():
        assert layer.experts("default").base_layer is layer.base_layer
        assert layer.experts("default").router is layer.floe_router["default"]
        layer.base_layer.weight.data.zero_()
    assert not torch.equal(logits(model), logits(other))


def test_names_per_sample_are_refused():
    layer = tuner.FusedMoELoRALayer(torch.nn.Linear(8, 4))
    layer.update_layer("a", {"ranks": [2, 2]})
    with pytest.raises(ValueError, match="one set of adapters a batch"):
        layer(torch.zeros(2, 8), adapter_names=["a", "a"])


def test_registered_once_and_for_good():
    tuner.register()
    kind = peft.PeftType[tuner.TYPE]
    assert kind is peft.PeftType(tuner.TYPE) is peft.PeftType.FUSED_MOE_LORA
    assert list(peft.PeftType).count(kind) == 1
    assert isinstance(kind, peft.PeftType)
    assert copy.deepcopy(kind) is kind
    assert issubclass(tuner.FusedMoELoRALayer, torch.nn.Module)
    assert not issubclass(tuner.FusedMoELoRALayer, FusedMoELoRA)


def test_importing_the_package_touches_no_peft():
    code = "import sys, floe_kernels; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_peft_that_takes_no_type_is_reported(monkeypatch):
    def refuse(**_):
        raise ValueError("closed")

    monkeypatch.setattr(tuner, "register_peft_method", refuse)
    monkeypatch.setattr(tuner, "PEFT_TYPE_TO_CONFIG_MAPPING", {})
    with pytest.raises(ImportError, match="takes no further type: closed"):
        tuner.register()
