"""Discovery names the right linears of every architecture, in model order, once."""

import pytest
import torch
from adapting import adapted
from torch import nn

from floe_kernels.integrations.targets import DEFAULT_TARGETS
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.testing.models import ARCHITECTURES, tiny_model

LLAMA = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
IN_BLOCK = dict.fromkeys(ARCHITECTURES, LLAMA) | {
    "phi": [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense",
        "mlp.fc1", "mlp.fc2",
    ],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_of_every_architecture(architecture):
    model = tiny_model(architecture)
    assert model.config.model_type in DEFAULT_TARGETS
    blocks = "transformer.h" if architecture == "gpt2" else "model.layers"
    found = find_modules(model)
    assert list(found) == [
        f"{blocks}.{i}.{name}" for i in range(3) for name in IN_BLOCK[architecture]
    ]
    for name, spec in found.items():
        linear = model.get_submodule(name)
        shape = linear.weight.T.shape if architecture == "gpt2" else linear.weight.shape
        assert (spec.out_features, spec.in_features) == shape
        assert name.startswith(spec.layer + ".")
        assert spec.layer.rpartition(".")[0] == blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_and_mlp_share_out_all_linears(architecture):
    model = tiny_model(architecture)
    attention, mlp = (find_modules(model, group) for group in ("attention", "mlp"))
    assert set(attention) | set(mlp) == set(find_modules(model, "all-linear"))
    assert not set(attention) & set(mlp)
    assert all("attn" in name for name in attention)
    assert all("mlp" in name for name in mlp)


def test_targets_are_suffixes_or_names():
    model = tiny_model("llama")
    full = "model.layers.2.mlp.up_proj"
    found = find_modules(model, [full, "self_attn.q_proj", "q_proj", "lm_head"])
    queries = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert list(found) == [*queries, full, "lm_head"], "model order, each once"
    assert found["lm_head"].layer == "lm_head"
    assert list(find_modules(model, full)) == [full]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", r"must match a linear layer, got 'q_prj' \(nearest: q_proj, "),
        ("atention", r"got 'atention' \(nearest: attention, "),
        ("proj", r"got 'proj' \(nearest: "),  # a suffix ends at a dot
        ("input_layernorm", r"must match a linear layer, got 'input_layernorm'"),
        ("model.layers.7.mlp.up_proj", r"\(nearest: model.layers.\d.mlp.up_proj, "),
    ],
)
def test_a_target_that_matches_nothing(target, message):
    with pytest.raises(ValueError, match=message):
        find_modules(tiny_model("llama"), ["k_proj", target])


def test_nothing_to_find():
    with pytest.raises(ValueError, match="targets must name something, got none"):
        find_modules(tiny_model("llama"), [])
    with pytest.raises(ValueError, match="must have linear layers to adapt, ReLU has none"):
        find_modules(nn.ReLU())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", [None, "all-linear", "mlp"])
def test_an_adapted_model_reads_as_its_base(architecture, targets):
    bare = find_modules(tiny_model(architecture), targets)
    model = adapted(architecture)
    assert list(find_modules(model, targets).items()) == list(bare.items())
    for own in ("router", "base_layer"):
        with pytest.raises(ValueError, match=f"must match a linear layer, got '{own}'"):
            find_modules(model, own)


class Unknown(nn.Module):
    """An architecture that nobody has told us about."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9)

    def get_output_embeddings(self):
        return self.head


def test_an_unknown_architecture():
    def block():
        return nn.ModuleDict({"attention": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})

    for blocks in (nn.ModuleList([block(), block()]), nn.Sequential(block(), block())):
        assert list(find_modules(Unknown(blocks))) == ["blocks.0.attention", "blocks.1.attention"]
    assert list(find_modules(Unknown(None))) == ["inner"], "no blocks: all but the head"
    nested = nn.ModuleList([nn.ModuleList([block()])])
    assert find_modules(Unknown(nested))["blocks.0.0.attention"].layer == "blocks.0"


def test_the_default_leaves_a_vision_tower_alone():
    model = nn.Module()
    model.config = type("Config", (), {"model_type": "gemma3"})()
    for part in ("vision_tower", "language_model"):
        layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])
        model.add_module(part, nn.ModuleDict({"layers": layers}))
    assert list(find_modules(model)) == ["language_model.layers.0.q_proj"]
    assert len(find_modules(model, "q_proj")) == 2


def test_a_shared_linear_is_listed_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared})
    assert list(find_modules(model)) == ["a", "b"]
    assert list(find_modules(model, "c")) == ["a"], "its other name finds it too"


def test_linears_that_are_read_and_not_called_are_not_listed():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"encoder": encoder, "attention": nn.MultiheadAttention(8, 2)})
    model["lazy"] = nn.LazyLinear(3)
    model["own"] = nn.Linear(8, 8)
    assert list(find_modules(model)) == ["own"]


def test_any_linear_like_module_counts():
    class Packed(nn.Module):
        in_features, out_features = 6, 5

        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(15, dtype=torch.uint8))

    assert find_modules(nn.ModuleDict({"q": Packed()}))["q"][:2] == (6, 5)
