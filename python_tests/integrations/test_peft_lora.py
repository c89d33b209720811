"""LoRA checkpoints written by PEFT become experts, and experts become LoRAs that PEFT loads."""

import json

import pytest
import torch
from adapting import adapted, tokens
from test_peft import Config, logits, shake, wrapped

from floe_kernels import FusedMoELoRA
from floe_kernels.integrations.transformers import adapted_modules, apply_plan, find_modules
from floe_kernels.testing.models import tiny_model

peft = pytest.importorskip("peft")
lora = pytest.importorskip("floe_kernels.integrations.peft_lora")

pytestmark = [
    # PEFT 0.21 reads what transformers 5.23 deprecates; up to 0.20 it looks for a nameless model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def checkpoint(folder, seed, architecture="llama", **options):
    """A LoRA that PEFT trained, and what it computes."""
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    config = peft.LoraConfig(**{"target_modules": targets, "r": 3, **fan, **options})
    model = tiny_model(architecture, tie_word_embeddings=False)
    model = shake(peft.get_peft_model(model, config), seed=seed).eval()
    model.save_pretrained(folder)
    return logits(model)


def choose(model, expert):
    """Make every token go to one expert, whose gate is 1."""
    for layer in lora.named_experts(model, "default").values():
        layer.forward = alone(layer, [float(e == expert) for e in range(len(layer.ranks))])
    return model


def alone(layer, gates):
    """What the layer computes under fixed gates, from the experts' own slices."""

    def forward(x, token_mask=None):
        columns = torch.tensor(gates).repeat_interleave(torch.tensor(layer.ranks))
        hidden = x @ layer.lora_A.T * (columns * layer.scaling)
        return layer.base_layer(x) + hidden @ layer.lora_B

    return forward


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpoints_become_experts(tmp_path, architecture):
    options = [
        {"r": 3, "lora_alpha": 5},
        {"r": 2, "use_rslora": True, "rank_pattern": {"1.*(q_proj|c_attn)": 1}},
        {"r": 2, "alpha_pattern": {"down_proj|c_fc": 1}},
    ]
    folders = [tmp_path / str(i) for i in range(3)]
    expected = [
        checkpoint(folder, seed, architecture, **option)
        for seed, (folder, option) in enumerate(zip(folders, options, strict=True))
    ]
    for expert, out in enumerate(expected):
        model = wrapped(lora.config_from_lora(folders, top_k=1), architecture)
        lora.load_lora_experts(model, folders)
        torch.testing.assert_close(logits(choose(model, expert)), out)
    assert not torch.allclose(expected[0], expected[1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_an_expert_goes_out_and_comes_back(tmp_path, architecture):
    options = {
        "rank_pattern": {"q_proj|c_attn": [1, 3]},
        "num_experts": 2,
        "r": 2,
        "use_rslora": True,
    }
    model = shake(wrapped(Config(**options), architecture)).double()
    lora.export_lora(model, tmp_path, expert=1)
    base = tiny_model(architecture, tie_word_embeddings=False).double()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(choose(model, 1)))
    again = wrapped(lora.config_from_lora([tmp_path]), architecture).double()
    lora.load_lora_experts(again, [tmp_path])
    torch.testing.assert_close(logits(again), logits(loaded))


@pytest.mark.parametrize("shared_A", [False, True], ids=["", "shared_A"])
def test_a_mixture_under_fixed_gates_is_its_merge(tmp_path, shared_A):
    from floe_kernels.integrations.peft import set_merge_gates

    model = shake(wrapped(Config(num_experts=3, r=2, shared_A=shared_A))).double()
    gates = lora.mean_gates(model, [{"input_ids": tokens()}, {"input_ids": tokens(seed=1)}])
    lora.export_lora(model, tmp_path, gates=gates)
    base = tiny_model("llama", tie_word_embeddings=False).double()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    set_merge_gates(model, gates)
    torch.testing.assert_close(logits(loaded.double().eval()), logits(model.merge_and_unload()))


def test_the_base_is_the_same_for_every_export(tmp_path):
    model = adapted()  # by a plan, without PEFT's tuner
    lora.export_lora(model, tmp_path, gates=_uniform(model))
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    names = {n for n, layer in adapted_modules(model).items() if sum(layer.ranks)}
    assert {n.removeprefix("base_model.model.") for n, m in loaded.named_modules()
            if isinstance(m, peft.tuners.lora.LoraLayer)} == names  # fmt: skip


def _uniform(model):
    layers = lora.named_experts(model, "default")
    return {name: [1 / len(layer.ranks)] * len(layer.ranks) for name, layer in layers.items()}


def test_mean_gates_leave_padding_out():
    model = shake(wrapped(Config(num_experts=3, r=2, target_modules=["q_proj"])))
    ids, mask = tokens(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    alone = lora.mean_gates(model, [{"input_ids": ids[:, 2:]}])
    for name, gates in lora.mean_gates(model, [padded]).items():
        torch.testing.assert_close(gates, alone[name])
        torch.testing.assert_close(gates.sum(), torch.tensor(1.0))
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, FusedMoELoRA))


def test_mean_gates_are_the_layers_own():
    layer = FusedMoELoRA(torch.nn.Linear(4, 4), ranks=[1, 1, 1], top_k=2)
    x = torch.randn(1, 5, 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    probabilities = torch.softmax(x[0] @ layer.router.weight.T, -1)
    kept = probabilities.topk(2).values
    low = probabilities < kept[:, -1:]
    expected = (probabilities.masked_fill(low, 0) / kept.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(lora.mean_gates(Model(), [{"x": x}])["layer"], expected.detach())


REFUSED = {
    "dora": ({"use_dora": True}, "plain LoRA, got use_dora"),
    "bias": ({"bias": "lora_only"}, "plain LoRA, got bias=lora_only"),
    "pissa": ({"init_lora_weights": "pissa"}, "plain LoRA, got init_lora_weights=pissa"),
    "packed": ({"target_parameters": ["experts.up"]}, "plain LoRA, got target_parameters"),
    "other": ({"peft_type": "IA3"}, "plain LoRA, got IA3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(tmp_path, case):
    checkpoint(tmp_path, 0)
    path = tmp_path / "adapter_config.json"
    change, message = REFUSED[case]
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        lora.read_lora(tmp_path)


DAMAGED = {
    "cut off": (b'{"peft_type": "LORA", ', "must be JSON"),
    "nested": (b"[" * 100_000, "must be JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "no alpha": (b'{"peft_type": "LORA", "lora_alpha": "x"}', "lora_alpha and rank of"),
    "pattern": (b'{"peft_type": "LORA", "alpha_pattern": [1]}', "alpha_pattern in"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_stranger_s_settings_are_refused_in_a_sentence(tmp_path, case):
    checkpoint(tmp_path, 0)
    text, message = DAMAGED[case]
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        lora.read_lora(tmp_path)


def test_a_stranger_s_damaged_tensors_are_refused_in_a_sentence(tmp_path):
    checkpoint(tmp_path, 0)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="must be a safetensors file, it is damaged"):
        lora.read_lora(tmp_path)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT 0.18
def test_an_adapter_of_packed_experts_is_refused(tmp_path):
    # its lora_B has experts innermost: read as a linear's, it would pair the wrong columns
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    names = [n for n, p in model.named_parameters() if p.ndim == 3]
    assert names, "transformers keeps experts in one parameter"
    lora_config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
    peft.get_peft_model(model, lora_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="plain LoRA, got target_parameters"):
        lora.read_lora(tmp_path)


def test_what_does_not_fit_changes_nothing(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    checkpoint(one, 0)
    checkpoint(two, 1, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="of the same modules"):
        lora.config_from_lora([one, two])
    model = shake(wrapped(lora.config_from_lora([one, one])))
    before = logits(model)
    for folders, message in (
        ([one, two], "is not in both"),
        ([one], "must have experts of ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.load_lora_experts(model, folders)
    assert torch.equal(logits(model), before)
    shared = wrapped(Config(target_modules=["q_proj"], num_experts=2, r=3, shared_A=True))
    with pytest.raises(ValueError, match="one shared A"):
        lora.load_lora_experts(shared, [two, two])


def test_what_cannot_be_exported(tmp_path):
    model = shake(wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"])))
    for options, message in (
        ({}, "neither or both"),
        ({"expert": 0, "gates": {}}, "neither or both"),
        ({"expert": 2}, r"must be in 0..E-1 = 0..1"),
        ({"gates": {}}, "got none for"),
        ({"gates": {n: [0.0, 0.0] for n in lora.named_experts(model, "default")}}, "gates of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.export_lora(model, tmp_path / "nothing", **options)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="must carry experts"):
        lora.export_lora(tiny_model("llama"), tmp_path, expert=0)


def test_checkpoints_go_into_a_plans_layers_too(tmp_path):
    from floe_kernels.allocation.plan import Placement, Plan

    out = checkpoint(tmp_path, 0, r=4)
    model = tiny_model("llama", tie_word_embeddings=False)
    modules = find_modules(model, ["q_proj", "down_proj"])
    placements = {name: Placement((4,), 1) for name in modules}
    model = apply_plan(model, Plan(placements, "by hand", modules=modules))
    lora.load_lora_experts(model, [tmp_path])
    torch.testing.assert_close(logits(model), out)
