"""The fingerprint knows a base model through adapters and dtypes, and no other model for it."""

import pytest
import torch
from adapting import adapted, randomise, uneven_plan
from torch import nn

from floe_kernels.integrations.transformers import (
    apply_plan,
    find_modules,
    fingerprint,
    remove_adapters,
)
from floe_kernels.testing.models import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_leave_no_trace(architecture):
    model = tiny_model(architecture)
    before = fingerprint(model)
    assert len(before) == 64
    apply_plan(model, uneven_plan(model))
    assert fingerprint(model) == before
    randomise(model, seed=3)
    assert fingerprint(model.train()) == before
    assert fingerprint(remove_adapters(model)) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_in_another_dtype(dtype):
    assert fingerprint(tiny_model("llama").to(dtype)) == fingerprint(tiny_model("llama"))


@pytest.mark.parametrize("published", [torch.bfloat16, torch.float16])
def test_float16_keeps_what_was_published_in_16_bits(published):
    torch.manual_seed(0)
    weights = torch.randn(4096) * 10.0 ** torch.linspace(-9, 3, 4096)
    weights = dict(enumerate(weights.to(published).split(8)))  # short, so every value is read
    prints = {
        fingerprint(nn.ParameterDict({str(i): w.to(dtype) for i, w in weights.items()}))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len(prints) == 1


def test_float16_of_a_float32_model_differs():
    # the limit that the docstring states: no checksum of rounded values survives every rounding
    assert fingerprint(tiny_model("llama").half()) != fingerprint(tiny_model("llama"))


def test_other_models_differ():
    one = fingerprint(tiny_model("llama"))
    others = [
        tiny_model("llama", seed=1),
        tiny_model("llama", num_hidden_layers=2),
        tiny_model("llama", vocab_size=65),
        tiny_model("mistral"),
    ]
    tuned = tiny_model("llama")
    with torch.no_grad():
        tuned.model.layers[2].mlp.down_proj.weight.mul_(1.02)
    prints = [one, *(fingerprint(model) for model in [*others, tuned])]
    assert len(set(prints)) == len(prints)


def test_the_layout_in_memory_does_not_matter():
    model = nn.Sequential(nn.Linear(6, 4))
    before = fingerprint(model)
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    assert fingerprint(model) == before


def test_a_quantised_weight_counts_by_name_and_shape():
    def quantised(fill, size=8):
        model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
        packed = torch.full((size,), fill, dtype=torch.uint8)
        model.packed = nn.Parameter(packed, requires_grad=False)
        return fingerprint(model)

    assert quantised(1) == quantised(2)
    assert quantised(1) != quantised(1, size=9)


def test_a_model_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"must be loaded to have a fingerprint, 0\.\w+ is on meta"
    ):
        fingerprint(model)


def test_a_parameter_that_only_looks_like_an_adapters():
    class Mixer(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.base_layer = nn.Linear(2, 2)
            self.lora_A = nn.Parameter(torch.full((2,), value))
            nn.init.zeros_(self.base_layer.weight)
            nn.init.zeros_(self.base_layer.bias)

    assert fingerprint(Mixer(1.0)) != fingerprint(Mixer(2.0))


def test_it_does_not_depend_on_the_plan():
    model = adapted()
    first = fingerprint(model)
    remove_adapters(model)
    name = next(iter(find_modules(model)))
    plan = uneven_plan(model)
    only = type(plan)({name: plan.placements[name]}, "test", modules=plan.modules)
    assert fingerprint(apply_plan(model, only)) == first


def test_a_foreign_wrapper_is_part_of_the_base():
    linear = nn.Linear(2, 2)
    bare = nn.ModuleDict({"q": linear})
    wrapped = nn.ModuleDict({"q": nn.ModuleDict({"base_layer": linear})})
    assert fingerprint(bare) != fingerprint(wrapped)
